"""The job in JAX: one jitted function per step (XLA), dense gradients, weights donated."""

import jax
import jax.numpy as jnp
import numpy as np
import torch

from bench.job import Contender, Job
from widedeep.data import Batch
from widedeep.errors import InputError

COMPUTE = {"fp32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16}


class JaxContender(Contender):
    """On JAX's first device. Products in fp32, tf32 or bf16; weights and sums float32."""

    def __init__(self, job: Job):
        if job.precision not in COMPUTE:
            raise InputError(
                f"jax: expected one of {', '.join(COMPUTE)}, got {job.precision}: the bench scales no loss for it"
            )
        self.name, self.version = "jax", f"jax {jax.__version__} on {jax.devices()[0].platform}"
        if jax.devices()[0].platform != ("gpu" if job.device.type == "cuda" else "cpu"):
            raise InputError(f"jax: this installation runs on {jax.devices()[0].platform}, the bench on {job.device}")
        jax.config.update("jax_default_matmul_precision", "highest" if job.precision == "fp32" else "default")
        self.job = job
        self.params = self._weights()
        deep = jax.tree.map(jnp.zeros_like, self.params["deep"])
        wide = [
            jax.tree.map(lambda w, v=v: jnp.full_like(w, v), self.params["wide"])
            for v in (job.initial_accumulator, 0.0)
        ]
        self.slots = {"rms": deep, "accum": wide[0], "linear": wide[1]}
        self.key = jax.random.key(0)
        self._train = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._predict = jax.jit(lambda params, ids, numeric: self._logits(params, ids, numeric, None))

    def train(self, batch: Batch, step: int) -> None:
        key = jax.random.fold_in(self.key, step)
        self.params, self.slots, self.loss = self._train(self.params, self.slots, key, *self._arrays(batch))

    def predict(self, batch: Batch) -> jax.Array:
        return self._predict(self.params, *self._arrays(batch)[:2])

    def logits(self, batch: Batch) -> np.ndarray:
        return np.asarray(self.predict(batch), np.float32)

    def synchronize(self) -> None:
        jax.block_until_ready(self.params)

    def _arrays(self, batch: Batch) -> list[jax.Array]:
        tensors = (batch.ids, batch.numeric, batch.label)
        if self.job.device.type == "cuda":
            torch.cuda.current_stream().synchronize()  # JAX reads on a stream of its own
            return [jax.dlpack.from_dlpack(t.contiguous()) for t in tensors]
        return [jnp.asarray(t.numpy()) for t in tensors]

    def _weights(self) -> dict:
        spec = self.job.spec
        arrays = {name: jnp.asarray(a.cpu().numpy()) for name, a in self.job.arrays.items()}
        names = [f"deep.layer.{i}" for i in range(len(self.job.hidden))] + ["deep.out"]
        return {
            "deep": {
                "tables": [arrays[f"deep.table.{f.name}"] for f in spec.categorical],
                "layers": [(arrays[f"{name}.weight"].T, arrays[f"{name}.bias"]) for name in names],
            },
            "wide": {
                "table": jnp.concatenate([arrays[f"wide.table.{f.name}"] for f in spec.categorical]),
                "numeric": arrays["wide.numeric.weight"],
                "bias": arrays["wide.bias"],
            },
        }

    def _logits(self, params: dict, ids: jax.Array, numeric: jax.Array, key: jax.Array | None) -> jax.Array:
        spec, dtype = self.job.spec, COMPUTE[self.job.precision]
        deep, wide = params["deep"], params["wide"]
        columns = {at: deep["tables"][i][ids[:, i]] for i, at in enumerate(spec.table_columns)}
        columns |= {at: numeric[:, i : i + 1] for i, at in enumerate(spec.numeric_columns)}
        x = jnp.concatenate([columns[at].astype(dtype) for at in sorted(columns)], axis=1)
        keep = 1 - self.job.dropout
        for i, (weight, bias) in enumerate(deep["layers"][:-1]):
            x = jax.nn.relu(x @ weight.astype(dtype) + bias.astype(dtype))
            if key is not None and self.job.dropout > 0:
                x = jnp.where(jax.random.bernoulli(jax.random.fold_in(key, i), keep, x.shape), x / keep, 0)
        weight, bias = deep["layers"][-1]
        logit = (x @ weight.astype(dtype) + bias.astype(dtype))[:, 0].astype(jnp.float32)
        rows = ids + jnp.asarray(spec.row_base, jnp.int32)
        return logit + wide["table"][rows].sum(1) + numeric @ wide["numeric"] + wide["bias"]

    def _train_step(self, params, slots, key, ids, numeric, label):
        job = self.job

        def loss_of(params):
            z = self._logits(params, ids, numeric, key)
            return (jnp.maximum(z, 0) - z * label + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()

        loss, grads = jax.value_and_grad(loss_of)(params)
        rms = jax.tree.map(lambda r, g: job.rho * r + (1 - job.rho) * g * g, slots["rms"], grads["deep"])
        deep = jax.tree.map(
            lambda w, g, r: w - job.lr * g / (jnp.sqrt(r) + job.eps), params["deep"], grads["deep"], rms
        )
        accum = jax.tree.map(lambda n, g: n + g * g, slots["accum"], grads["wide"])
        linear = jax.tree.map(
            lambda z, g, n, m, w: z + g - (jnp.sqrt(m) - jnp.sqrt(n)) / job.wide_lr * w,
            slots["linear"], grads["wide"], slots["accum"], accum, params["wide"],
        )  # fmt: skip
        wide = jax.tree.map(lambda z, m: -z * job.wide_lr / jnp.sqrt(m), linear, accum)
        return {"deep": deep, "wide": wide}, {"rms": rms, "accum": accum, "linear": linear}, loss
