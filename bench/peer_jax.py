"""The job in JAX: one jitted function per step (XLA), dense gradients, weights donated."""

import os
from collections import deque

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # the other contenders need memory on the same GPU

import jax
import jax.numpy as jnp
import numpy as np

from bench.job import Contender, Job
from widedeep.data import Batch
from widedeep.errors import InputError

COMPUTE = {"fp32": jnp.float32, "tf32": jnp.float32, "bf16": jnp.bfloat16, "fp16": jnp.float16}
# The original's dynamic loss scale for float16.
INITIAL_SCALE, GROWTH, BACKOFF, GROWTH_INTERVAL = 2.0**15, 2.0, 0.5, 2000


class JaxContender(Contender):
    """On JAX's first device. Products in the job's precision; weights, slots, loss and gradients of weights float32. In
    fp16 the loss is scaled as the original scales it: a step with a gradient that is not finite changes the scale only.
    """

    def __init__(self, job: Job):
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
        if job.precision == "fp16":
            self.slots |= {"scale": jnp.float32(INITIAL_SCALE), "good_steps": jnp.int32(0)}
        self.last = None
        self.under_way: deque[tuple[Batch, jax.Array]] = deque()
        self.key = jax.random.key(0, impl="rbg")  # XLA's RngBitGenerator instead of threefry
        self._train = jax.jit(self._train_step, donate_argnums=(0, 1))
        self._predict = jax.jit(lambda params, ids, numeric: self._logits(params, ids, numeric, None))

    def train(self, batch: Batch, step: int) -> None:
        key = jax.random.fold_in(self.key, step)
        self.params, self.slots, self.last = self._train(self.params, self.slots, key, *self._arrays(batch))
        self._keep(batch)

    def predict(self, batch: Batch) -> jax.Array:
        self.last = self._predict(self.params, *self._arrays(batch)[:2])
        self._keep(batch)
        return self.last

    def _keep(self, batch: Batch) -> None:
        """torch would give a batch's memory to the next one while XLA still reads it. Two steps are always queued, so
        that the device does not wait for this.
        """
        self.under_way.append((batch, self.last))
        if len(self.under_way) > 2:
            jax.block_until_ready(self.under_way.popleft()[1])

    def logits(self, batch: Batch) -> np.ndarray:
        return np.asarray(self.predict(batch), np.float32)

    def synchronize(self) -> None:
        jax.block_until_ready((self.params, self.last))

    def _arrays(self, batch: Batch) -> list[jax.Array]:
        tensors = (batch.ids, batch.numeric, batch.label)
        if self.job.device.type == "cuda":  # JAX's own stream waits for torch's, as the protocol has it
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
        scale = slots.get("scale")

        def loss_of(params):
            z = self._logits(params, ids, numeric, key)
            loss = (jnp.maximum(z, 0) - z * label + jnp.log1p(jnp.exp(-jnp.abs(z)))).mean()
            return (loss if scale is None else loss * scale), loss

        grads, loss = jax.grad(loss_of, has_aux=True)(params)
        if scale is None:
            return *self._updated(params, slots, grads), loss
        grads = jax.tree.map(lambda g: g / scale, grads)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        updated = self._updated(params, slots, grads)
        params, slots = jax.tree.map(lambda new, old: jnp.where(finite, new, old), updated, (params, slots))
        grown = slots["good_steps"] + 1 >= GROWTH_INTERVAL
        factor = jnp.where(finite, jnp.where(grown, GROWTH, 1.0), BACKOFF)
        slots |= {"scale": jnp.maximum(scale * factor, 1.0)}
        slots |= {"good_steps": jnp.where(finite & ~grown, slots["good_steps"] + 1, 0)}
        return params, slots, loss

    def _updated(self, params: dict, slots: dict, grads: dict) -> tuple[dict, dict]:
        """RMSprop on the deep part, FTRL on the wide one."""
        job = self.job
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
        return {"deep": deep, "wide": wide}, slots | {"rms": rms, "accum": accum, "linear": linear}
