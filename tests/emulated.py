"""The CUDA kernels of csrc/kernels on a machine without a GPU: translated to C++, compiled with checks, run as fibers.

What stands for the hardware is tests/native/cuda_emulator. The functions here have the names and arguments of the ops
(`widedeep/ops/`). Every array travels through memory of its own, in which each load and store is checked to the byte:
those beside an array, misaligned accesses, indices outside of one and signed overflow end a launch with a RuntimeError,
as a deadlock does.
"""

import ctypes
import fcntl
import functools
import hashlib
import re
import subprocess
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from widedeep import reference
from widedeep.ops import Segments

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "csrc" / "kernels"
EMULATOR = ROOT / "tests" / "native" / "cuda_emulator"
CACHE = ROOT / ".pytest_cache" / "cuda_emulator"
COMMON = ["-std=c++20", "-g1", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off"]
FLAGS = [
    *(*COMMON, "-O1", "-Wno-unknown-pragmas", "-Wno-psabi"),
    *("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error", "-fno-sanitize=vptr"),
    # Every load and store calls a function of the emulator's memory.cpp, and none a runtime of the compiler's.
    *("-fsanitize=kernel-address", "--param=asan-stack=0", "--param=asan-globals=0"),
    "--param=asan-instrumentation-with-call-threshold=0",
    "-D__CUDA_ARCH_FEAT_SM90_ALL=1",
]
PARTS = [path.name for path in EMULATOR.glob("*.cpp") if path.name != "exports.cpp"]  # the emulator itself: no kernels
PART_FLAGS = [*COMMON, "-O2", "-fno-semantic-interposition"]
LINK = ["g++", "-shared", "-Wl,-Bsymbolic"]  # calls of the checks need no table
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # core/dtype.h

# What the kernels say in words that a C++ compiler does not know, and what it means here.
REWRITES = [
    (r"extern __shared__ ([\w:]+) (\w+)\[\];", r"\1* const \2 = emulator::dynamic_shared<\1>();"),
    (
        r"__shared__ ((?:alignas\(\d+\) )?)([\w:]+) (\w+)((?:\[[^\]]*\])*);",
        r"\1static \2 \3\4; emulator::shared_variable(&\3, sizeof(\3));",
    ),
    (r'asm volatile\("prefetch\.global\.L1 \[%0\];" ::"l"\((.*)\)\);', r"static_cast<void>(\1);"),
]
LAUNCH = re.compile(r"(\w+)((?:<[^<>()]*>)?)<<<(.*?)>>>\(", re.DOTALL)


def translate(text: str) -> str:
    """The source as C++; raises ValueError at an instruction that has no translation."""
    for pattern, replacement in REWRITES:
        text = re.sub(pattern, replacement, text)
    while match := LAUNCH.search(text):
        depth, end = 1, match.end()
        while depth:
            depth += {"(": 1, ")": -1}.get(text[end], 0)
            end += 1
        name, arguments, config = match[1], match[2], match[3]
        call = f'emulator::Call("{name}", {config})([=] {{ {name}{arguments}({text[match.end() : end]}; }})'
        text = text[: match.start()] + call + text[end:]
    if unknown := re.search(r'\basm\b[^"]*"[^"]+"|__shared__|<<<', text):
        raise ValueError(f"no translation for {unknown[0]}")
    return text


def _sources() -> dict[str, str]:
    """What is compiled, by name: translated kernels, and the one function of sm90.cuh that needs no hardware."""
    texts = {}
    for source in [*sorted(KERNELS.iterdir()), EMULATOR / "faults.cu"]:
        if source.suffix in (".cu", ".cuh") and source.name not in ("sm90.cuh", "sm90_pairs.cuh"):
            name = "kernels/" + source.name + (".cpp" if source.suffix == ".cu" else "")
            texts[name] = f'#line 1 "{source}"\n{translate(source.read_text())}'
    operand = r"__device__ __forceinline__ (uint64_t operand\(.*?\n}\n)"
    found = re.search(operand, (KERNELS / "sm90.cuh").read_text(), re.DOTALL)
    return texts | {"operand.inc": f"inline {found[1]}"}


def _stamp(*parts) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def _compile(folder: Path, sources: dict[str, str], stamp: str, *more: str) -> list[Path]:
    """Object files of the sources, in the cache; `stamp` stands for all that they include, and for flags in `more`."""

    def compiled(item: tuple[str, str]) -> Path:
        name, text = item
        result = CACHE / f"{Path(name).stem}-{_stamp(stamp, text)}.o"
        if not result.exists():
            made = folder / (Path(name).name + ".o")
            includes = [f"-I{folder}", f"-I{EMULATOR}", f"-I{ROOT / 'csrc'}"]
            flags = PART_FLAGS if name in PARTS else FLAGS
            subprocess.run(["g++", *flags, *more, *includes, "-c", folder / name, "-o", made], check=True)
            made.rename(result)
        return result

    with open(CACHE / f"{stamp}.lock", "w") as lock, ThreadPoolExecutor(2) as pool:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another process of the tests compiles the same: its results are taken
        return list(pool.map(compiled, sources.items()))


# For tests to set. An error in the Hopper products: a file's name, what is right there, and the wrong in its place.
planted: tuple[str, str, str] | None = None
refused = -1  # the call of the runtime that is refused in every launcher, counted from 0


def library() -> ctypes.CDLL:
    return _library(planted)


@functools.cache
def _library(error: tuple[str, str, str] | None) -> ctypes.CDLL:
    """The kernels, compiled where a source, a header or a flag has changed since the last time."""
    texts = _sources()
    for path in EMULATOR.glob("*.cpp"):
        texts[path.name] = path.read_text()
    headers = [text for name, text in texts.items() if not name.endswith(".cpp")]
    paths = sorted([*(p for p in EMULATOR.rglob("*") if p.suffix in (".h", ".cuh")), *(ROOT / "csrc").rglob("*.h")])
    stamp = _stamp(FLAGS, PART_FLAGS, headers, [p.read_text() for p in paths])
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as made:
        folder = Path(made)
        (folder / "kernels").mkdir()
        for name, text in texts.items():
            (folder / name).write_text(text)
        objects = _compile(folder, {name: text for name, text in texts.items() if name.endswith(".cpp")}, stamp)
        if error:
            file, right, wrong = error
            name, products = f"kernels/{file}{'.cpp' * file.endswith('.cu')}", "kernels/gemm_sm90.cu.cpp"
            if texts[name].count(right) != 1:
                raise ValueError(f"not once in {file}: {right}")
            (folder / name).write_text(texts[name].replace(right, wrong))
            objects = [path for path in objects if not path.name.startswith("gemm_sm90.cu-")]
            source = {products: (folder / products).read_text()}
            objects += _compile(folder, source, _stamp(stamp, error), "-g0")  # a fifth of its time is for debuggers
        subprocess.run([*LINK, *objects, "-o", folder / "emulated.so"], check=True)
        loaded = ctypes.CDLL(str(folder / "emulated.so"))
    loaded.emulator_allocate.restype = ctypes.c_void_p
    loaded.emulator_message.restype = ctypes.c_char_p
    loaded.run_mask_bytes.restype = ctypes.c_int64
    return loaded


_device = (0, 132)


def reseed(seed: int, multiprocessors: int = 132) -> None:
    """From now on: the order in which threads and blocks run, and the size of the device."""
    global _device
    _device = (seed, multiprocessors)


def last_error() -> int:
    """The error that the runtime remembers: a launch that follows would be taken for the one that failed."""
    return library().emulator_last_error()


class _Arguments:
    """C arguments of a call; tensors lie in guarded memory for its length and are copied back after it."""

    def __init__(self):
        self.copies, self.kept = [], []

    def address(self, tensor: torch.Tensor) -> int:
        bytes_ = tensor.numel() * tensor.element_size()
        for memory, other, size in self.copies:  # what is given twice lies at one place
            if size == bytes_ > 0 and other.data_ptr() == tensor.data_ptr():
                return memory
        memory = library().emulator_allocate(ctypes.c_size_t(bytes_))
        assert tensor.is_contiguous()
        ctypes.memmove(memory, tensor.data_ptr(), bytes_)
        self.copies.append((memory, tensor, bytes_))
        return memory

    def convert(self, value):
        if value is None:
            return ctypes.c_void_p(None)
        if isinstance(value, torch.Tensor):
            return ctypes.c_void_p(self.address(value))
        if isinstance(value, torch.dtype):
            return ctypes.c_int64(DTYPES[value])
        if isinstance(value, float):
            return ctypes.c_double(value)
        if isinstance(value, int):
            return ctypes.c_int64(value)
        if isinstance(value, ctypes.Structure):
            self.kept.append(value)
            return ctypes.byref(value)
        return self.array(value)

    def array(self, values):
        """A list of numbers, or of tensors (null where None)."""
        if all(isinstance(v, int) for v in values):
            array = (ctypes.c_int64 * max(len(values), 1))(*values)
        else:
            array = (ctypes.c_void_p * len(values))(*(None if v is None else self.address(v) for v in values))
        self.kept.append(array)
        return array

    def release(self) -> bool:
        clean = True
        for memory, tensor, bytes_ in self.copies:
            ctypes.memmove(tensor.data_ptr(), memory, bytes_)
            clean &= library().emulator_release(ctypes.c_void_p(memory)) == 0
        return clean


def call(name: str, *values) -> None:
    """Runs a launcher; RuntimeError when it fails, or writes around an array."""
    lib, arguments = library(), _Arguments()
    lib.emulator_seed(ctypes.c_uint64(_device[0]), ctypes.c_int64(_device[1]))
    lib.emulator_refuse(ctypes.c_int64(refused))
    converted = [arguments.convert(v) if not callable(v) else v(arguments) for v in values]
    error = getattr(lib, "run_" + name)(*converted)
    clean = arguments.release()
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}: {lib.emulator_message().decode()}")
    if not clean:
        raise RuntimeError(f"{name}: a write around an array")


class _Lists(ctypes.Structure):
    _fields_ = [("F", ctypes.c_int64)] + [
        (name, ctypes.c_void_p) for name in ("hotness", "rows", "dims", "columns", "mean", "tables", "rms")
    ]


def _lists(hotness, rows, dims=None, columns=None, mean=None, tables=None, rms=None):
    def make(arguments: _Arguments):
        fields = [hotness, rows, dims, columns, mean, tables, rms]
        made = [None if v is None else ctypes.addressof(arguments.array([*v])) for v in fields]
        return arguments.convert(_Lists(len(rows), *made))

    return make


def fault(number: int) -> torch.Tensor:
    """The result [64] of a kernel of faults.cu; 0 is the one without a fault."""
    out = torch.full((64,), -7, dtype=torch.int32)
    call("fault", number, out)
    return out


# --- the ops ----------------------------------------------------------------------------------------------------------


def embedding_forward_out(
    ids, numeric, tables, wide, wide_numeric, wide_bias, hotness, mean, columns, numeric_columns, *, x, wide_logit
):
    lists = _lists(hotness, [len(t) for t in tables], [t.shape[1] for t in tables], columns, mean, tables)
    call(
        "embedding_forward", ids, len(ids), lists, numeric, numeric_columns, len(numeric_columns), wide, wide_numeric,
        wide_bias, x, x.dtype, x.shape[1], wide_logit,
    )  # fmt: skip


def embedding_segments(ids, hotness, rows):
    n = ids.numel()
    out = [torch.full((size,), -7, dtype=torch.int32) for size in (n, n + 1, n, n, len(rows) + 1)]
    call("embedding_segments", ids, len(ids), _lists(hotness, rows), sum(rows), *out)
    return Segments(*out)


def embedding_row_gradients(
    ids, dx, dlogit, unique, offsets, entries, keys, table_start, hotness, mean, columns, rows, dims
):
    tables = [dlogit.new_zeros(min(r, len(ids) * k), d) for r, k, d in zip(rows, hotness, dims)]
    wide = dlogit.new_zeros(ids.numel())
    lists = _lists(hotness, rows, dims, columns, mean, tables)
    segments = (unique, offsets, entries, keys, table_start)
    call("embedding_row_gradients", ids, len(ids), lists, dx, dx.dtype, dx.shape[1], dlogit, *segments, wide)
    return tables, wide


def embedding_update_(
    ids, dx, dlogit, unique, offsets, entries, keys, table_start, tables, rms, last_step, wide, accum, linear,
    hotness, mean, columns, lr, step, rho, eps, wide_lr, l1, l2, grad_scale, found_inf,
):  # fmt: skip
    lists = _lists(hotness, [len(t) for t in tables], [t.shape[1] for t in tables], columns, mean, tables, rms)
    call(
        "embedding_update", ids, len(ids), lists, dx, dx.dtype, dx.shape[1], dlogit, unique, offsets, entries,
        keys, table_start, last_step, wide, accum, linear, lr, step, rho, eps, wide_lr, l1, l2, grad_scale, found_inf,
    )  # fmt: skip


def head_forward_out(h, weight, bias, wide_logit, *, logit):
    call("head_forward", h, h.dtype, *h.shape, weight, bias, wide_logit, logit)


def head_step_out(
    h, weight, bias, wide_logit, label, global_rows, p, loss_scale,
    *, logit, dlogit, dz, dbias_hidden, dweight, dbias, loss,
):  # fmt: skip
    out = (logit, dlogit, dz, dbias_hidden, dweight, dbias, loss)
    inputs = (h, h.dtype, *h.shape, weight, bias, wide_logit, label, global_rows, float(p), loss_scale)
    call("head_step", *inputs, *out)


def wide_numeric_backward_out(numeric, dlogit, *, dweight, dbias):
    call("wide_numeric_backward", numeric, dlogit, *numeric.shape, dweight, dbias)


def bias_relu_dropout(y, bias, p, seed, step, layer, first_row, bits=None):
    call("bias_relu_dropout", y, bias, bits, *y.shape, y.dtype, float(p), seed, step, layer, first_row)


def mask_and_sum(values, mask, scale, *, out, dbias, bits=None):
    call("mask_and_sum", values, mask, bits, float(scale), out, dbias, *values.shape, values.dtype)


def rmsprop_dense_(weights, rms, grads, copies, lr, rho, eps, grad_scale, found_inf):
    copies = copies or [None] * len(weights)
    numbers = []
    for w, g, c in zip(weights, grads, copies):
        rows, columns = w.shape if w.dim() == 2 else (1, w.numel())
        pitch = [columns if t is None or t.dim() != 2 else t.shape[1] for t in (g, c)]
        numbers += [rows, columns, *pitch, DTYPES[g.dtype], DTYPES[torch.float32 if c is None else c.dtype]]
    numbers = [int(n) for n in numbers]
    call("rmsprop_dense", len(weights), weights, rms, grads, copies, numbers, lr, rho, eps, grad_scale, found_inf)


def ftrl_dense_(weight, accum, linear, grad, lr, l1, l2, grad_scale, found_inf):
    call("ftrl_dense", weight, accum, linear, grad, weight.numel(), lr, l1, l2, grad_scale, found_inf)


def rmsprop_rows_(weight, rms, last_step, rows, grads, lr, step, rho, eps):
    state = (weight, rms, last_step, None, None, rows, len(rows), *weight.shape)
    call("listed_rows", *state, grads, lr, step, rho, eps, 0.0)


def ftrl_rows_(weight, accum, linear, rows, grads, lr, l1, l2):
    D = weight.shape[1] if weight.dim() == 2 else 1
    state = (weight, None, None, accum, linear, rows, len(rows), len(weight), D)
    call("listed_rows", *state, grads, None, None, lr, l1, l2)


def rmsprop_settle_(rms, last_step, step, rho):
    call("rmsprop_settle", rms, last_step, *rms.shape, step, rho)


def check_finite_(tensors, found_inf, skip=0):
    """skip: elements at the start that are not looked at, so that the rest begins unaligned."""
    for t in tensors:
        call("check_finite", t, t.dtype, t.numel() - skip, skip, found_inf)


def loss_scale_update_(scale, good_steps, updates, found_inf, growth, backoff, interval):
    call("loss_scale_update", scale, good_steps, updates, found_inf, growth, backoff, interval)


def auc_histogram_(logit, label, positives, negatives):
    call("auc_histogram", logit, label, len(logit), positives, negatives, len(positives))


def gather_batch_out(rows, order, start, *, out):
    counts = [len(rows[2]), rows[0].shape[1], rows[1].shape[1], len(out[2])]
    call("gather_batch", *rows, counts, [*order] or None, start, *out)


def transpose_out(matrices, *, out):
    sizes = [n for m in matrices for n in m.shape]
    call("transpose", len(matrices), list(matrices), list(out), sizes, matrices[0].dtype)


def linear_sm90_out(x, weights, biases, p, seed, step, layer, first_row, rounds_ahead=2, *, y, masks):
    n, widths = len(weights), [x.shape[1], *map(len, weights)]
    dropout, masks = (float(p), seed, step, layer, first_row), [*masks] + [None] * (n - len(masks))
    given = (x, n, [*weights], [*biases], *dropout, [*y], masks, len(x), widths, x.dtype)
    call("linear_forward_sm90", *given, rounds_ahead)


def linear_sm90_dgrad_out(dz, weights_t, masks, p, rounds_ahead=2, *, dx, dbias, found_inf=None):
    n, widths = len(weights_t), [dz.shape[1], *map(len, weights_t)]
    masks, dbias = ([*given] + [None] * (n - len(given)) for given in (masks, dbias))
    scale = reference.dropout_scale(p)
    given = (dz, n, [*weights_t], masks, scale, [*dx], dbias, found_inf, len(dz), widths, dz.dtype)
    call("linear_dgrad_sm90", *given, rounds_ahead)


def mask_bytes(M: int, N: int) -> int:
    return library().run_mask_bytes(ctypes.c_int64(M), ctypes.c_int64(N))
