// Dropout as a launch takes it: the step's number is known on the device alone.
#pragma once
#include <cstdint>

#include "core/philox.h"

namespace widedeep::kernels {

// The dropout of one layer: threshold and scale as in core/philox.h; *step is read on the device. threshold 0: no
// dropout, and step is not read.
struct DropoutArgs {
  uint32_t threshold;
  float scale;
  uint64_t seed;
  const int64_t* step;
  uint32_t layer;
  uint32_t first_row;
};

// p, seed, layer and first_row as core::make_dropout takes them, and core::dropout_counter.
inline DropoutArgs dropout_args(double p, int64_t seed, const int64_t* step, int64_t layer, int64_t first_row) {
  return {core::dropout_threshold(p),   core::dropout_scale(p),          static_cast<uint64_t>(seed), step,
          static_cast<uint32_t>(layer), static_cast<uint32_t>(first_row)};
}

// Of the layer `above` of args.layer, in the step of that number.
WD_HOST_DEVICE inline core::Dropout dropout_of(const DropoutArgs& args, uint64_t step, uint32_t above) {
  return core::make_dropout(args.threshold, args.scale, args.seed, step, args.layer + above);
}

}  // namespace widedeep::kernels
