"""Reads golden files: what the original TensorFlow code computed step by step, for `widedeep parity` to replay.

A file is an .npz with a JSON `config`, the batches, the initial weights, and any of the results below. Its variables
have Keras's names and layout (`kernel` is [in, out]); `keras_name` and `to_keras` map ours to them.
"""

import json
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from widedeep.errors import InputError
from widedeep.feature_spec import CategoricalFeature, FeatureSpec, NumericFeature
from widedeep.feature_spec_parse import find_repeated

FORMAT = "wide-deep-golden/1"
# Settings that change the update rules in ways that the model does not know; a file that sets one cannot be replayed.
FIXED = {
    "deep_optimizer": {"momentum": 0.0, "centered": False},
    "linear_optimizer": {"learning_rate_power": -0.5, "l2_shrinkage": 0.0, "beta": 0.0},
}
# What a file with one part alone may leave out of its config.
UNUSED = {
    "deep": {"deep_learning_rate": 0.0, "steps_per_epoch": 1, "num_epochs": 1, "deep_warmup_epochs": 0},
    "wide": {"linear_learning_rate": 1.0},
}


def keras_name(name: str) -> str:
    """The golden file's name of a weight: `deep.layer.0.weight` -> `deep/dense_0/kernel`."""
    part, kind, *rest = name.split(".", 2)
    if kind == "table":
        return f"{part}/emb/{rest[0]}"
    if kind == "layer":
        index, leaf = rest[0].split(".")
        return f"deep/dense_{index}/{_leaf(leaf)}"
    if kind == "out":
        return f"deep/out/{_leaf(rest[0])}"
    return "wide/dense/kernel" if kind == "numeric" else "wide/dense/bias"


def _leaf(name: str) -> str:
    return "kernel" if name == "weight" else name


def to_keras(name: str, array: np.ndarray) -> np.ndarray:
    """A weight, gradient or slot called `name` in Keras's layout: kernels [in, out], wide tables [rows, 1]."""
    if name.startswith("wide.") and name != "wide.bias":
        return array.reshape(-1, 1)
    return array.T if name.endswith(".weight") else array


def from_keras(name: str, array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `to_keras`, in our `shape`."""
    return np.ascontiguousarray(array.T if name.endswith(".weight") else array).reshape(shape)


@dataclass
class Golden:
    """One golden file, checked. `arrays` are its arrays by name."""

    path: Path
    config: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @classmethod
    def load(cls, path: str | Path) -> "Golden":
        """Reads and checks a golden file.

        Raises:
            InputError: not such a file; the sentence names the array or the config's field.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as z:
                arrays = {name: z[name] for name in z.files}
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, KeyError, AttributeError) as e:
            why = e.strerror if isinstance(e, OSError) and e.strerror else " ".join(str(e).split())
            why = "something else" if "pickle" in why else why  # numpy's advice is to load it nevertheless
            raise InputError(f"{path}: expected a readable .npz file, got {why}") from e
        golden = cls(path, _config(path, arrays.pop("config", None)), arrays)
        _check(golden)
        return golden

    def fail(self, what: str, expected: str) -> NoReturn:
        raise InputError(f"{self.path}: {what}: expected {expected}")

    def __contains__(self, name: str) -> bool:
        return name in self.arrays

    def __getitem__(self, name: str) -> np.ndarray:
        if name not in self.arrays:
            self.fail(name, "such an array, got none")
        return self.arrays[name]

    @cached_property
    def spec(self) -> FeatureSpec:
        categorical = [CategoricalFeature(c["name"], c["rows"], c["dim"]) for c in self.config["categorical"]]
        return FeatureSpec(categorical, [NumericFeature(name) for name in self.config["numeric"]], label="label")

    @cached_property
    def parts(self) -> str:
        """Which parts have weights: "both", "wide" or "deep"."""
        wide, deep = (any(name.startswith(f"init/{part}/") for name in self.arrays) for part in ("wide", "deep"))
        if not wide and not deep:
            self.fail("init/", "initial weights of a wide or a deep part, got none")
        return "both" if wide and deep else "wide" if wide else "deep"

    def batches(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(ids, numeric, labels) of every step."""
        return zip(self["ids"], self["numeric"], self["labels"])

    def has(self, group: str) -> bool:
        """Whether the file has results of this group (`grad0`, `step1`, `step10`, `end`, `slot`)."""
        return any(name.startswith(f"{group}/") for name in self.arrays)

    def lacks(self, variable: str) -> bool:
        """Whether the file's model has no such wide weight (say, none for numerics), so that ours must stay 0.

        An array that is simply not there is an error instead: reading `init/<variable>` tells.
        """
        if f"init/{variable}" in self.arrays or not variable.startswith("wide/"):
            return False
        if variable.startswith("wide/dense/") and not self.config["numeric"]:
            return True
        listed = self.config.get("variables")
        return isinstance(listed, list) and variable not in [v.get("name") for v in listed if isinstance(v, dict)]

    def rows(self, variable: str) -> np.ndarray | slice:
        """Which rows of a variable the file holds outside `init/`."""
        return self.arrays.get(f"rows/{variable}", slice(None))


def _config(path: Path, raw: np.ndarray | None) -> dict[str, Any]:
    if raw is None:
        raise InputError(f"{path}: config: expected JSON as uint8, got none")
    try:
        config = json.loads(raw.tobytes())
    except ValueError as e:
        raise InputError(f"{path}: config: expected JSON as uint8, got {e}") from e
    if not isinstance(config, dict):
        raise InputError(f"{path}: config: expected a JSON object, got {type(config).__name__}")
    return config


def _check(g: Golden) -> None:
    config = g.config
    if config.get("format", FORMAT) != FORMAT:
        g.fail("config.format", f"{FORMAT!r}, got {config['format']!r}")
    _check_features(g)
    for part, defaults in UNUSED.items():
        if g.parts not in ("both", part):
            config.update({key: value for key, value in defaults.items() if config.get(key) is None})
    for key in ("steps", "batch", "steps_per_epoch"):
        _number(g, config, key, 1, integer=True)
    for key in ("deep_learning_rate", "linear_learning_rate", "num_epochs", "deep_warmup_epochs"):
        _number(g, config, key, 0)
    hidden = config.get("hidden") or []
    if not isinstance(hidden, list) or not all(_is_int(h) and h >= 1 for h in hidden):
        g.fail("config.hidden", f"a list of integers >= 1, got {hidden!r}")
    config["hidden"] = hidden
    if config.get("deep_dropout", 0) != 0:
        g.fail("config.deep_dropout", "0 (random masks cannot be replayed)")
    for section, fixed in FIXED.items():
        settings = config[section] = config.get(section) or {}
        if not isinstance(settings, dict):
            g.fail(f"config.{section}", f"an object, got {settings!r}")
        for key, value in fixed.items():
            if settings.get(key, value) != value:
                g.fail(f"config.{section}.{key}", f"{value}, got {settings[key]!r}")
        for key in ("rho", "epsilon", "initial_accumulator_value", "l1", "l2"):
            if key in settings:
                _number(g, settings, key, 0, prefix=f"config.{section}")
    _check_arrays(g)


def _check_features(g: Golden) -> None:
    config = g.config
    for key in ("categorical", "numeric"):
        config[key] = config.get(key) or []
        if not isinstance(config.get(key), list):
            g.fail(f"config.{key}", f"a list, got {config.get(key)!r}")
    for i, c in enumerate(config["categorical"]):
        if not isinstance(c, dict) or not isinstance(c.get("name"), str):
            g.fail(f"config.categorical[{i}]", f"an object with name, rows and dim, got {c!r}")
        c.setdefault("dim", 1)  # a wide part alone has none
        for key in ("rows", "dim"):
            _number(g, c, key, 1, integer=True, prefix=f"config.categorical[{i}]")
    names = [c["name"] for c in config["categorical"]]
    if not all(isinstance(name, str) for name in config["numeric"]):
        g.fail("config.numeric", f"a list of names, got {config['numeric']!r}")
    if (repeated := find_repeated(names + config["numeric"])) is not None:
        g.fail("config", f"each feature once, got {repeated!r} twice")


def _check_arrays(g: Golden) -> None:
    S, B, C, N = g.config["steps"], g.config["batch"], len(g.config["categorical"]), len(g.config["numeric"])
    if not C:
        g.arrays.setdefault("ids", np.zeros((S, B, 0), np.int32))
    if not N:
        g.arrays.setdefault("numeric", np.zeros((S, B, 0), np.float32))
    shapes = {"ids": (S, B, C), "numeric": (S, B, N), "labels": (S, B), "loss": (S,)}
    if "heldout/ids" in g:
        H = len(g["heldout/ids"])
        shapes |= {"heldout/ids": (H, C), "heldout/numeric": (H, N), "heldout/labels": (H,)}
    for name, shape in shapes.items():
        check_shape(g, name, shape)
    for name in ("ids", "heldout/ids"):
        if name not in g:
            continue
        if not np.issubdtype(g[name].dtype, np.integer):
            g.fail(name, f"integers, got {g[name].dtype}")
        for i, c in enumerate(g.config["categorical"]):
            column = g[name][..., i]
            if column.size and (column.min() < 0 or column.max() >= c["rows"]):
                g.fail(f"{name}, column {i} ({c['name']})", f"ids from 0 to {c['rows'] - 1}")
    for name, array in g.arrays.items():
        if not np.issubdtype(array.dtype, np.number):
            g.fail(name, f"numbers, got {array.dtype}")
        if np.issubdtype(array.dtype, np.floating) and not np.isfinite(array).all():
            g.fail(name, "finite numbers")


def check_shape(g: Golden, name: str, shape: tuple[int, ...]) -> None:
    """Raises InputError unless array `name` has this shape."""
    if g[name].shape != shape:
        g.fail(name, f"shape {list(shape)}, got {list(g[name].shape)}")


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(g: Golden, d: dict, key: str, low: float, integer: bool = False, prefix: str = "config") -> None:
    value: Any = d.get(key)
    good = _is_int(value) or (not integer and isinstance(value, float))
    if not good or not value >= low:
        g.fail(f"{prefix}.{key}", f"{'an integer' if integer else 'a number'} >= {low}, got {value!r}")
