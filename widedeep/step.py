"""One training step: forward, loss, backward and every update, as one object with two implementations.

`reference` is plain torch through autograd; `fused` is our own ops. Both read and write the model's own parameters, so
either can follow the other on a model, and both give the same result to float tolerance, with the same dropout masks.
"""

import logging
from typing import get_args

import torch

from widedeep.config import StepKind
from widedeep.devices import exact_device
from widedeep.dist import LocalComm
from widedeep.errors import InputError
from widedeep.model import WideDeep
from widedeep.steps import limits
from widedeep.steps.base import GEMMS, PRECISIONS, Step, StepConfig

__all__ = ["GEMMS", "PRECISIONS", "Step", "StepConfig", "make_step"]

log = logging.getLogger(__name__)


def make_step(
    kind: str,
    model: WideDeep,
    config: StepConfig | None = None,
    device: torch.device | str | None = None,
    comm: LocalComm | None = None,
) -> Step:
    """A step for `model`, which is moved to `device` (None: it stays where it is). It trains every weight.

    Args:
        kind: "reference" (plain torch), "fused" (our ops), or "auto": fused where there is one for device and model.
        comm: the other processes; None for none.
    Raises:
        InputError: the kind or precision is unknown, or not there on this device; the model is too large for "fused" on
            a GPU; it holds a share of its tables, and `comm` is not of as many processes, or the step "reference"; some
            of its weights are frozen (ask for no gradient); it is not a WideDeep as one is made: a step computes what
            that does, and knows no parameters of a subclass, of other layers, of a parametrization, nor shared ones.
    """
    config = config or StepConfig()
    _check_model(model)
    device = exact_device(device) if device else next(model.parameters()).device
    comm = comm or LocalComm(device)
    if (shared_out := model.share.world > 1) and model.share != (comm.rank, comm.world):
        raise InputError(f"step: expected share {(comm.rank, comm.world)} of the tables, got {tuple(model.share)}")
    if config.precision not in PRECISIONS:
        raise InputError(f"precision: expected one of {', '.join(PRECISIONS)}, got {config.precision!r}")
    if len({p.requires_grad for p in model.parameters() if p.numel()}) > 1:  # one that only predicts may freeze all
        raise InputError("step: expected a model without frozen weights, for a step trains all, got some")
    model.to(device)
    if device.type == "cpu" and config.precision == "tf32":
        raise InputError("precision: expected fp32 or bf16 on a CPU, which has no tf32")
    if kind not in get_args(StepKind):
        raise InputError(f"step: expected one of {', '.join(get_args(StepKind))}, got {kind!r}")
    if config.gemm not in GEMMS:
        raise InputError(f"gemm: expected one of {', '.join(GEMMS)}, got {config.gemm!r}")
    if kind == "auto":
        kind = "fused" if shared_out else _automatic(model, device, comm)
    if kind == "reference":
        if shared_out:
            raise InputError("step: expected auto or fused where tables are shared out, got 'reference'")
        from widedeep import _load
        from widedeep.steps.reference import ReferenceStep

        if device.type == "cpu" and config.precision == "bf16" and comm.rank == 0 and not _load.cpu_multiplies_bf16():
            log.warning(
                "this CPU has no bf16 instructions (AVX512-BF16, AMX): torch emulates them, many times slower than "
                "fp32; the fused step does not"
            )
        return ReferenceStep(model, config, device, comm)
    if device.type == "cpu":
        from widedeep.steps.fused import FusedStep
        from widedeep.steps.sharded import ShardedFusedStep

        return (ShardedFusedStep if shared_out else FusedStep)(model, config, device, comm)
    if not _has_cuda_step(device):
        raise InputError(f"step: expected auto or reference on {device.type}, for which no fused step was built")
    from widedeep.steps.cuda import CudaStep
    from widedeep.steps.cuda_ranks import RanksCudaStep
    from widedeep.steps.sharded import ShardedCudaStep

    if shared_out:
        return ShardedCudaStep(model, config, device, comm)
    return (CudaStep if comm.world == 1 else RanksCudaStep)(model, config, device, comm)


def _check_model(model: WideDeep) -> None:
    """Raises InputError where a step, which reads the weights itself, would train another model than this one."""
    if not isinstance(model, WideDeep):
        raise InputError(f"step: expected a WideDeep, got {type(model).__name__}")
    if any(getattr(type(model), name) is not getattr(WideDeep, name) for name in ("forward", "parts")):
        kind = type(model).__name__
        raise InputError(f"step: expected the forward pass of WideDeep, for a step runs no other, got {kind}'s")
    if got := model.difference():
        raise InputError(
            f"step: expected the parameters that the model was made with, for a step trains no others, got {got}"
        )
    for name, p in model.named_parameters():
        if type(p.data) is not torch.Tensor:  # a DTensor, say, of fully_shard
            raise InputError(f"step: expected whole weights, got a {type(p.data).__name__} for {name}")
    try:
        model.check_modules()
    except (TypeError, ValueError) as error:
        raise InputError(f"step: {error}") from error


def _automatic(model: WideDeep, device: torch.device, comm: LocalComm) -> str:
    if device.type == "cpu":
        return "fused"
    if not _has_cuda_step(device):
        return "reference"
    problem = limits.excess(model)
    if problem and comm.rank == 0:
        log.warning("%s: the reference step takes this model", problem)
    return "reference" if problem else "fused"


def _has_cuda_step(device: torch.device) -> bool:
    """Whether the kernels are loaded, and were built with the library that multiplies matrices."""
    from widedeep import _load

    return device.type == "cuda" and _load.has_cuda_kernels and _load.build_info()["cublaslt"]


def faster_than_fp32(device: torch.device) -> str | None:
    """What makes products on the device take less time than in fp32, in words; None: nothing does."""
    from widedeep import _load

    if device.type == "cuda":
        return "--amp (fp16) or --precision tf32 takes less time on a GPU"
    return (
        "--precision bf16 takes less time on this CPU, which multiplies bfloat16"
        if _load.cpu_multiplies_bf16()
        else None
    )
