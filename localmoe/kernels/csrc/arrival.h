// Experts of a model that memory does not hold: the system is asked for their bytes, many at once, before they are read.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace localmoe {

struct Matrix;
struct Mlp;

// Bytes in memory that others own.
struct Span {
  const uint8_t* begin;
  int64_t size;
};

// Where a matrix's values and scales lie, spans that touch as one.
void add_spans(const Matrix& matrix, std::vector<Span>& spans);

// Left alone, a page that is not in memory is read when a thread meets it, one window of readahead at a time, while the
// disk could answer dozens of requests together. Asking changes no result, only when its bytes come.
class Arrivals {
 public:
  // Asks so many bytes ahead of what is computed; 0, as at first: never. Without `tells`, the system does not say what
  // is in memory (mincore is for files that the user could write to), and everything is asked for, in the order given.
  void set(int64_t ahead, bool tells) {
    ahead_ = ahead;
    tells_ = tells;
  }

  bool on() const { return ahead_ > 0; }

  // Bytes asked for so far.
  int64_t asked() const { return asked_.load(std::memory_order_relaxed); }

  // Begins a call that computes `mlps`. Returns the order to compute them in: those in memory first. One thread.
  const std::vector<size_t>& begin(const std::vector<const Mlp*>& mlps);

  // Asks for what is due now that number `place` of that order is being computed. Many threads may.
  void reached(size_t place);

 private:
  struct Request {
    Span span;
    int64_t before;  // bytes asked for ahead of it
  };

  bool in_memory(const Span& span);

  int64_t ahead_ = 0;
  bool tells_ = true;
  std::vector<size_t> order_, missing_;
  std::vector<Span> spans_;
  std::vector<int64_t> before_;  // bytes to ask for ahead of each place of the order
  std::vector<Request> requests_;
  std::vector<unsigned char> pages_;
  std::atomic<size_t> next_{0};
  std::atomic<int64_t> asked_{0};
};

}  // namespace localmoe
