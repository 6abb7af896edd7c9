// Every op, once. Mutated arguments are marked (a!), so that torch knows what an op writes. Letters as in
// docs/architecture.md; contracts (shapes, dtypes, formulas) stand in widedeep/ops/*.py and in csrc/kernels/*.h.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(widedeep, m) {
  // Embedding: all tables, the numeric columns and the wide logit in one pass over the batch.
  m.def(
      "embedding_forward(Tensor ids, Tensor numeric, Tensor[] tables, Tensor wide, Tensor wide_numeric, Tensor "
      "wide_bias,"
      " int[] hotness, int[] mean, int[] columns, int[] numeric_columns, int width, ScalarType dtype, bool sparse)"
      " -> (Tensor, Tensor)");
  m.def(
      "embedding_forward_out(Tensor ids, Tensor numeric, Tensor[] tables, Tensor wide, Tensor wide_numeric,"
      " Tensor wide_bias, int[] hotness, int[] mean, int[] columns, int[] numeric_columns, *, Tensor(a!) x,"
      " Tensor(b!) wide_logit) -> ()");

  // Segments: the batch's (table, id) pairs sorted to distinct rows; fixed output sizes, no host synchronisation.
  m.def(
      "embedding_segments(Tensor ids, int[] hotness, int[] rows) -> (Tensor unique, Tensor offsets, Tensor entries,"
      " Tensor keys, Tensor table_start)");
  m.def(
      "embedding_row_gradients(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets, Tensor entries,"
      " Tensor keys, Tensor table_start, int[] hotness, int[] mean, int[] columns, int[] rows, int[] dims)"
      " -> (Tensor[], Tensor)");
  m.def(
      "embedding_update_(Tensor ids, Tensor dx, Tensor dlogit, Tensor unique, Tensor offsets, Tensor entries,"
      " Tensor keys, Tensor table_start, Tensor(a!)[] tables, Tensor(b!)[] rms, Tensor(c!) last_step, Tensor(d!) wide,"
      " Tensor(e!) accum, Tensor(f!) linear, int[] hotness, int[] mean, int[] columns, Tensor lr, Tensor step,"
      " float rho, float eps, float wide_lr, float l1, float l2, Tensor? grad_scale, Tensor? found_inf) -> ()");

  // Optimizers: dense (one launch for all tensors) and on listed rows (duplicates summed first).
  m.def(
      "rmsprop_dense_(Tensor(a!)[] weights, Tensor(b!)[] rms, Tensor[] grads, Tensor(c!)[] copies, Tensor lr, float "
      "rho,"
      " float eps, Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "rmsprop_rows_(Tensor(a!) weight, Tensor(b!) rms, Tensor(c!) last_step, Tensor rows, Tensor grads, Tensor lr,"
      " Tensor step, float rho, float eps) -> ()");
  m.def("rmsprop_settle_(Tensor(a!) rms, Tensor(b!) last_step, Tensor step, float rho) -> ()");
  m.def(
      "ftrl_dense_(Tensor(a!) weight, Tensor(b!) accum, Tensor(c!) linear, Tensor grad, float lr, float l1, float l2,"
      " Tensor? grad_scale, Tensor? found_inf) -> ()");
  m.def(
      "ftrl_rows_(Tensor(a!) weight, Tensor(b!) accum, Tensor(c!) linear, Tensor rows, Tensor grads, float lr, float "
      "l1,"
      " float l2) -> ()");

  // One hidden layer: y = dropout(relu(x weight^T + bias)), and its two gradients.
  m.def(
      "linear_relu_dropout(Tensor x, Tensor weight, Tensor bias, float p, int seed, Tensor step, int layer, int "
      "first_row)"
      " -> Tensor");
  m.def(
      "linear_relu_dropout_backward(Tensor dy, Tensor y, Tensor x, Tensor weight, float p) -> (Tensor dx, Tensor "
      "dweight,"
      " Tensor dbias)");
  m.def(
      "linear_relu_dropout_out(Tensor x, Tensor weight, Tensor bias, float p, int seed, Tensor step, int layer,"
      " int first_row, *, Tensor(a!) y, Tensor(b!)? bits) -> ()");
  m.def(
      "linear_dgrad_out(Tensor dz, Tensor weight, Tensor? mask, float p, *, Tensor(a!) dx, Tensor(b!)? dbias,"
      " Tensor? bits) -> ()");
  m.def("linear_wgrad_out(Tensor dz, Tensor x, *, Tensor(a!) dweight) -> ()");
  m.def("transpose_out(Tensor[] matrices, *, Tensor(a!)[] out) -> ()");

  // The same layers on Hopper GPUs, everything fused into the product, a chain of them in one launch. masks: a bit for
  // each element, whether dropout keeps it and it is positive.
  m.def(
      "linear_sm90_out(Tensor x, Tensor[] weights, Tensor[] biases, float p, int seed, Tensor step, int layer,"
      " int first_row, int rounds_ahead, *, Tensor(a!)[] y, Tensor(b!)[] masks) -> ()");
  m.def(
      "linear_sm90_dgrad_out(Tensor dz, Tensor[] weights_t, Tensor[] masks, float p, int rounds_ahead,"
      " *, Tensor(a!)[] dx, Tensor(b!)[] dbias, Tensor(c!)? found_inf) -> ()");
  m.def("allow_tf32_(Tensor like, bool allow) -> ()");

  // Head: output layer, loss and its gradient in one pass over the last activation.
  m.def("head_forward(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit) -> Tensor");
  m.def("head_forward_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, *, Tensor(a!) logit) -> ()");
  m.def(
      "head_step_out(Tensor h, Tensor weight, Tensor bias, Tensor wide_logit, Tensor label, int global_rows, float p,"
      " Tensor? loss_scale, *, Tensor(a!) logit, Tensor(b!) dlogit, Tensor(c!) dz, Tensor(d!) dbias_hidden,"
      " Tensor(e!) dweight, Tensor(f!) dbias, Tensor(g!) loss) -> ()");
  m.def("wide_numeric_backward_out(Tensor numeric, Tensor dlogit, *, Tensor(a!) dweight, Tensor(b!) dbias) -> ()");

  // Dynamic loss scale, on the device: a non-finite gradient turns every update of the step into a no-op.
  m.def("check_finite_(Tensor[] tensors, Tensor(a!) found_inf) -> ()");
  m.def(
      "loss_scale_update_(Tensor(a!) scale, Tensor(b!) good_steps, Tensor(c!) updates, Tensor found_inf, float growth,"
      " float backoff, int interval) -> ()");

  // Metrics.
  m.def("auc_histogram_(Tensor logit, Tensor label, Tensor(a!) positives, Tensor(b!) negatives) -> ()");

  // One batch of a data set in memory, in an epoch's order: block_rows, window_rows, seed, epoch; empty: as stored.
  m.def(
      "gather_batch_out(Tensor ids, Tensor numeric, Tensor label, Tensor? group, int[] order, int start, *,"
      " Tensor(a!) out_ids, Tensor(b!) out_numeric, Tensor(c!) out_label, Tensor(d!)? out_group) -> ()");
}
