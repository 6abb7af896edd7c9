// The launchers of csrc/kernels as plain C functions: numbers are int64_t or double, everything else an address.
// Workspaces are allocated here, exactly as large as asked for, so that a write past them faults.
#include "core/philox.h"
#include "emulator.h"
#include "kernels/batch.h"
#include "kernels/embedding.h"
#include "kernels/gemm_sm90.h"
#include "kernels/head.h"
#include "kernels/linear_elementwise.h"
#include "kernels/loss_scale.h"
#include "kernels/metrics.h"
#include "kernels/optim.h"
#include "kernels/transpose.h"

using namespace widedeep;
using namespace widedeep::kernels;

namespace {

class Workspace {
 public:
  explicit Workspace(size_t bytes) : memory_(emulator_allocate(bytes)) {}
  ~Workspace() { clean_ = emulator_release(memory_); }
  void* get() const { return memory_; }

 private:
  void* memory_;
  int clean_ = 0;
};

// The lists of the ops, each of length F; tables and rms may be null.
struct Lists {
  int64_t F;
  const int64_t *hotness, *rows, *dims, *columns, *mean;
  float **tables, **rms;
};

Features features_of(const Lists& lists) {
  Features features{};
  features.count = static_cast<int32_t>(lists.F);
  int32_t row_base = 0;
  for (int64_t f = 0; f < lists.F; ++f) {
    Feature& t = features.feature[f];
    t.table = lists.tables ? lists.tables[f] : nullptr;
    t.rms = lists.rms ? lists.rms[f] : nullptr;
    t.first_id = features.K;
    t.hotness = static_cast<int32_t>(lists.hotness[f]);
    t.row_base = row_base;
    t.rows = static_cast<int32_t>(lists.rows[f]);
    t.dim = lists.dims ? static_cast<int32_t>(lists.dims[f]) : 0;
    t.column = lists.columns ? static_cast<int32_t>(lists.columns[f]) : 0;
    t.mean = lists.mean ? static_cast<int32_t>(lists.mean[f]) : 0;
    features.K += t.hotness;
    row_base += t.rows;
  }
  return features;
}

core::FtrlRule ftrl_rule(double lr, double l1, double l2) {
  return {static_cast<float>(lr), static_cast<float>(l1), static_cast<float>(l2)};
}

}  // namespace

extern "C" {

int run_embedding_forward(const int32_t* ids, int64_t B, const Lists* lists, const float* numeric,
                          const int64_t* columns, int64_t N, const float* wide, const float* wide_numeric,
                          const float* wide_bias, void* x, int64_t type, int64_t W, float* wide_logit) {
  Numerics numerics{};
  numerics.count = static_cast<int32_t>(N);
  for (int64_t n = 0; n < N; ++n) numerics.column[n] = static_cast<int32_t>(columns[n]);
  return embedding_forward({ids, B}, features_of(*lists), numerics,
                           {numeric, wide, wide_numeric, wide_bias, x, core::DType(type), W, wide_logit}, nullptr);
}

int run_embedding_segments(const int32_t* ids, int64_t B, const Lists* lists, int64_t rows, int32_t* unique,
                           int32_t* offsets, int32_t* entries, int32_t* keys, int32_t* table_start) {
  const Features features = features_of(*lists);
  const int64_t n = B * features.K;
  const Workspace workspace(n > 0 ? segments_workspace(n, rows) : 0);
  return embedding_segments({ids, B}, features, rows, {unique, offsets, entries, keys, table_start}, workspace.get(),
                            nullptr);
}

int run_embedding_row_gradients(const int32_t* ids, int64_t B, const Lists* lists, const void* dx, int64_t type,
                                int64_t W, const float* dlogit, int32_t* unique, int32_t* offsets, int32_t* entries,
                                int32_t* keys, int32_t* table_start, float* wide) {
  const Features features = features_of(*lists);
  const Workspace workspace(backward_workspace(B * features.K, features));
  return embedding_row_gradients({ids, B}, features, {unique, offsets, entries, keys, table_start},
                                 {dx, core::DType(type), W, dlogit, nullptr}, wide, workspace.get(), nullptr);
}

int run_embedding_update(const int32_t* ids, int64_t B, const Lists* lists, const void* dx, int64_t type, int64_t W,
                         const float* dlogit, int32_t* unique, int32_t* offsets, int32_t* entries, int32_t* keys,
                         int32_t* table_start, int32_t* last_step, float* wide, float* accum, float* linear,
                         const float* lr, const int64_t* step, double rho, double eps, double wide_lr, double l1,
                         double l2, const float* grad_scale, const float* found_inf) {
  const Features features = features_of(*lists);
  const Workspace workspace(backward_workspace(B * features.K, features));
  const RowUpdate update{last_step,
                         wide,
                         accum,
                         linear,
                         lr,
                         step,
                         found_inf,
                         static_cast<float>(rho),
                         static_cast<float>(eps),
                         ftrl_rule(wide_lr, l1, l2)};
  return embedding_update({ids, B}, features, {unique, offsets, entries, keys, table_start},
                          {dx, core::DType(type), W, dlogit, grad_scale}, update, workspace.get(), nullptr);
}

int run_head_forward(const void* h, int64_t type, int64_t B, int64_t H, const float* weight, const float* bias,
                     const float* wide_logit, float* logit) {
  return head_forward({h, core::DType(type), B, H, weight, bias, wide_logit}, logit, nullptr);
}

int run_head_step(const void* h, int64_t type, int64_t B, int64_t H, const float* weight, const float* bias,
                  const float* wide_logit, const float* label, int64_t global_rows, double p, const float* loss_scale,
                  float* logit, float* dlogit, void* dz, float* dbias_hidden, float* dweight, float* dbias,
                  float* loss) {
  const Workspace workspace(head_workspace(H));
  const HeadStep out{label,   global_rows, loss_scale, core::dropout_scale(p), logit, dlogit, dz, dbias_hidden,
                     dweight, dbias,       loss};
  return head_step({h, core::DType(type), B, H, weight, bias, wide_logit}, out, workspace.get(), nullptr);
}

int run_wide_numeric_backward(const float* numeric, const float* dlogit, int64_t B, int64_t N, float* dweight,
                              float* dbias) {
  const Workspace workspace(wide_numeric_workspace(N));
  return wide_numeric_backward(numeric, dlogit, B, N, dweight, dbias, workspace.get(), nullptr);
}

int run_bias_relu_dropout(void* y, const void* bias, uint32_t* bits, int64_t M, int64_t N, int64_t type, double p,
                          int64_t seed, const int64_t* step, int64_t layer, int64_t first_row) {
  return bias_relu_dropout(y, bias, bits, M, N, core::DType(type), dropout_args(p, seed, step, layer, first_row),
                           nullptr);
}

int run_mask_and_sum(const void* in, const void* mask, const uint8_t* bits, double scale, void* out, float* dbias,
                     int64_t M, int64_t N, int64_t type) {
  const int64_t strips = mask_strips(M);
  const Workspace sums(strips * N * sizeof(float));
  auto* const partial = static_cast<float*>(sums.get());
  if (const auto error = mask_and_sum(in, {mask, bits}, static_cast<float>(scale), out, dbias ? partial : nullptr, M, N,
                                      core::DType(type), nullptr))
    return error;
  const StripSums total{partial, dbias, N};
  return dbias ? add_strips(&total, 1, strips, nullptr) : cudaSuccess;
}

// numbers: for each tensor rows, columns, grad_pitch, copy_pitch, grad_type, copy_type.
int run_rmsprop_dense(int64_t count, float** weights, float** rms, void** grads, void** copies, const int64_t* numbers,
                      const float* lr, double rho, double eps, const float* grad_scale, const float* found_inf) {
  std::vector<DenseParameter> list;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t* n = numbers + 6 * i;
    list.push_back(
        {weights[i], rms[i], grads[i], copies[i], n[0], n[1], n[2], n[3], core::DType(n[4]), core::DType(n[5])});
  }
  const DenseScalars scalars{lr, grad_scale, found_inf, static_cast<float>(rho), static_cast<float>(eps)};
  return rmsprop_dense(list.data(), static_cast<int>(count), scalars, nullptr);
}

int run_ftrl_dense(float* weight, float* accum, float* linear, const float* grad, int64_t n, double lr, double l1,
                   double l2, const float* grad_scale, const float* found_inf) {
  return ftrl_dense(weight, accum, linear, grad, n, ftrl_rule(lr, l1, l2), grad_scale, found_inf, nullptr);
}

// rms null: FTRL on weight, accum, linear; otherwise RMSprop on weight, rms, last_step.
int run_listed_rows(float* weight, float* rms, int32_t* last_step, float* accum, float* linear, const int64_t* rows,
                    int64_t n, int64_t R, int64_t D, const float* grads, const float* lr, const int64_t* step,
                    double first, double second, double third) {
  const Workspace sorted(n * 4), order(n * 4), workspace(n > 0 ? sort_rows_workspace(n, R) : 0);
  auto* const keys = static_cast<uint32_t*>(sorted.get());
  auto* const places = static_cast<int32_t*>(order.get());
  if (const auto error = sort_rows(rows, n, R, keys, places, workspace.get(), nullptr)) return error;
  const ListedRows listed{keys, places, grads, n, D, R};
  if (rms)
    return rmsprop_rows(weight, rms, last_step, listed, lr, step, static_cast<float>(first), static_cast<float>(second),
                        nullptr);
  return ftrl_rows(weight, accum, linear, listed, ftrl_rule(first, second, third), nullptr);
}

int run_rmsprop_settle(float* rms, int32_t* last_step, int64_t rows, int64_t D, const int64_t* step, double rho) {
  return rmsprop_settle(rms, last_step, rows, D, step, static_cast<float>(rho), nullptr);
}

int run_check_finite(const void* values, int64_t type, int64_t n, int64_t skip, float* found_inf) {
  const int64_t bytes = core::bytes_of(core::DType(type));
  return check_finite(static_cast<const uint8_t*>(values) + skip * bytes, core::DType(type), n, found_inf, nullptr);
}

int run_loss_scale_update(float* scale, int32_t* good_steps, int64_t* updates, const float* found_inf, double growth,
                          double backoff, int64_t interval) {
  return loss_scale_update(scale, good_steps, updates, found_inf, static_cast<float>(growth),
                           static_cast<float>(backoff), interval, nullptr);
}

int run_auc_histogram(const float* logit, const float* label, int64_t B, int64_t* positives, int64_t* negatives,
                      int64_t bins) {
  return auc_histogram(logit, label, B, positives, negatives, bins, nullptr);
}

// order null: as stored; otherwise block_rows, window_rows, seed, epoch. counts: rows, K, N, B.
int run_gather_batch(const int32_t* ids, const float* numeric, const float* label, const int64_t* group,
                     const int64_t* counts, const int64_t* order, int64_t start, int32_t* out_ids, float* out_numeric,
                     float* out_label, int64_t* out_group) {
  const StoredRows from{ids, numeric, label, group, counts[1], counts[2]};
  const BatchRows to{out_ids, out_numeric, out_label, out_group};
  if (!order) return gather_batch(from, nullptr, start, counts[3], to, nullptr);
  const core::EpochOrder epoch(counts[0], order[0], order[1], order[2], order[3]);
  return gather_batch(from, &epoch, start, counts[3], to, nullptr);
}

// sizes: rows and columns of each matrix.
int run_transpose(int64_t count, void** matrices, void** out, const int64_t* sizes, int64_t type) {
  std::vector<Transposed> list;
  for (int64_t i = 0; i < count; ++i) list.push_back({matrices[i], out[i], sizes[2 * i], sizes[2 * i + 1]});
  return transpose(list.data(), static_cast<int>(count), core::bytes_of(core::DType(type)), nullptr);
}

int64_t run_mask_bytes(int64_t M, int64_t N) { return sm90_mask_bytes(M, N); }

// Lists of the chain's layers; widths: K, then each layer's N; masks and dbias may hold nulls.
int run_linear_forward_sm90(const void* x, int64_t count, void** weights, void** biases, double p, int64_t seed,
                            const int64_t* step, int64_t layer, int64_t first_row, void** y, void** masks, int64_t M,
                            const int64_t* widths, int64_t type, int64_t rounds_ahead) {
  std::vector<ForwardSm90> links;
  for (int64_t i = 0; i < count; ++i) links.push_back({widths[i + 1], weights[i], biases[i], y[i], masks[i]});
  const Workspace workspace(sm90_workspace(M, static_cast<int>(count)));
  return linear_forward_sm90(x, M, widths[0], core::DType(type), links.data(), static_cast<int>(count),
                             dropout_args(p, seed, step, layer, first_row), static_cast<int>(rounds_ahead),
                             workspace.get(), nullptr);
}

int run_linear_dgrad_sm90(const void* dz, int64_t count, void** weights_t, void** masks, double scale, void** dx,
                          float** dbias, float* found_inf, int64_t M, const int64_t* widths, int64_t type,
                          int64_t rounds_ahead) {
  const int64_t strips = sm90_strips(M);
  std::deque<Workspace> sums;
  std::vector<GradientSm90> links;
  std::vector<StripSums> totals;
  for (int64_t i = 0; i < count; ++i) {
    const int64_t N = widths[i + 1];
    auto* const partial = dbias[i] ? static_cast<float*>(sums.emplace_back(strips * N * sizeof(float)).get()) : nullptr;
    links.push_back({N, weights_t[i], masks[i], dx[i], partial});
    if (dbias[i]) totals.push_back({partial, dbias[i], N});
  }
  const Workspace workspace(sm90_workspace(M, static_cast<int>(count)));
  if (const auto error = linear_dgrad_sm90(dz, M, widths[0], core::DType(type), links.data(), static_cast<int>(count),
                                           static_cast<float>(scale), found_inf, static_cast<int>(rounds_ahead),
                                           workspace.get(), nullptr))
    return error;
  return add_strips(totals.data(), static_cast<int>(totals.size()), strips, nullptr);
}
}
