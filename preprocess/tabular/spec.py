"""Reads a feature spec whose features carry a `transform`, and completes it with what the data taught.

A transform is a mapping, or as a shorthand a name or a list of names without settings. Keys for every feature: `column`
(the source column; default the feature's name) and `nulls` (texts taken as missing). Further keys, none of them needed:

    categorical   hash: {seed}   vocabulary: {min_count}   bucketise: {edges} or {quantiles}   (none: ids as they are)
                  cross: {features, seed} or the list of features: combinations of one-hot features (see `cross.py`);
                  it has no `column` and no `nulls` of its own
    multi-hot     hash or vocabulary; `separator` of delimited text (lists need none, nor do ids as they are), or
                  `columns` of one value each, with `mask` columns that are 0 where there is no value
    numeric       fill: number, mean or median   clip: [low, high]   log: true   standardise: true
    label         positive: value or list of values, of which train rows have at least one; 1 is 1.0 too, and the
                  texts true, false, yes and no mean TRUE and True too
                  negative: the same for 0; without it every other value is 0, with it any other is refused
    map           hash: {seed}

Texts that YAML reads as true or false (yes, no, on, off) stand in quotes.

CSV files are described in `metadata.csv`: `delimiter` (without it a tab for .tsv, a comma for others), and for files
without a header `columns`, their names in order. Where no feature has a transform, files that the spec's own
`source_spec` names need no header: their columns are the chunk's `features`, as in the original's specs of CSV files.
In `columns` and `mask`, `name[50]` stands for name_0 to name_49.
"""

import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, TypeGuard

import yaml

from preprocess import csv_io
from preprocess.tabular import transforms
from preprocess.tabular.cross import Cross
from widedeep.errors import InputError
from widedeep.feature_spec import MAPPINGS, FeatureSpec, UniqueKeyLoader, find_repeated

COMMON = ("column", "nulls")
KEYS = {
    "categorical": (*COMMON, "hash", "vocabulary", "bucketise", "cross"),
    "multi-hot": (*COMMON, "separator", "columns", "mask", "hash", "vocabulary"),
    "numeric": (*COMMON, "fill", "clip", "log", "standardise"),
    "label": (*COMMON, "positive", "negative"),
    "group": (*COMMON, "hash"),
}
LEARN_CARDINALITY = ("vocabulary", "bucketise", "cross")


@dataclass(frozen=True)
class Feature:
    """A feature and how its values are made of source columns; `hotness` 0 for what is no multi-hot feature, `crossed`
    the names of the features that a cross is made of, whose columns are its own."""

    name: str
    kind: str
    columns: tuple[str, ...]
    nulls: frozenset[str]
    encoder: Any
    separator: str | None = None
    hotness: int = 0
    mask: tuple[str, ...] = ()
    crossed: tuple[str, ...] = ()


class TabularSpec:
    """The features of a spec with their encoders.

    Attributes:
        path: the YAML file.
        features: categoricals, numerics, the label, and the group if there is one.
        csv: the format of CSV files.
        sources: mapping -> paths of the spec's own csv or parquet files, if it names any.
        has_group: mapping -> whether these files have the group; the original's train files do not.
    """

    def __init__(self, path: Path, raw: dict, features: list[Feature], spec: FeatureSpec):
        self.path, self.features = path, features
        self._raw = raw
        self.group = spec.group
        self.csv = csv_format(path, spec.metadata.get("csv"))
        self.sources = {mapping: _files(spec, mapping, path) for mapping in spec.sources}
        # As the original has them, with ids and numbers as they are, CSV files lack a header.
        crosses = [f.name for f in features if f.crossed]  # listed like other features, but no columns of the files
        is_plain = self.csv.names is None and not any(self.transform(f.name) for f in features if not f.crossed)
        chunks = [chunk for mapping in spec.sources.values() for chunk in mapping if is_plain and chunk.type == "csv"]
        root = (spec.directory or Path()).absolute()
        self._listed = {
            root / file: tuple(name for name in chunk.features if name not in crosses)
            for chunk in chunks
            for file in chunk.files
        }
        self.has_group = {m: any(spec.group in c.features for c in chunks) for m, chunks in spec.sources.items()}

    @classmethod
    def load(cls, path: str | Path) -> "TabularSpec":
        """Read and check a spec. InputError names the file and the field."""
        path = Path(path)
        path = path / "feature_spec.yaml" if path.is_dir() else path
        try:
            raw = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
        except OSError as error:
            why = (error.strerror or str(error)).lower()
            raise InputError(f"{path}: expected a readable YAML file, got {why}") from error
        except (UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"{path}: expected a readable YAML file, got {' '.join(str(error).split())}") from error
        spec = FeatureSpec.from_dict(_with_cardinalities(raw, lambda name: 1), path)
        attributes = raw["feature_spec"]
        kinds = {f.name: "multi-hot" if f.multi_hot else "categorical" for f in spec.categorical}
        fields = {f.name: _Fields(path, f.name, kinds[f.name], f.transform) for f in spec.categorical}
        given = {name: (attributes[name] or {}).get("cardinality") for name in fields}
        plain = [f for f in spec.categorical if not fields[f.name].is_cross]
        made = {f.name: fields[f.name].categorical(given[f.name], f.hotness) for f in plain}
        features = [made[name] if name in made else fields[name].cross(given[name], made) for name in fields]
        features += [_Fields(path, f.name, "numeric", f.transform).numeric() for f in spec.numeric]
        label = _Fields(path, spec.label, "label", spec.other[spec.label].get("transform")).label()
        for feature in features:
            if leaked := {*feature.columns, *feature.mask} & {*label.columns}:
                raise InputError(
                    f"{path}: feature_spec.{feature.name}: expected other columns than the label's, got {min(leaked)!r}"
                )
        features.append(label)
        if spec.group:
            features.append(_Fields(path, spec.group, "group", spec.other[spec.group].get("transform")).group())
        return cls(path, raw, features, spec)

    def columns(self, without: Collection[str] = ()) -> tuple[str, ...]:
        """Source columns, each once, of all features but those of the kinds `without`."""
        features = [f for f in self.features if f.kind not in without]
        return tuple(dict.fromkeys(column for f in features for column in (*f.columns, *f.mask)))

    def csv_of(self, path: str | Path) -> csv_io.Format:
        """The format of a CSV file. One of the spec's own whose first line names no column has those of its chunk."""
        path = Path(path)
        names = self._listed.get(path.absolute()) or self._listed.get(path.absolute().parent)  # in a directory
        if names is None or not {*self.columns()}.isdisjoint(csv_io.read_header(path, self.csv)):
            return self.csv
        return csv_io.Format(self.csv.delimiter, names)

    def transform(self, name: str) -> Any:
        """A feature's transform as the YAML has it."""
        return (self._raw["feature_spec"][name] or {}).get("transform")

    def completed(self, train_group: bool = True) -> FeatureSpec:
        """The spec of the data set that is written: cardinalities as learned, shards as sources."""
        learned = {f.name: f.encoder.cardinality for f in self.features if hasattr(f.encoder, "cardinality")}
        names = [f.name for f in self.features]
        listed = {"train": [n for n in names if train_group or n != self.group], "test": names}
        chunks = {m: [{"type": "shards", "features": listed[m], "files": [m]}] for m in MAPPINGS}
        raw = _with_cardinalities(self._raw, learned.__getitem__, overwrite=True)
        return FeatureSpec.from_dict(raw | {"source_spec": chunks}, self.path)


def csv_format(path: str | Path, value: Any) -> csv_io.Format:
    """The `csv` of a spec's metadata, or of the command line, checked. InputError names `path` and the field."""
    field = f"{path}: metadata.csv"
    value = {} if value is None else value
    if not isinstance(value, dict) or any(key not in ("delimiter", "columns") for key in value):
        raise InputError(f"{field}: expected a mapping with the keys delimiter and columns, got {value!r}")
    delimiter, names = value.get("delimiter"), value.get("columns")
    is_mark = isinstance(delimiter, str) and len(delimiter) == 1 and delimiter.isascii() and delimiter not in '"\r\n'
    if "delimiter" in value and not is_mark:
        raise InputError(f"{field}.delimiter: expected one ASCII character such as ; or a tab, got {delimiter!r}")
    if names is not None:
        if not isinstance(names, list) or not names or not all(isinstance(n, str) and n for n in names):
            raise InputError(f"{field}.columns: expected a list of names, got {names!r}")
        names = tuple(expanded(names))
        if (repeated := find_repeated(names)) is not None:
            raise InputError(f"{field}.columns: expected each name once, got {repeated!r} twice")
    return csv_io.Format(delimiter, names)


def expanded(names: list[str]) -> list[str]:
    """`name[50]` as name_0 to name_49."""
    result = []
    for name in names:
        match = re.fullmatch(r"(.+)\[([1-9][0-9]{0,4})\]", name)
        result += [f"{match[1]}_{i}" for i in range(int(match[2]))] if match else [name]
    return result


def _with_cardinalities(raw: Any, cardinality: Any, overwrite: bool = False) -> Any:
    """A copy of the parsed YAML in which categorical features that learn their cardinality from data have one."""
    features, channels = (raw.get(k) if isinstance(raw, dict) else None for k in ("feature_spec", "channel_spec"))
    if not isinstance(features, dict) or not isinstance(channels, dict):
        return raw  # FeatureSpec says what is wrong with it
    lists = [channels.get(c) for c in ("onehot_categorical", "multihot_categorical")]
    names = [name for names in lists if isinstance(names, list) for name in names if isinstance(name, str)]
    features = dict(features)
    for name in names:
        attributes = features.get(name)
        if isinstance(attributes, dict) and (overwrite or _learns_cardinality(attributes)):
            features[name] = attributes | {"cardinality": cardinality(name)}
    return raw | {"feature_spec": features}


def _learns_cardinality(attributes: dict) -> bool:
    transform = attributes.get("transform")
    keys = [transform] if isinstance(transform, str) else transform if isinstance(transform, list | dict) else []
    return "cardinality" not in attributes and any(key in keys for key in LEARN_CARDINALITY)


def _files(spec: FeatureSpec, mapping: str, path: Path) -> list[Path]:
    chunks = spec.sources[mapping]
    if len(chunks) != 1:
        raise InputError(f"{path}: source_spec.{mapping}: expected one chunk with all columns, got {len(chunks)}")
    # The spec of a finished data set names its shards: it says how rows were made, not where they came from.
    return [] if chunks[0].type == "shards" else spec.source_files(mapping)


class _Fields:
    """The `transform` of one feature, checked key by key."""

    def __init__(self, path: Path, name: str, kind: str, transform: Any):
        self._path, self._name, self._kind = path, name, kind
        if isinstance(transform, str | list):
            transform = {key: {} for key in ([transform] if isinstance(transform, str) else transform)}
        self._fields: dict[str, Any] = dict(transform or {})
        for key in self._fields:
            if key not in KEYS[kind]:
                self.fail(str(key), f"one of the keys {', '.join(KEYS[kind])}")
        self._nulls = frozenset(self.texts("nulls"))

    def fail(self, key: str, expected: str) -> NoReturn:
        raise InputError(f"{self._path}: feature_spec.{self._name}.transform.{key}: expected {expected}")

    def texts(self, key: str) -> list[str]:
        value = self._fields.get(key, [])
        value = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) for item in value):
            self.fail(key, f"quotes around what YAML reads as true or false (yes, no, on, off), got {value!r}")
        if not all(isinstance(item, str | int | float) for item in value):
            self.fail(key, f"a text or a list of texts, got {value!r}")
        return [str(item) for item in value]

    def flag(self, key: str) -> bool:
        value = self._fields.get(key, False)
        if not isinstance(value, bool) and value != {}:
            self.fail(key, f"true or false, got {value!r}")
        return value is not False

    def settings(self, key: str, known: tuple[str, ...]) -> dict[str, Any]:
        value = self._fields[key]
        if value is None or value is True:
            return {}
        if not isinstance(value, Mapping) or any(k not in known for k in value):
            self.fail(key, f"a mapping with the keys {', '.join(known)}, got {value!r}")
        return dict(value)

    def integer(self, key: str, value: Any, low: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value < 2**63:
            self.fail(key, f"an integer of at least {low}, got {value!r}")
        return value

    def feature(self, encoder: Any, **more: Any) -> Feature:
        columns = more.pop("columns", None) or [self.source()]
        return Feature(self._name, self._kind, tuple(columns), self._nulls, encoder, **more)

    def source(self) -> str:
        column = self._fields.get("column", self._name)
        if not isinstance(column, str):
            self.fail("column", f"the name of a source column, got {column!r}")
        return column

    def categorical(self, cardinality: int | None, hotness: int) -> Feature:
        kinds = [key for key in ("hash", "vocabulary", "bucketise") if key in self._fields]
        if len(kinds) > 1:
            self.fail(kinds[1], f"only one of hash, vocabulary and bucketise, got {' and '.join(kinds)}")
        if kinds:
            encoder = getattr(self, f"_{kinds[0]}")(cardinality)
        else:
            assert cardinality is not None  # `FeatureSpec` refuses that
            encoder = transforms.Ids(cardinality)
        if self._kind == "categorical":
            return self.feature(encoder)
        columns, mask = expanded(self.texts("columns")), expanded(self.texts("mask"))
        separator = self._fields.get("separator")
        if separator is not None and (not isinstance(separator, str) or not separator):
            self.fail("separator", f"a text that stands between values, got {separator!r}")
        if len(columns) > hotness:
            self.fail("columns", f"at most max_hotness ({hotness}) columns, got {len(columns)}")
        if columns and (separator or "column" in self._fields):
            self.fail("columns", "no `column` and no `separator` beside `columns`")
        if not (separator or columns or kinds):
            separator = ","  # ids in text are a list, as `[1, 2, 3]` in the CSV files of the original
        if mask and len(mask) != len(columns):
            self.fail("mask", f"one column for each of the {len(columns)} of `columns`, got {len(mask)}")
        return self.feature(encoder, columns=columns, separator=separator, hotness=hotness, mask=tuple(mask))

    @property
    def is_cross(self) -> bool:
        return "cross" in self._fields

    def cross(self, cardinality: int | None, features: Mapping[str, Feature]) -> Feature:
        """A cross of some of `features`, the categorical ones that are no crosses."""
        if other := [key for key in self._fields if key != "cross"]:
            self.fail(other[0], "no such key beside `cross`, whose values are those of the crossed features")
        value = self._fields["cross"]
        settings = self.settings("cross", ("features", "seed")) if isinstance(value, Mapping) else {"features": value}
        names = settings.get("features")
        if not isinstance(names, list) or len(names) < 2 or not all(isinstance(name, str) for name in names):
            self.fail("cross", f"a list of two or more features, got {names!r}")
        if (repeated := find_repeated(names)) is not None:
            self.fail("cross", f"each feature once, got {repeated!r} twice")
        for name in names:
            if name not in features or features[name].hotness:
                self.fail("cross", f"features of onehot_categorical that are no crosses, got {name!r}")
        seed = self.integer("cross.seed", settings.get("seed", 0), 0)
        if "seed" in settings and cardinality is None:
            self.fail("cross.seed", "a cardinality beside it, without which nothing is hashed")
        crossed = [features[name] for name in names]
        field = f"{self._path}: feature_spec.{self._name}"
        encoder = Cross(field, {f.name: f.encoder for f in crossed}, cardinality, seed)
        columns = list(dict.fromkeys(column for f in crossed for column in f.columns))
        return self.feature(encoder, columns=columns, crossed=tuple(names))

    def _hash(self, cardinality: int) -> transforms.Hash:
        seed = self.settings("hash", ("seed",)).get("seed", 0)
        return transforms.Hash(cardinality, self.integer("hash.seed", seed, 0))

    def _vocabulary(self, cardinality: int | None) -> transforms.Vocabulary:
        least = self.settings("vocabulary", ("min_count",)).get("min_count", 1)
        return transforms.Vocabulary(self.integer("vocabulary.min_count", least, 1), cardinality)

    def _bucketise(self, cardinality: int | None) -> transforms.Buckets:
        settings = self.settings("bucketise", ("edges", "quantiles"))
        if len(settings) != 1:
            self.fail("bucketise", f"edges or quantiles, got {settings!r}")
        if cardinality == 1:
            self.fail("bucketise", "a cardinality of at least 2, for missing values and one bucket, got 1")
        if "quantiles" in settings:
            return transforms.Buckets(None, self.integer("bucketise.quantiles", settings["quantiles"], 2), cardinality)
        edges = settings["edges"]
        if not isinstance(edges, list) or not edges or not all(_is_number(e) for e in edges):
            self.fail("bucketise.edges", f"a list of numbers, got {edges!r}")
        if any(a >= b for a, b in pairwise(edges)):
            self.fail("bucketise.edges", f"rising numbers, got {edges!r}")
        if cardinality is not None and cardinality < len(edges) + 2:
            self.fail(
                "bucketise.edges", f"at most {cardinality - 2} edges for cardinality {cardinality}, got {len(edges)}"
            )
        return transforms.Buckets([float(e) for e in edges], 0, cardinality)

    def numeric(self) -> Feature:
        fill, clip = self._fields.get("fill"), self._fields.get("clip")
        if fill is not None and fill not in ("mean", "median") and not _is_number(fill):
            self.fail("fill", f"a number, mean or median, got {fill!r}")
        if clip is not None:
            if (
                not isinstance(clip, list)
                or len(clip) != 2
                or not all(_is_number(c) for c in clip)
                or clip[0] > clip[1]
            ):
                self.fail("clip", f"[low, high], got {clip!r}")
            clip = (float(clip[0]), float(clip[1]))
        fill = float(fill) if _is_number(fill) else fill
        return self.feature(transforms.Number(fill, clip, self.flag("log"), self.flag("standardise")))

    def label(self) -> Feature:
        if "positive" not in self._fields:
            if "negative" in self._fields:
                self.fail("negative", "positive beside it")
            return self.feature(transforms.Label(None))
        positive = self.values("positive")
        negative = self.values("negative") if "negative" in self._fields else frozenset()
        both = [v for v in map(str, negative) if transforms.stands_in(positive, v)]
        both += [v for v in map(str, positive) if transforms.stands_in(negative, v)]
        if both:
            self.fail("negative", f"values that are not positive, got {min(both)!r}")
        return self.feature(transforms.Label(positive, negative))

    def values(self, key: str) -> transforms.Values:
        """Texts, and numbers also as such."""
        texts, given = self.texts(key), self._fields[key]
        if not texts:
            self.fail(key, "at least one value, got none")
        numbers = [item for item in (given if isinstance(given, list) else [given]) if not isinstance(item, str)]
        return frozenset([*texts, *numbers])

    def group(self) -> Feature:
        seed = self.settings("hash", ("seed",)).get("seed", 0) if "hash" in self._fields else 0
        return self.feature(transforms.Group("hash" in self._fields, self.integer("hash.seed", seed, 0)))


def _is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
