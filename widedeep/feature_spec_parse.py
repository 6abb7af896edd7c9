"""Checks a parsed feature spec field by field; every rule has its own sentence."""

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from widedeep.errors import InputError
from widedeep.features import (
    CHUNK_TYPES,
    COMBINERS,
    MAPPINGS,
    MAX_CARDINALITY,
    CategoricalFeature,
    NumericFeature,
    SourceChunk,
    default_dim,
)

SECTIONS = ("feature_spec", "source_spec", "channel_spec", "metadata")
CHANNELS = ("onehot_categorical", "multihot_categorical", "numerical", "label", "map")
ATTRIBUTES = ("cardinality", "max_hotness", "dtype", "embedding_dim", "combiner", "transform")
CHUNK_KEYS = ("type", "features", "files")
CATEGORICAL_DTYPES = ("int32", "int64")
NUMERIC_DTYPES = ("float32", "float64")
MAX_DIM = 2**16
QUOTED = 60  # characters of a value in a message


def parse(d: Any, where: str | Path, combiner: str | None = None) -> dict[str, Any]:
    """The fields of a `FeatureSpec`, by name, of the parsed YAML `d`.

    Raises:
        InputError: a field breaks a rule; the sentence names `where`, the field's path, and what was expected.
    """
    return _Parser(where, combiner).spec(d)


class _Parser:
    def __init__(self, where: str | Path, combiner: str | None):
        self.where = where
        self.combiner = combiner

    def fail(self, field: str, expected: str) -> NoReturn:
        raise InputError(
            f"{self.where}: {field}: expected {expected}" if field else f"{self.where}: expected {expected}"
        )

    def mapping(self, value: Any, field: str, keys: tuple[str, ...] | None = None) -> dict[str, Any]:
        """`value` as a dict with string keys, all of them in `keys` if given; an absent section is empty."""
        value = {} if value is None else value
        if not isinstance(value, dict):
            self.fail(field, f"a mapping, got {_quoted(value)}")
        for key in value:
            if not isinstance(key, str) or not key:
                self.fail(field, f"names as keys, got {_quoted(key)}")
            if keys and key not in keys:
                self.fail(f"{field}.{key}" if field else key, f"one of the keys {', '.join(keys)}")
        return value

    def names(self, value: Any, field: str) -> list[str]:
        value = [] if value is None else value
        if not isinstance(value, list) or not all(isinstance(name, str) and name for name in value):
            self.fail(field, f"a list of names, got {_quoted(value)}")
        if (repeated := find_repeated(value)) is not None:
            self.fail(field, f"each name once, got {repeated!r} twice")
        return value

    def integer(self, value: Any, field: str, low: int = 1, high: int = MAX_CARDINALITY) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            self.fail(field, f"an integer >= {low}, got {_quoted(value)}")
        if value > high:
            self.fail(field, f"an integer <= {high}, got {value}")
        return value

    def choice(self, value: Any, field: str, choices: tuple[str, ...]) -> str:
        if value not in choices:
            self.fail(field, f"one of {', '.join(choices)}, got {_quoted(value)}")
        return value

    def spec(self, d: Any) -> dict[str, Any]:
        d = self.mapping(d, "", SECTIONS)
        features = self.mapping(d.get("feature_spec"), "feature_spec")
        features = {name: self.mapping(a, f"feature_spec.{name}", ATTRIBUTES) for name, a in features.items()}
        channels = self.channels(d.get("channel_spec"), features)
        one_hot = [self.categorical(n, features[n], multi_hot=False) for n in channels["onehot_categorical"]]
        multi_hot = [self.categorical(n, features[n], multi_hot=True) for n in channels["multihot_categorical"]]
        numeric = tuple(self.numeric(n, features[n]) for n in channels["numerical"])
        categorical = (*one_hot, *multi_hot)
        for f in categorical:
            if f"{f.name}_embedding" in channels["numerical"]:
                self.fail(
                    "channel_spec.numerical", f"no feature called {f.name}_embedding, the column of table {f.name}"
                )
        inputs = {f.name for f in categorical} | {f.name for f in numeric}
        other = {name: a for name, a in features.items() if name not in inputs}
        for name, attributes in other.items():
            self.other(name, attributes)
        return {
            "categorical": categorical,
            "numeric": numeric,
            "label": channels["label"][0],
            "group": channels["map"][0] if channels["map"] else None,
            "sources": self.sources(d.get("source_spec"), features, channels),
            "metadata": self.mapping(d.get("metadata"), "metadata"),
            "other": other,
            "directory": Path(self.where).parent if isinstance(self.where, Path) else None,
        }

    def channels(self, value: Any, features: dict) -> dict[str, list[str]]:
        value = self.mapping(value, "channel_spec", CHANNELS)
        if absent := [channel for channel in CHANNELS if channel not in value]:
            self.fail("channel_spec", f"the channel {', '.join(absent)}, got none (an empty one is [])")
        channels = {channel: self.names(value[channel], f"channel_spec.{channel}") for channel in CHANNELS}
        if len(channels["label"]) != 1:
            self.fail("channel_spec.label", f"exactly one feature, got {len(channels['label'])}")
        if len(channels["map"]) > 1:
            self.fail("channel_spec.map", f"at most one feature, got {len(channels['map'])}")
        owner: dict[str, str] = {}
        for channel, names in channels.items():
            for name in names:
                if name not in features:
                    self.fail(f"channel_spec.{channel}", f"features that feature_spec defines, got {name!r}")
                if name in owner:
                    self.fail(f"channel_spec.{channel}", f"each feature in one channel, got {name!r} of {owner[name]}")
                owner[name] = channel
        if not any(channels[c] for c in ("onehot_categorical", "multihot_categorical", "numerical")):
            self.fail("channel_spec", "at least one categorical or numerical feature, got none")
        return channels

    def categorical(self, name: str, a: dict, *, multi_hot: bool) -> CategoricalFeature:
        field = f"feature_spec.{name}"
        cardinality = self.integer(a.get("cardinality"), f"{field}.cardinality")
        if multi_hot:
            hotness = self.integer(a.get("max_hotness"), f"{field}.max_hotness", high=2**16)
        elif a.get("max_hotness", 1) != 1:
            self.fail(f"{field}.max_hotness", f"1 for a one-hot feature, got {_quoted(a['max_hotness'])}")
        else:
            hotness = 1
        stated = self.choice(a.get("combiner") or "sum", f"{field}.combiner", COMBINERS)
        return CategoricalFeature(
            name=name,
            cardinality=cardinality,
            dim=self.dim(name, a, cardinality),
            hotness=hotness,
            combiner=self.combiner or stated,
            transform=self.transform(a, field),
            multi_hot=multi_hot,
            dtype=self.dtype(a, field, CATEGORICAL_DTYPES),
        )

    def dim(self, name: str, a: dict, cardinality: int) -> int:
        if "embedding_dim" not in a:
            return default_dim(cardinality)
        return self.integer(a["embedding_dim"], f"feature_spec.{name}.embedding_dim", low=0, high=MAX_DIM)

    def numeric(self, name: str, a: dict) -> NumericFeature:
        field = f"feature_spec.{name}"
        for key in ("cardinality", "max_hotness", "embedding_dim", "combiner"):
            if key in a:
                self.fail(f"{field}.{key}", "no such attribute of a numerical feature")
        return NumericFeature(name, self.transform(a, field), self.dtype(a, field, NUMERIC_DTYPES))

    def other(self, name: str, a: dict) -> None:
        if "dtype" in a and not isinstance(a["dtype"], str):
            self.fail(f"feature_spec.{name}.dtype", f"a type name, got {_quoted(a['dtype'])}")
        self.transform(a, f"feature_spec.{name}")

    def dtype(self, a: dict, field: str, choices: tuple[str, ...]) -> str | None:
        return self.choice(a["dtype"], f"{field}.dtype", choices) if a.get("dtype") is not None else None

    def transform(self, a: dict, field: str) -> Any:
        transform = a.get("transform")
        names = transform if isinstance(transform, list) else [transform]
        if transform is not None and not isinstance(transform, dict) and not all(isinstance(n, str) for n in names):
            self.fail(f"{field}.transform", f"a name, a mapping or a list of names, got {_quoted(transform)}")
        return transform

    def sources(self, value: Any, features: dict, channels: dict) -> dict[str, tuple[SourceChunk, ...]]:
        """A spec without sources describes a model; one with sources describes a data set and needs both mappings."""
        value = self.mapping(value, "source_spec", MAPPINGS)
        if not value:
            return {}
        sources = {}
        for mapping in MAPPINGS:
            field = f"source_spec.{mapping}"
            if not isinstance(value.get(mapping), list) or not value[mapping]:
                self.fail(field, f"a list of chunks, got {_quoted(value.get(mapping))}")
            chunks = [self.chunk(c, f"{field}[{i}]", features) for i, c in enumerate(value[mapping])]
            if len(chunks) > 1 and any(c.type != "csv" for c in chunks):
                self.fail(field, f"exactly one chunk unless all are csv, got {len(chunks)}")
            listed = [name for c in chunks for name in c.features]
            if (repeated := find_repeated(listed)) is not None:
                self.fail(field, f"each feature in one chunk, got {repeated!r} twice")
            for channel, names in channels.items():
                missing = [name for name in names if name not in listed]
                if missing and (channel != "map" or mapping == "test"):
                    self.fail(field, f"every feature of channel {channel}, got none called {missing[0]!r}")
            sources[mapping] = tuple(chunks)
        return sources

    def chunk(self, value: Any, field: str, features: dict) -> SourceChunk:
        value = self.mapping(value, field, CHUNK_KEYS)
        kind = self.choice(value.get("type"), f"{field}.type", CHUNK_TYPES)
        names = self.names(value.get("features"), f"{field}.features")
        for name in names:
            if name not in features:
                self.fail(f"{field}.features", f"features that feature_spec defines, got {name!r}")
        files = self.names(value.get("files"), f"{field}.files")
        if not files:
            self.fail(f"{field}.files", "at least one file, got none")
        return SourceChunk(kind, tuple(names), tuple(files))


def find_repeated(names: Iterable[str]) -> str | None:
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _quoted(value: Any) -> str:
    """For a message; a file of another kind may be one long text."""
    text = repr(value)
    return text if len(text) <= QUOTED else f"{text[:QUOTED]}..."
