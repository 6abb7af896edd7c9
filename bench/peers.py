"""The contenders by name, and which of them can run here."""

from collections.abc import Callable
from importlib.util import find_spec

from bench.job import Contender, Job
from widedeep.errors import InputError


def _torch(name: str, **options) -> Callable[[Job], Contender]:
    def make(job: Job) -> Contender:
        from bench.peer_torch import TorchContender

        return TorchContender(name, job, **options)

    return make


def _own_loop(job: Job) -> Contender:
    from bench.peer_torch import OwnLoopContender

    return OwnLoopContender("own-loop", job)


def _tensorflow(job: Job) -> Contender:
    from bench.peer_tensorflow import TensorFlowContender

    return TensorFlowContender(job)


def _jax(job: Job) -> Contender:
    from bench.peer_jax import JaxContender

    return JaxContender(job)


# name: (modules it needs, how to make it)
PEERS: dict[str, tuple[tuple[str, ...], Callable[[Job], Contender]]] = {
    "torch": ((), _torch("torch", sparse=False)),
    "torch-sparse": ((), _torch("torch-sparse", sparse=True)),
    "torch-compile": ((), _torch("torch-compile", sparse=True, compile="default")),
    "torch-compile-dense": ((), _torch("torch-compile-dense", sparse=False, compile="default")),
    "torch-reduce-overhead": ((), _torch("torch-reduce-overhead", sparse=True, compile="reduce-overhead")),
    "torch-reduce-overhead-dense": (
        (),
        _torch("torch-reduce-overhead-dense", sparse=False, compile="reduce-overhead"),
    ),
    "own-loop": ((), _own_loop),
    "tensorflow": (("tensorflow", "tf_keras"), _tensorflow),
    "jax": (("jax",), _jax),
}
DEFAULT = {
    "cpu": ("torch", "torch-sparse", "torch-compile", "own-loop", "tensorflow"),
    "cuda": tuple(name for name in PEERS if name != "tensorflow"),
}


def chosen(names: str, device: str) -> tuple[list[str], dict[str, str]]:
    """Peers to run, and those left out with the reason.

    Args:
        names: "all" (of the device's defaults: the rest are left out), "none", or names separated by commas.
    Raises:
        InputError: an unknown name.
    """
    wanted = {"all": tuple(PEERS), "none": ()}.get(names, tuple(names.split(",")))
    if unknown := [name for name in wanted if name not in PEERS]:
        raise InputError(f"peers: expected all, none or names among {', '.join(PEERS)}, got {', '.join(unknown)}")
    missing = {name: [m for m in PEERS[name][0] if find_spec(m) is None] for name in wanted}
    skipped = {name: f"{', '.join(modules)} is not installed" for name, modules in missing.items() if modules}
    if names == "all":
        left = f"not one of the default peers on {device}: --peers {{}} measures it"
        skipped |= {name: left.format(name) for name in PEERS if name not in DEFAULT[device]}
    return [name for name in wanted if name not in skipped], skipped


def make(name: str, job: Job) -> Contender:
    return PEERS[name][1](job)
