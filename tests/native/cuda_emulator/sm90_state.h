// What the instructions of kernels/sm90.cuh work on: mbarriers, copies on their way, and products that were issued.
#pragma once
#include "cuda.h"
#include "products.h"

namespace emulator::sm90 {

// mbarriers, by their addresses in shared memory. Without a block: that of the running thread.
void barrier_init(uint32_t barrier, uint32_t arrivals);
void barrier_expect(uint32_t barrier, uint32_t bytes);  // and arrives
void barrier_arrive(const Block& block, uint32_t barrier);
void barrier_wait(uint32_t barrier, uint32_t parity);
void fence_barriers();

// A box of a matrix, into the shared memory of each of the cluster's blocks whose bit is set.
void copy_box(uint32_t target, const CUtensorMap& map, int32_t k, int32_t row, uint32_t barrier, uint16_t blocks);

// Products of the running thread.
void products_fence();
void products_add(const Product& product);
void products_commit();
void products_wait(size_t left);  // at most so many groups are still to be taken
void products_settle();

}  // namespace emulator::sm90
