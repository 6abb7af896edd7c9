// Rows at consecutive positions of an epoch's order. What they share is computed once: the window's permutation, and
// where its blocks are.
#pragma once
#include <cstdint>
#include <vector>

#include "core/permute.h"

namespace widedeep::cpu {

class OrderedRows {
 public:
  // Caller keeps `order`.
  explicit OrderedRows(const core::EpochOrder& order) : order_(order), window_(order.window_of(0)) {}

  int64_t operator()(uint64_t position) {
    if (position - window_.first >= window_.size || starts_.empty()) enter(position);
    const uint64_t place = order_.place_of(window_, position), block = place / order_.block_rows() - first_block_;
    if (starts_[block] == kUnknown) starts_[block] = order_.block_start(first_block_ + block);
    return static_cast<int64_t>(starts_[block] + place % order_.block_rows());
  }

 private:
  static constexpr uint64_t kUnknown = ~uint64_t{0};

  void enter(uint64_t position) {
    window_ = order_.window_of(position);
    first_block_ = window_.first / order_.block_rows();  // or one more: places past the short block are moved up
    starts_.assign(window_.size / order_.block_rows() + 3, kUnknown);
  }

  const core::EpochOrder& order_;
  core::EpochOrder::Window window_;
  uint64_t first_block_ = 0;
  std::vector<uint64_t> starts_;
};

}  // namespace widedeep::cpu
