"""The job in TensorFlow with the original's Keras: one tf.function per step, its RMSprop and FTRL, sparse gradients."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import numpy as np
import tensorflow as tf
import tf_keras as keras
import torch

from bench.job import Contender, Job
from widedeep.data import Batch
from widedeep.errors import InputError


class TensorFlowContender(Contender):
    """On a CPU; float32, or Keras' mixed bfloat16."""

    def __init__(self, job: Job):
        if job.device.type != "cpu" or job.precision not in ("fp32", "bf16"):
            raise InputError(f"tensorflow: expected fp32 or bf16 on a CPU, got {job.precision} on {job.device}")
        threads = torch.get_num_threads()
        tf.config.threading.set_intra_op_parallelism_threads(threads)
        tf.config.threading.set_inter_op_parallelism_threads(threads)
        keras.mixed_precision.set_global_policy("mixed_bfloat16" if job.precision == "bf16" else "float32")
        self.name, self.version = "tensorflow", f"tensorflow {tf.__version__}, tf_keras {keras.__version__}"
        self.job = job
        self._build()
        # The classes that the original's TensorFlow 2.3 had.
        self.deep_optimizer = keras.optimizers.legacy.RMSprop(learning_rate=job.lr, rho=job.rho, epsilon=job.eps)
        self.wide_optimizer = keras.optimizers.legacy.Ftrl(
            learning_rate=job.wide_lr, initial_accumulator_value=job.initial_accumulator
        )
        self._train, self._predict = tf.function(self._train_step), tf.function(self._logits)

    def train(self, batch: Batch, step: int) -> None:
        self._train(batch.ids.numpy(), batch.numeric.numpy(), batch.label.numpy())

    def predict(self, batch: Batch) -> tf.Tensor:
        return self._predict(batch.ids.numpy(), batch.numeric.numpy())

    def logits(self, batch: Batch) -> np.ndarray:
        return self.predict(batch).numpy()

    def synchronize(self) -> None:
        pass  # eager calls of a tf.function on a CPU return when it is done

    def _build(self) -> None:
        spec = self.job.spec
        arrays = {name: a.numpy() for name, a in self.job.arrays.items()}
        wide = np.concatenate([arrays[f"wide.table.{f.name}"] for f in spec.categorical])
        self.tables = [tf.Variable(arrays[f"deep.table.{f.name}"]) for f in spec.categorical]
        self.wide = tf.Variable(wide[:, None])
        self.row_base = tf.constant(np.asarray(spec.row_base, np.int32))
        self.layers, inputs = [], spec.deep_width
        names = [f"deep.layer.{i}" for i in range(len(self.job.hidden))] + ["deep.out"]
        for name, units in zip(names, (*self.job.hidden, 1)):
            layer = keras.layers.Dense(units, activation="relu" if name != "deep.out" else None)
            layer.build((None, inputs))
            layer.set_weights([arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]])
            self.layers.append(layer)
            inputs = units
        self.wide_numeric = keras.layers.Dense(1, dtype="float32")
        self.wide_numeric.build((None, len(spec.numeric)))
        self.wide_numeric.set_weights([arrays["wide.numeric.weight"][:, None], arrays["wide.bias"]])
        self.dropout = keras.layers.Dropout(self.job.dropout)

    def _logits(self, ids: tf.Tensor, numeric: tf.Tensor, training: bool = False) -> tf.Tensor:
        spec = self.job.spec
        features = {f"{f.name}_embedding": i for i, f in enumerate(spec.categorical)}
        numerics = {f.name: i for i, f in enumerate(spec.numeric)}
        parts = []
        for c in spec.deep_columns:
            if c.kind == "table":
                i = features[c.name]
                parts.append(tf.nn.embedding_lookup(self.tables[i], ids[:, i]))
            else:
                i = numerics[c.name]
                parts.append(numeric[:, i : i + 1])
        x = tf.concat(parts, axis=1)
        for layer in self.layers[:-1]:
            x = self.dropout(layer(x), training=training)
        wide = tf.reduce_sum(tf.nn.embedding_lookup(self.wide, ids + self.row_base), axis=[1, 2])
        deep = tf.cast(self.layers[-1](x), tf.float32)
        return wide + tf.squeeze(self.wide_numeric(numeric), 1) + tf.squeeze(deep, 1)

    def _train_step(self, ids: tf.Tensor, numeric: tf.Tensor, label: tf.Tensor) -> tf.Tensor:
        deep = self.tables + [w for layer in self.layers for w in layer.trainable_weights]
        wide = [self.wide, *self.wide_numeric.trainable_weights]
        with tf.GradientTape() as tape:
            z = self._logits(ids, numeric, training=True)
            loss = tf.reduce_mean(tf.nn.sigmoid_cross_entropy_with_logits(labels=label, logits=z))
        grads = tape.gradient(loss, deep + wide)
        self.deep_optimizer.apply_gradients(zip(grads[: len(deep)], deep))
        self.wide_optimizer.apply_gradients(zip(grads[len(deep) :], wide))
        return loss
