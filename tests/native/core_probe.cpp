// The functions of csrc/core with C linkage, for tests/test_core.py.
#include "core/ftrl.h"
#include "core/hash.h"
#include "core/logistic.h"
#include "core/permute.h"
#include "core/philox.h"
#include "core/rmsprop.h"

using namespace widedeep::core;

extern "C" {
void probe_philox7(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Philox4 r = philox4x32<7>({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = r.word[i];
}
void probe_philox10(const uint32_t* counter, const uint32_t* key, uint32_t* out) {
  const Philox4 r = philox4x32<10>({{counter[0], counter[1], counter[2], counter[3]}}, key[0], key[1]);
  for (int i = 0; i < 4; ++i) out[i] = r.word[i];
}
void probe_dropout(double p, uint64_t seed, uint64_t step, uint32_t layer, int64_t first_row, int64_t rows,
                   int64_t columns, uint8_t* keep, uint8_t* keep8) {
  const Dropout d = make_dropout(p, seed, step, layer);
  for (int64_t b = 0; b < rows; ++b) {
    const uint32_t row = static_cast<uint32_t>(first_row + b);
    for (int64_t n = 0; n < columns; ++n) {
      keep[b * columns + n] = dropout_keep(d, row, static_cast<uint32_t>(n));
      keep8[b * columns + n] = dropout_keep8(d, row, static_cast<uint32_t>(n / 8)) >> (n % 8) & 1;
    }
  }
}
float probe_dropout_scale(double p) { return dropout_scale(p); }
uint64_t probe_mix64(uint64_t z) { return mix64(z); }
void probe_feistel(uint64_t n, uint64_t key, const uint64_t* i, uint64_t count, uint64_t* out, uint64_t* back) {
  const Feistel f(n, key);
  for (uint64_t k = 0; k < count; ++k) {
    out[k] = f(i[k]);
    back[k] = f.inverse(out[k]);
  }
}
void probe_epoch(uint64_t rows, uint64_t block_rows, uint64_t window_rows, uint64_t seed, uint64_t epoch,
                 uint64_t start, uint64_t count, uint64_t* out) {
  const EpochOrder order(rows, block_rows, window_rows, seed, epoch);
  for (uint64_t k = 0; k < count; ++k) out[k] = order(start + k);
}
void probe_rmsprop(float* w, float* rms, float g, float decay, float lr, float rho, float eps) {
  rmsprop(*w, *rms, g, decay, {lr, rho, eps});
}
float probe_catch_up(int64_t step, int64_t last_step, float rho) { return rmsprop_catch_up(step, last_step, rho); }
void probe_ftrl(float* w, float* accum, float* linear, float g, float lr, float l1, float l2) {
  ftrl(*w, *accum, *linear, g, {lr, l1, l2});
}
float probe_bce(float z, float y) { return bce_with_logits(z, y); }
float probe_sigmoid(float z) { return sigmoid(z); }
int64_t probe_auc_bin(float logit, int64_t bins) { return auc_bin(logit, bins); }
}
