#include "cpu/gemm.h"

#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <new>
#include <type_traits>

#include "cpu/gemm_kernel.h"
#include "cpu/gemm_pack.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// Depth of a panel: kDepth x kColumns floats of B stay in the L1 cache while the panels of A pass.
constexpr int64_t kDepth = 256;
// Panels of A in a row block: kBlockPanels x kRows x kDepth floats stay in the L2 cache.
constexpr int64_t kBlockPanels = 16;
// Depths packed at a time: that much of B, packed once for all threads, stays in the last-level cache.
constexpr int64_t kSlab = 4 * kDepth;
// Tasks wanted of one product; more row blocks than that are not split further.
constexpr int64_t kTasks = 12;
constexpr int64_t kSlack = 8;  // floats that packing may write behind its panels
// Panels of B between two epilogues: a group of C is still in the L1 or L2 cache.
constexpr int64_t kGroupPanels = kTileColumns / kColumns;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Range {
  int64_t begin, end;
};
Range part(int64_t total, int64_t parts, int64_t i) { return {total * i / parts, total * (i + 1) / parts}; }

// Whoever is free takes the next task: a thread that another process slows down holds up the others by one task at
// most.
template <typename Body>
void for_each_task(int64_t count, const Body& body) {
  std::atomic<int64_t> next{0};
  parallel_for(0, count, 1, [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
  });
}

// gemm_scratch slots; linear.cpp has another.
enum Slot { kPanelsOfA, kPanelsOfB, kResult = 3 };

struct Problem {
  int64_t M, N, K;
  MatrixView a, b;
  float* c;  // null: every block has its own scratch
  int64_t stride;
  const Epilogue& epilogue;

  int64_t column_panels() const { return ceil_div(N, kColumns); }
};

template <int Width>
void pack(const MatrixView& m, bool contiguous, int64_t line, int64_t lines, int64_t k, int64_t depth, float* panels) {
  visit(m.type, [&](auto* t) {
    using T = std::remove_pointer_t<decltype(t)>;
    pack_panels<Width>(static_cast<const T*>(m.data), m.stride, contiguous, line, lines, k, depth, panels);
  });
}

// Multiplies one panel of B with all panels of A in the block; edge tiles go through a buffer.
void multiply_panel(int64_t depth, const float* a, int64_t rows, const float* b, int64_t columns, float* c,
                    int64_t stride, bool first) {
  for (int64_t row = 0; row < rows; row += kRows, a += depth * kRows, c += kRows * stride) {
    const int64_t count = std::min<int64_t>(kRows, rows - row);
    if (count == kRows && columns == kColumns) {
      first ? multiply_tile<false>(depth, a, b, c, stride) : multiply_tile<true>(depth, a, b, c, stride);
      continue;
    }
    alignas(64) float tile[kRows * kColumns];
    multiply_tile<false>(depth, a, b, tile, kColumns);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t j = 0; j < columns; ++j) {
        float& out = c[i * stride + j];
        out = first ? tile[i * kColumns + j] : out + tile[i * kColumns + j];
      }
  }
}

// One row block times some column panels, for the depths [slab.begin, slab.end); `packed` holds that slab of B.
void multiply_block(const Problem& p, int64_t block, Range slab, Range panels, const float* packed) {
  const Range lines = part(ceil_div(p.M, kRows), gemm_blocks(p.M), block);
  const Range rows{lines.begin * kRows, std::min(lines.end * kRows, p.M)};
  const int64_t left = panels.begin * kColumns, right = std::min(panels.end * kColumns, p.N);
  const int64_t height = rows.end - rows.begin, stride = p.c != nullptr ? p.stride : right - left;
  float* c = p.c != nullptr ? p.c + rows.begin * stride + left : gemm_scratch(kResult, height * stride);
  const int64_t chunks = std::max<int64_t>(1, ceil_div(slab.end - slab.begin, kDepth));
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range k = part(slab.end - slab.begin, chunks, chunk);
    const int64_t depth = k.end - k.begin;
    float* a = gemm_scratch(kPanelsOfA, (lines.end - lines.begin) * kRows * depth + kSlack);
    pack<kRows>(p.a, p.a.transposed, rows.begin, height, slab.begin + k.begin, depth, a);
    const float* b = packed + k.begin * p.column_panels() * kColumns;
    const bool last = slab.end == p.K && chunk + 1 == chunks;
    for (int64_t group = panels.begin; group < panels.end; group += kGroupPanels) {
      const int64_t end = std::min(group + kGroupPanels, panels.end);
      for (int64_t panel = group; panel < end; ++panel) {
        const int64_t column = panel * kColumns;
        multiply_panel(depth, a, height, b + panel * depth * kColumns, std::min<int64_t>(kColumns, p.N - column),
                       c + column - left, stride, slab.begin + k.begin == 0);
      }
      if (!last || !p.epilogue) continue;
      const int64_t column = group * kColumns, columns = std::min(end * kColumns, p.N) - column;
      p.epilogue({c + column - left, stride, rows.begin, height, column, columns, block});
    }
  }
}

// A group of column panels of a slab of B.
void pack_slab(const Problem& p, Range slab, int64_t group, float* packed) {
  const int64_t chunks = std::max<int64_t>(1, ceil_div(slab.end - slab.begin, kDepth));
  const int64_t panel = group * kGroupPanels, column = panel * kColumns;
  for (int64_t chunk = 0; chunk < chunks; ++chunk) {
    const Range k = part(slab.end - slab.begin, chunks, chunk);
    const int64_t depth = k.end - k.begin;
    pack<kColumns>(p.b, !p.b.transposed, column, std::min<int64_t>(kTileColumns, p.N - column), slab.begin + k.begin,
                   depth, packed + (k.begin * p.column_panels() + panel * depth) * kColumns);
  }
}

class Scratch {
 public:
  ~Scratch() { std::free(data_); }
  float* get(int64_t floats) {
    if (floats > size_) {
      constexpr size_t kPage = size_t{2} << 20;  // huge pages spare address translations in the innermost loop
      const size_t bytes = ceil_div(floats * sizeof(float), kPage) * kPage;
      std::free(data_);
      size_ = 0;
      data_ = static_cast<float*>(std::aligned_alloc(kPage, bytes));
      if (data_ == nullptr) throw std::bad_alloc();
#ifdef MADV_HUGEPAGE
      madvise(data_, bytes, MADV_HUGEPAGE);
#endif
      size_ = static_cast<int64_t>(bytes / sizeof(float));
    }
    return data_;
  }

 private:
  float* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

float* gemm_scratch(int slot, int64_t floats) {
  thread_local Scratch scratch[4];
  return scratch[slot].get(floats);
}

// A multiple of four when there is more than one, so that few threads get equal shares.
int64_t gemm_blocks(int64_t M) {
  const int64_t blocks = ceil_div(ceil_div(M, kRows), kBlockPanels);
  return blocks <= 1 ? blocks : ceil_div(blocks, 4) * 4;
}
const char* gemm_instructions() { return kInstructions; }

void gemm(int64_t M, int64_t N, int64_t K, MatrixView a, MatrixView b, float* c, int64_t stride,
          const Epilogue& epilogue) {
  if (M == 0 || N == 0) return;
  const int64_t slabs = std::max<int64_t>(1, ceil_div(K, kSlab));
  if (c == nullptr && slabs > 1) {  // blocks come back to their results
    c = gemm_scratch(kResult, M * N);
    stride = N;
  }
  const Problem p{M, N, K, a, b, c, stride, epilogue};
  const int64_t blocks = gemm_blocks(M), panels = p.column_panels();
  // Few row blocks: split the columns too, by whole groups, so that there is work for more threads.
  const int64_t groups = ceil_div(panels, kGroupPanels), splits = std::min(groups, ceil_div(kTasks, blocks));
  float* packed = gemm_scratch(kPanelsOfB, ceil_div(K, slabs) * panels * kColumns + kSlack);
  for (int64_t s = 0; s < slabs; ++s) {
    const Range slab = part(K, slabs, s);
    for_each_task(groups, [&](int64_t group) { pack_slab(p, slab, group, packed); });
    for_each_task(blocks * splits, [&](int64_t task) {
      const Range g = part(groups, splits, task % splits);
      multiply_block(p, task / splits, slab, {g.begin * kGroupPanels, std::min(g.end * kGroupPanels, panels)}, packed);
    });
  }
}

}  // namespace widedeep::cpu
