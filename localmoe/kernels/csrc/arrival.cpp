#include "arrival.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>

#include "experts.h"

namespace localmoe {

namespace {

constexpr int64_t kRequest = 4 << 20;  // bytes a call asks for, so that the threads share them

// The whole pages that a span touches.
Span pages_of(const Span& span) {
  static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
  const auto first = reinterpret_cast<uintptr_t>(span.begin) / page * page;
  const auto last = (reinterpret_cast<uintptr_t>(span.begin) + span.size + page - 1) / page * page;
  return {reinterpret_cast<const uint8_t*>(first), static_cast<int64_t>(last - first)};
}

void add_span(const void* begin, int64_t size, std::vector<Span>& spans) {
  const auto* first = static_cast<const uint8_t*>(begin);
  if (size <= 0 || first == nullptr) return;
  if (!spans.empty() && spans.back().begin + spans.back().size == first)
    spans.back().size += size;
  else
    spans.push_back({first, size});
}

}  // namespace

void add_spans(const Matrix& matrix, std::vector<Span>& spans) {
  add_span(matrix.data, matrix.out * matrix.row_bytes, spans);
  if (matrix.group > 0)
    add_span(matrix.scales, matrix.out * (matrix.in / matrix.group) * scale_bytes(matrix.form), spans);
}

// Where the system refuses, the span counts as missing: asking for what is there costs little.
bool Arrivals::in_memory(const Span& span) {
  if (!tells_) return false;
  static const auto page = static_cast<int64_t>(sysconf(_SC_PAGESIZE));
  const Span whole = pages_of(span);
  pages_.resize(std::max<size_t>(pages_.size(), whole.size / page));
  if (mincore(const_cast<uint8_t*>(whole.begin), whole.size, pages_.data()) != 0) return false;
  return std::all_of(pages_.begin(), pages_.begin() + whole.size / page, [](unsigned char each) { return each & 1; });
}

const std::vector<size_t>& Arrivals::begin(const std::vector<const Mlp*>& mlps) {
  order_.clear();
  missing_.clear();
  requests_.clear();
  next_.store(0, std::memory_order_relaxed);
  int64_t asked = 0;
  before_.clear();
  for (size_t i = 0; i < mlps.size(); ++i) {
    spans_.clear();
    for (const Matrix* matrix : {&mlps[i]->gate, &mlps[i]->up, &mlps[i]->down}) add_spans(*matrix, spans_);
    const bool here = std::all_of(spans_.begin(), spans_.end(), [this](const Span& span) { return in_memory(span); });
    (here ? order_ : missing_).push_back(i);
    if (here) continue;
    before_.push_back(asked);
    for (const Span& span : spans_)
      for (int64_t done = 0; done < span.size; done += kRequest) {
        requests_.push_back({{span.begin + done, std::min(kRequest, span.size - done)}, asked});
        asked += requests_.back().span.size;
      }
  }
  before_.insert(before_.begin(), order_.size(), 0);
  order_.insert(order_.end(), missing_.begin(), missing_.end());
  return order_;
}

void Arrivals::reached(size_t place) {
  const int64_t due = before_[place] + ahead_;
  size_t next = next_.load(std::memory_order_relaxed);
  while (next < requests_.size() && requests_[next].before < due) {
    if (!next_.compare_exchange_weak(next, next + 1, std::memory_order_relaxed)) continue;
    asked_.fetch_add(requests_[next].span.size, std::memory_order_relaxed);
    const Span whole = pages_of(requests_[next].span);
    madvise(const_cast<uint8_t*>(whole.begin), whole.size, MADV_WILLNEED);  // a hint: what it does not do, reading does
    next = next_.load(std::memory_order_relaxed);
  }
}

}  // namespace localmoe
