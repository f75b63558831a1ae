// What lies between a layer's attention and its experts: norms, the residual stream, the router.
#pragma once

#include <chrono>
#include <cmath>
#include <cstdint>
#include <vector>

namespace localmoe {

// y = x / sqrt(mean(x^2) + epsilon) * weight; y may be x. Eight sums: shorter chains of rounding, and vectors.
inline void rms_norm(const float* x, const std::vector<float>& weight, float epsilon, float* y) {
  const auto n = static_cast<int64_t>(weight.size());
  float squares[8] = {};
  int64_t i = 0;
  for (; i + 8 <= n; i += 8)
    for (int64_t j = 0; j < 8; ++j) squares[j] += x[i + j] * x[i + j];
  for (; i < n; ++i) squares[i % 8] += x[i] * x[i];
  float sum = 0.0f;
  for (const float square : squares) sum += square;
  const float factor = 1.0f / std::sqrt(sum / static_cast<float>(n) + epsilon);
  for (i = 0; i < n; ++i) y[i] = x[i] * factor * weight[i];
}

inline void add(float* to, const float* what, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] += what[i];
}

// Seconds by part of a layer, which never overlap.
struct LayerSeconds {
  double attention = 0, router = 0, experts = 0, dense = 0;
};

// Adds the time since the last mark to a part.
class Marks {
 public:
  void mark(double& part) {
    const auto now = std::chrono::steady_clock::now();
    part += std::chrono::duration<double>(now - last_).count();
    last_ = now;
  }

  // Seconds from the beginning to the last mark.
  double since_first() const { return std::chrono::duration<double>(last_ - first_).count(); }

 private:
  std::chrono::steady_clock::time_point first_ = std::chrono::steady_clock::now(), last_ = first_;
};

}  // namespace localmoe
