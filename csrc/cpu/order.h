// Rows at the positions of an epoch's order, one after the other. What neighbours share is computed once: the
// permutation of their window, and where its blocks are.
#pragma once
#include <array>
#include <cstdint>

#include "core/permute.h"

namespace widedeep::cpu {

class OrderedRows {
 public:
  // Caller keeps `order`. first: the position that is asked for first.
  OrderedRows(const core::EpochOrder& order, uint64_t first) : order_(order), window_(order.window_of(first)) {}

  int64_t operator()(uint64_t position) {
    if (position - window_.first >= window_.size) window_ = order_.window_of(position);
    const uint64_t place = order_.place_of(window_, position), block = place / order_.block_rows();
    Block& known = blocks_[block % kBlocks];
    if (known.number != block) known = {block, order_.block_start(block)};
    return static_cast<int64_t>(known.start + place % order_.block_rows());
  }

 private:
  static constexpr uint64_t kBlocks = 512;  // twice what a window has as a rule

  struct Block {
    uint64_t number = ~uint64_t{0}, start = 0;
  };

  const core::EpochOrder& order_;
  core::EpochOrder::Window window_;
  std::array<Block, kBlocks> blocks_;
};

}  // namespace widedeep::cpu
