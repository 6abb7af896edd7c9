#include "cpu/head.h"

#include <algorithm>
#include <type_traits>
#include <vector>

#include "core/logistic.h"
#include "cpu/element.h"
#include "cpu/parallel.h"

namespace widedeep::cpu {
namespace {

// Row groups of the sums: at least 32 rows, and at most 128 groups, so that their partial sums stay small.
int64_t group_rows(int64_t B) { return std::max<int64_t>(32, (B + 127) / 128); }

// Many sums side by side, so that the compiler may use vectors without reordering anything.
float dot(const float* __restrict__ a, const float* __restrict__ b, int64_t n) {
  constexpr int64_t kLanes = 32;
  float lane[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int64_t j = 0; j < kLanes; ++j) lane[j] += a[i + j] * b[i + j];
  for (; i < n; ++i) lane[0] += a[i] * b[i];
  for (int64_t width = kLanes / 2; width > 0; width /= 2)
    for (int64_t j = 0; j < width; ++j) lane[j] += lane[j + width];
  return lane[0];
}

// Row b as floats: where it lies, or converted into `buffer`.
template <typename T>
const float* row_of(const HeadInputs& in, int64_t b, float* buffer) {
  const T* row = static_cast<const T*>(in.h) + b * in.H;
  if constexpr (std::is_same_v<T, float>) {
    return row;
  } else {
    load_row(row, buffer, in.H);
    return buffer;
  }
}

// dz of a row, and its share of the three sums. dz may lie where h does.
template <typename T>
void backward_row(const float* h, const float* __restrict__ weight, float dlogit, float kept_scale, T* dz,
                  float* __restrict__ buffer, float* __restrict__ dweight, float* __restrict__ dbias_hidden,
                  int64_t H) {
  const float scaled = dlogit * kept_scale;
  for (int64_t i = 0; i < H; ++i) {
    const float kept = h[i] > 0.0f ? scaled : 0.0f;  // a choice of constants, so that the loop vectorises
    const float gradient = kept * weight[i];
    buffer[i] = gradient;
    dbias_hidden[i] += gradient;
    dweight[i] += dlogit * h[i];
  }
  store_row(buffer, dz, H);
}

template <typename T>
void step(const HeadInputs& in, const HeadStep& out) {
  const int64_t rows = group_rows(in.B), groups = (in.B + rows - 1) / rows, H = in.H;
  std::vector<float> partial(groups * 2 * H, 0.0f);
  std::vector<double> loss(groups, 0.0), dbias(groups, 0.0);
  const float per_row = 1.0f / static_cast<float>(out.global_rows);

  parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    std::vector<float> converted(H), gradient(H);
    for (int64_t group = first; group < last; ++group) {
      float* dweight = partial.data() + group * 2 * H;
      for (int64_t b = group * rows; b < std::min(in.B, (group + 1) * rows); ++b) {
        const float* h = row_of<T>(in, b, converted.data());
        const float z = dot(h, in.weight, H) + in.bias + in.wide_logit[b], y = out.label[b];
        const float dlogit = (core::sigmoid(z) - y) * per_row * out.scale;
        out.logit[b] = z;
        out.dlogit[b] = dlogit;
        loss[group] += core::bce_with_logits(z, y);
        dbias[group] += dlogit;
        backward_row(h, in.weight, dlogit, out.kept_scale, static_cast<T*>(out.dz) + b * H, gradient.data(), dweight,
                     dweight + H, H);
      }
    }
  });

  parallel_for(0, H, 256, [&](int64_t first, int64_t last) {
    std::fill(out.dweight + first, out.dweight + last, 0.0f);
    std::fill(out.dbias_hidden + first, out.dbias_hidden + last, 0.0f);
    for (int64_t group = 0; group < groups; ++group) {
      const float* dweight = partial.data() + group * 2 * H;
      for (int64_t i = first; i < last; ++i) {
        out.dweight[i] += dweight[i];
        out.dbias_hidden[i] += dweight[H + i];
      }
    }
  });
  double total = 0.0, total_dbias = 0.0;
  for (int64_t group = 0; group < groups; ++group) {
    total += loss[group];
    total_dbias += dbias[group];
  }
  *out.loss = static_cast<float>(total / static_cast<double>(out.global_rows));
  *out.dbias = static_cast<float>(total_dbias);
}

}  // namespace

void head_forward(const HeadInputs& in, float* logit) {
  visit(in.type, [&](auto* tag) {
    using T = std::remove_pointer_t<decltype(tag)>;
    parallel_for(0, in.B, 64, [&](int64_t first, int64_t last) {
      std::vector<float> converted(in.H);
      for (int64_t b = first; b < last; ++b)
        logit[b] = dot(row_of<T>(in, b, converted.data()), in.weight, in.H) + in.bias + in.wide_logit[b];
    });
  });
}

void head_step(const HeadInputs& in, const HeadStep& out) {
  visit(in.type, [&](auto* tag) { step<std::remove_pointer_t<decltype(tag)>>(in, out); });
}

void wide_numeric_backward(const float* numeric, const float* dlogit, int64_t B, int64_t N, float* dweight,
                           float* dbias) {
  const int64_t rows = group_rows(B), groups = (B + rows - 1) / rows, columns = N + 1;
  std::vector<float> partial(groups * columns, 0.0f);
  parallel_for(0, groups, 1, [&](int64_t first, int64_t last) {
    for (int64_t group = first; group < last; ++group) {
      float* sums = partial.data() + group * columns;
      for (int64_t b = group * rows; b < std::min(B, (group + 1) * rows); ++b) {
        for (int64_t n = 0; n < N; ++n) sums[n] += dlogit[b] * numeric[b * N + n];
        sums[N] += dlogit[b];
      }
    }
  });
  std::fill_n(dweight, N, 0.0f);
  *dbias = 0.0f;
  for (int64_t group = 0; group < groups; ++group) {
    const float* sums = partial.data() + group * columns;
    for (int64_t n = 0; n < N; ++n) dweight[n] += sums[n];
    *dbias += sums[N];
  }
}

}  // namespace widedeep::cpu
