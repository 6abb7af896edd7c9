"""A stand-in for cupy 14 on a machine without a GPU: numpy behind cupy's rules, and stricter where cupy forgives.

It has the functions, methods and parameters of cupy that preprocessing uses, and nothing else (`test_xp.py` compares
them with a real cupy where there is one). It refuses what cupy refuses: implicit conversion to numpy, numpy arrays as
operands, types other than numbers. It refuses what would be wrong or slow without a word: numpy arrays and lists as
indices, iteration, an array of another stream that nobody waited for, indices out of bounds. Host memory that a copy
is on its way to is poison until the stream is waited for; new arrays are poison too. Raw kernels run on the CUDA
emulator. `counts` holds copies to the host, waits, uploads, launches of raw kernels, and the operations for which cupy
would compile a kernel of its own.
"""

import operator
import threading
from collections import Counter
from types import SimpleNamespace

import emulated_raw
import numpy as np
from numpy import bool_, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64

__version__ = "14.2.0"
__all__ = [
    "arange", "asarray", "ascontiguousarray", "empty", "get_default_memory_pool", "get_default_pinned_memory_pool",
    "ones", "where", "zeros",
]  # fmt: skip
TYPES = (bool_, float32, float64, int8, int16, int32, int64, uint8, uint16, uint32, uint64)
POISON = 0xCB
counts: Counter = Counter()
_local = threading.local()
_SCALARS = (bool, int, float, np.generic)


class Stream:
    """Work is done when it is queued; only copies to the host wait for `synchronize`, as does what other threads may
    read."""

    def __init__(self, null=False, non_blocking=False, ptds=False, priority=None):
        assert non_blocking or null, "a blocking stream waits for the default stream"
        self.queued = self.done = 0
        self.copies = []

    def __enter__(self):
        _streams().append(self)
        return self

    def __exit__(self, *_):
        assert _streams().pop() is self

    def synchronize(self):
        counts["waits"] += 1
        self.done = self.queued
        for target, values in self.copies:
            target[...] = values
        self.copies.clear()


_default_stream = Stream(null=True)


def _streams():
    return _local.__dict__.setdefault("streams", [])


def _stream():
    return _streams()[-1] if _streams() else _default_stream


class ndarray:
    """An array on the device. `_values` is for this module alone."""

    def __init__(self, values):
        values = np.asarray(values)
        if values.dtype.type not in TYPES:
            raise ValueError(f"Unsupported dtype {values.dtype}")
        self._values = values
        self._touch()

    def _touch(self):
        self._stream = _stream()
        self._stream.queued += 1
        self._number = self._stream.queued

    def _here(self):
        """The values, for work on the current stream."""
        if self._stream is not _stream() and self._number > self._stream.done:
            raise AssertionError("an array of another stream, which nobody has waited for")
        return self._values

    dtype, shape, size, ndim, nbytes, itemsize = (
        property(lambda self, name=name: getattr(self._values, name))
        for name in ("dtype", "shape", "size", "ndim", "nbytes", "itemsize")
    )

    def __len__(self):
        return len(self._values)

    def __iter__(self):
        raise TypeError("iteration over a device array: a kernel and a wait an element")

    def __array__(self, dtype=None):
        raise TypeError("Implicit conversion to a NumPy array is not allowed. Please use `.get()`.")

    def __array_function__(self, function, types, args, kwargs):
        raise TypeError(f"numpy.{function.__name__} of a device array")

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        if method != "__call__" or kwargs:
            raise TypeError(f"{ufunc.__name__}.{method} of a device array")
        return _compiled(ufunc, *inputs)

    def _item(self):
        if self.size != 1:
            raise TypeError(f"expected an array of one element, found {self.shape}")
        counts["waits"] += 1
        return self._here().item()

    def __int__(self):
        return int(self._item())

    def __bool__(self):
        return bool(self._item())

    def __getitem__(self, slices):
        index = _index(slices)
        counts["compiled"] += isinstance(index, np.ndarray)
        return _wrap(self._here()[index])

    def __setitem__(self, slices, value):
        index = _index(slices)
        masked = isinstance(index, np.ndarray) and index.dtype == bool
        if masked and isinstance(value, ndarray) and value.size != 1:
            raise TypeError("assignment of several values through a mask")
        self._here()[index] = _operand(value)
        self._touch()

    def astype(self, dtype, order="K", casting=None, subok=None, copy=True):
        counts["compiled"] += self.dtype != dtype
        return _compute(lambda a: a.astype(dtype, copy=copy), self)

    def view(self, dtype=None, type=None):
        return _compute(lambda a: a.view(dtype), self)

    def sum(self, axis=None, dtype=None, out=None, keepdims=False):
        return _compiled(lambda a: a.sum(axis, dtype, keepdims=keepdims), self)

    def get(self, stream=None, order="C", out=None, blocking=True):
        values = self._here().copy()
        counts["copies"] += 1
        if out is None:
            assert blocking, "a copy on its way to memory that nobody holds"
            _stream().synchronize()
            return values
        if (out.dtype, out.shape) != (self.dtype, self.shape):
            raise TypeError(f"{self.dtype} {self.shape} cannot be copied to {out.dtype} {out.shape}")
        out.reshape(-1).view(np.uint8).fill(POISON)
        _stream().copies.append((out, values))
        if blocking:
            _stream().synchronize()
        return out

    def set(self, arr, stream=None):
        if not isinstance(arr, np.ndarray) or (arr.dtype, arr.shape) != (self.dtype, self.shape):
            raise TypeError(f"{type(arr)} cannot be set to {self.dtype} {self.shape}")
        counts["uploads"] += 1
        self._here()[...] = arr
        self._touch()


def _method(function, reflected=False):
    if reflected:
        return lambda self, other: _compiled(function, other, self)
    return lambda self, *other: _compiled(function, self, *other)


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "lshift", "rshift", "and", "or", "xor"):
    _function = getattr(operator, f"__{_name}__")
    setattr(ndarray, f"__{_name}__", _method(_function))
    setattr(ndarray, f"__r{_name}__", _method(_function, reflected=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne", "neg", "invert", "abs"):
    setattr(ndarray, f"__{_name}__", _method(getattr(operator, f"__{_name}__")))
ndarray.__hash__ = None


def _operand(value):
    if isinstance(value, ndarray):
        return value._here()
    if isinstance(value, _SCALARS):
        return value
    raise TypeError(f"Unsupported type {type(value)}")


def _wrap(values):
    return ndarray(values)


def _compute(function, *operands):
    """Scalars stay what they are, so that numpy's promotion is that of cupy 14."""
    return _wrap(function(*map(_operand, operands)))


def _compiled(function, *operands):
    counts["compiled"] += 1
    return _compute(function, *operands)


def _index(slices):
    def one(s):
        if s is None or s is Ellipsis or isinstance(s, (slice, int, np.integer)):
            return s
        if isinstance(s, ndarray):
            return s._here()
        raise IndexError(f"an index of type {type(s)} would be copied to the device")

    return tuple(map(one, slices)) if isinstance(slices, tuple) else one(slices)


def _device(value):
    if not isinstance(value, ndarray):
        raise TypeError(f"expected a device array, got {type(value)}")
    return value


def asarray(a, dtype=None, order=None, *, copy=None, blocking=False):
    if isinstance(a, ndarray):
        return a.astype(dtype or a.dtype, copy=False)
    return _wrap(np.array(a, dtype))


def ascontiguousarray(a, dtype=None):
    counts["compiled"] += not _device(a)._values.flags.c_contiguous or a.dtype != (dtype or a.dtype)
    return _compute(lambda values: np.ascontiguousarray(values, dtype), a)


def empty(shape, dtype=float, order="C"):
    values = np.empty(shape, dtype)
    values.reshape(-1).view(np.uint8).fill(POISON)
    return _wrap(values)


def zeros(shape, dtype=float, order="C"):
    return _wrap(np.zeros(shape, dtype))


def ones(shape, dtype=float, order="C"):
    return _wrap(np.ones(shape, dtype))


def arange(start, stop=None, step=1, dtype=None):
    return _wrap(np.arange(start, stop, step, dtype) if stop is not None else np.arange(0, start, step, dtype))


def where(condition, x=None, y=None):
    return _compiled(np.where, _device(condition), x, y)


class RawModule:
    """Kernels of a source that NVRTC takes: without a header."""

    def __init__(
        self, code=None, *, path=None, options=(), backend="nvrtc", translate_cucomplex=False,
        enable_cooperative_groups=False, name_expressions=None, jitify=None,
    ):  # fmt: skip
        assert isinstance(options, tuple)
        assert "#include" not in code
        self._code = code

    def get_function(self, name):
        def kernel(grid, block, args, *, shared_mem=0):
            assert isinstance(args, tuple)
            assert 1 <= grid[0] < 2**31
            assert 1 <= block[0] <= 1024
            counts["launches"] += 1
            # cupy gives a Python number the type that numpy has for it.
            values = [a._here() if isinstance(a, ndarray) else a if a is None else np.asarray(a)[()] for a in args]
            emulated_raw.launch(self._code, name, grid[0], block[0], values, seed=counts["launches"])
            for a, parameter in zip(args, emulated_raw.parameters(self._code)[name]):
                if parameter.written:
                    a._touch()

        return kernel


class _Pool:
    def free_all_blocks(self, stream=None):
        counts["freed"] += 1


def get_default_memory_pool():
    return _Pool()


def get_default_pinned_memory_pool():
    return _Pool()


class CUDARuntimeError(RuntimeError):
    pass


def _alloc_pinned_memory(size):
    return np.full(max(512, 1 << (size - 1).bit_length()), POISON, np.uint8)


cuda = SimpleNamespace(
    Stream=Stream,
    get_current_stream=_stream,
    alloc_pinned_memory=_alloc_pinned_memory,
    runtime=SimpleNamespace(getDeviceCount=lambda: 1, CUDARuntimeError=CUDARuntimeError),
)
