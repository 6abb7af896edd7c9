"""The feature spec: which columns a data set has, how wide their tables are, and where each lands in the model.

Field names are those of the original's Oct-2022 feature spec (`feature_spec`, `source_spec`, `channel_spec`,
`metadata`), so its files load. Needs neither torch nor the native library.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from widedeep import atomic
from widedeep.errors import InputError
from widedeep.feature_spec_parse import MAX_DIM, find_repeated, parse
from widedeep.features import (
    COMBINERS,
    MAPPINGS,
    STATISTICS,
    CategoricalFeature,
    NumericFeature,
    SourceChunk,
    default_dim,
)

__all__ = [
    "MAPPINGS",
    "STATISTICS",
    "CategoricalFeature",
    "DeepColumn",
    "FeatureSpec",
    "NumericFeature",
    "SourceChunk",
    "default_dim",
    "find_repeated",
]

PAD_TO = 64


class DeepColumn(NamedTuple):
    """A slice of the deep input; `kind` is "table" or "numeric", `offset` and `width` count columns."""

    name: str
    kind: str
    offset: int
    width: int


@dataclass(frozen=True)
class FeatureSpec:
    """Columns of a data set and their places in the model.

    Args:
        categorical: one table each, in declared order: one-hot features first, then multi-hot ones. Kept as a tuple.
        numeric: in declared order. Kept as a tuple.
        label: name of the 0/1 column.
        group: name of the column whose equal values are ranked together (the `map` channel), or None.
        sources: mapping name -> chunks; empty, or exactly `train` and `test`.
        metadata: free; `statistics`, if there, tells data sets apart whose ids and numbers mean different things, and
            `numeric` says what their numbers are stored as.
        other: attributes of features that are no model input (label, group, unused columns), kept for saving.
        directory: where the spec was loaded from; source files are relative to it.
    Raises:
        InputError: two features have one name or one column of the deep input; a combiner is unknown; a one-hot feature
            comes after a multi-hot one.
    """

    categorical: Sequence[CategoricalFeature]
    numeric: Sequence[NumericFeature]
    label: str
    group: str | None = None
    sources: Mapping[str, tuple[SourceChunk, ...]] = field(default_factory=dict)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    other: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    directory: Path | None = field(default=None, compare=False)

    def __post_init__(self):
        object.__setattr__(self, "categorical", tuple(self.categorical))
        object.__setattr__(self, "numeric", tuple(self.numeric))
        self._check()

    def _check(self) -> None:
        """What would otherwise become another model without a word, here or when the spec is saved and loaded."""
        features = (*self.names, *self.numeric_names, self.label, *([self.group] if self.group else []))
        columns = (*self.numeric_names, *(f"{name}_embedding" for name in self.names))
        for names in (features, columns):
            if (repeated := find_repeated(names)) is not None:
                raise InputError(f"feature spec: expected each name once, got {repeated!r} twice")
        for f in self.categorical:
            if f.combiner not in COMBINERS:
                raise InputError(f"feature spec: {f.name}: expected combiner sum or mean, got {f.combiner!r}")
        for before, f in pairwise(self.categorical):
            if _is_list(before) and not _is_list(f):
                raise InputError(f"feature spec: expected one-hot features first, got {f.name!r} after {before.name!r}")

    @classmethod
    def load(
        cls, path: str | Path, *, embedding_sizes: str | Path | None = None, combiner: str | None = None
    ) -> "FeatureSpec":
        """Reads a feature spec.

        Args:
            path: a YAML file, or a directory that holds `feature_spec.yaml`.
            embedding_sizes: a JSON file `{feature: dim}` naming every categorical feature; wins over `embedding_dim`.
                A feature with neither gets `default_dim(cardinality)`; one of dim 0 is in the wide part only.
            combiner: of all multi-hot features; None takes what each says, "sum" where it says nothing.

        Raises:
            InputError: the file is missing or breaks a rule; the sentence names file and field.
        """
        path = Path(path)
        if path.is_dir():
            path = path / "feature_spec.yaml"
        try:
            d = yaml.load(path.read_text(encoding="utf-8"), Loader=UniqueKeyLoader)
        except (OSError, UnicodeDecodeError) as e:
            raise InputError(f"{path}: expected a readable feature spec, got {_reason(e)}") from e
        except yaml.YAMLError as e:
            raise InputError(f"{path}: expected YAML, got {' '.join(str(e).split())}") from e
        spec = cls.from_dict(d, path, combiner=combiner)
        if embedding_sizes is None:
            return spec
        sizes = _load_sizes(Path(embedding_sizes))
        if missing := [name for name in spec.names if name not in sizes]:
            raise InputError(f"{embedding_sizes}: {missing[0]}: expected the embedding dim of the feature, got none")
        if unknown := [name for name in sizes if name not in spec.names]:
            raise InputError(f"{embedding_sizes}: {unknown[0]}: expected a categorical feature of {path}")
        return replace(spec, categorical=[replace(f, dim=sizes[f.name]) for f in spec.categorical])

    @classmethod
    def from_dict(
        cls,
        d: Any,
        where: str | Path,
        *,
        combiner: str | None = None,
    ) -> "FeatureSpec":
        """Checks `d` (the parsed YAML) and builds the spec; `where` names it in errors, and is its file if a Path."""
        return cls(**parse(d, where, combiner))

    @classmethod
    def outbrain(cls, name: str = "outbrain") -> "FeatureSpec":
        """The package's Outbrain spec: 13 tables of dims summing to 976, and 13 numeric columns.

        Args:
            name: "outbrain"; "outbrain-128", whose `campaign_id` has dim 128 as in the original's code;
                "outbrain-multihot", the Oct-2022 release: three multi-hot tables more, dims summing to 1235; or
                "outbrain-spark", the same features as "outbrain" under the names of the Feb-2021 release.
        """
        path = Path(__file__).with_name("specs") / f"{name}.yaml"
        if not path.is_file():
            known = ", ".join(sorted(p.stem for p in path.parent.glob("*.yaml")))
            raise InputError(f"feature spec {name!r}: expected one of {known}")
        return cls.load(path)

    def to_dict(self) -> dict[str, Any]:
        """The YAML form, with every embedding dim written out."""
        features: dict[str, Any] = {}
        one_hot: list[str] = []
        multi_hot: list[str] = []
        for f in self.categorical:
            entry: dict[str, Any] = {"cardinality": f.cardinality, "embedding_dim": f.dim}
            if _is_list(f):
                entry |= {"max_hotness": f.hotness, "combiner": f.combiner}
            (multi_hot if "max_hotness" in entry else one_hot).append(f.name)
            features[f.name] = entry | _optional(f)
        features |= {f.name: _optional(f) for f in self.numeric}
        for name in [self.label, *([self.group] if self.group else []), *self.other]:
            features[name] = dict(self.other.get(name, {}))
        return {
            "feature_spec": features,
            "source_spec": {
                mapping: [{"type": c.type, "features": list(c.features), "files": list(c.files)} for c in chunks]
                for mapping, chunks in self.sources.items()
            },
            "channel_spec": {
                "onehot_categorical": one_hot,
                "multihot_categorical": multi_hot,
                "numerical": [f.name for f in self.numeric],
                "label": [self.label],
                "map": [self.group] if self.group else [],
            },
            "metadata": dict(self.metadata),
        }

    def to_yaml(self) -> str:
        """`to_dict` as the text of a file."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    def without_sources(self) -> "FeatureSpec":
        """The same, of no files: as a model keeps it."""
        return replace(self, sources={})

    def with_statistics(self, digest: str, numeric: str) -> "FeatureSpec":
        """The same, of data that was encoded with the statistics of a digest, its numbers stored as `numeric`."""
        return replace(self, metadata={**self.metadata, "statistics": digest, "numeric": numeric})

    def check_statistics(self, trained: "FeatureSpec", model: Path) -> None:
        """Refuses this spec's data for a model that was trained with another's.

        Raises:
            InputError: both know their statistics, and they differ: an id stands for another value.
        """
        ours, theirs = (spec.metadata.get("statistics") for spec in (self, trained))
        if ours and theirs and ours != theirs:
            raise InputError(
                f"{self.directory}: was encoded with other statistics (vocabularies, scales) than the rows that {model}"
                " was trained with: expected a data set made with --stats of that one"
            )

    def save(self, path: str | Path) -> None:
        """Writes the YAML, whole or not at all."""
        with atomic.file(Path(path)) as partial:
            partial.write_text(self.to_yaml(), encoding="utf-8")

    def source_files(self, mapping: str) -> list[Path]:
        """Paths of all files (of directories, for shards) of a mapping, chunk after chunk."""
        root = self.directory or Path()
        return [root / name for chunk in self.sources.get(mapping, ()) for name in chunk.files]

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the categorical features."""
        return tuple(f.name for f in self.categorical)

    @cached_property
    def numeric_names(self) -> tuple[str, ...]:
        return tuple(f.name for f in self.numeric)

    @cached_property
    def cardinalities(self) -> tuple[int, ...]:
        return tuple(f.cardinality for f in self.categorical)

    @cached_property
    def dims(self) -> tuple[int, ...]:
        return tuple(f.dim for f in self.categorical)

    @cached_property
    def hotness(self) -> tuple[int, ...]:
        return tuple(f.hotness for f in self.categorical)

    @cached_property
    def mean(self) -> tuple[int, ...]:
        """1 for tables whose rows are averaged, 0 for those summed (in the deep part; the wide part always sums)."""
        return tuple(int(f.combiner == "mean") for f in self.categorical)

    @cached_property
    def hot_start(self) -> tuple[int, ...]:
        """First id column of each feature."""
        return _starts(self.hotness)

    @cached_property
    def id_columns(self) -> int:
        return sum(self.hotness)

    @cached_property
    def row_base(self) -> tuple[int, ...]:
        """First row of each feature in the flat wide table."""
        return _starts(self.cardinalities)

    @cached_property
    def total_rows(self) -> int:
        return sum(self.cardinalities)

    @cached_property
    def deep_columns(self) -> tuple[DeepColumn, ...]:
        """Slices of the deep input, sorted by column name; the column of a table is called `<feature>_embedding`.

        A feature of dim 0 has none here.
        """
        columns = [(f"{f.name}_embedding", "table", f.dim) for f in self.categorical if f.dim]
        columns += [(f.name, "numeric", 1) for f in self.numeric]
        columns.sort()
        starts = _starts([width for *_, width in columns])
        return tuple(DeepColumn(name, kind, start, width) for (name, kind, width), start in zip(columns, starts))

    @cached_property
    def _offsets(self) -> dict[str, int]:
        return {c.name: c.offset for c in self.deep_columns}

    @cached_property
    def table_columns(self) -> tuple[int, ...]:
        """First deep input column of each table; of one without columns (dim 0) `deep_width`, where there is none."""
        return tuple(self._offsets[f"{f.name}_embedding"] if f.dim else self.deep_width for f in self.categorical)

    @cached_property
    def numeric_columns(self) -> tuple[int, ...]:
        """Deep input column of each numeric feature."""
        return tuple(self._offsets[f.name] for f in self.numeric)

    @cached_property
    def deep_width(self) -> int:
        return sum(self.dims) + len(self.numeric)

    @cached_property
    def padded_width(self) -> int:
        """`deep_width` rounded up to a multiple of 64."""
        return -(-self.deep_width // PAD_TO) * PAD_TO

    def parameter_count(self, hidden: Sequence[int]) -> int:
        """Weights of the whole model: tables, layers of these widths, output, wide table, wide numerics and bias."""
        widths = [self.deep_width, *hidden, 1]
        deep = sum(f.cardinality * f.dim for f in self.categorical)
        deep += sum(i * o + o for i, o in pairwise(widths))
        return deep + self.total_rows + len(self.numeric) + 1


class UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word; a feature defined twice is an error here."""

    def construct_mapping(self, node, deep=False):
        seen = set()
        for key, _ in node.value:
            if key.tag == "tag:yaml.org,2002:merge" or not isinstance(key, yaml.ScalarNode):
                continue  # merges may repeat; a list or a map for a key PyYAML refuses itself
            if key.value in seen:
                line = key.start_mark.line + 1
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key.value!r} a second time in line {line}", problem_mark=None
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def _starts(sizes: Sequence[int]) -> tuple[int, ...]:
    return tuple(accumulate(sizes, initial=0))[:-1]


def _is_list(f: CategoricalFeature) -> bool:
    return f.multi_hot or f.hotness > 1


def _optional(f: CategoricalFeature | NumericFeature) -> dict[str, Any]:
    return {key: value for key in ("dtype", "transform") if (value := getattr(f, key)) is not None}


def _reason(e: Exception) -> str:
    return (e.strerror or str(e)).lower() if isinstance(e, OSError) else str(e)


def _load_sizes(path: Path) -> dict[str, int]:
    try:
        sizes = json.loads(path.read_text(encoding="utf-8"))
    except OSError as e:
        raise InputError(f"{path}: expected a readable JSON file of embedding sizes, got {_reason(e)}") from e
    except ValueError as e:
        raise InputError(f"{path}: expected JSON, got {e}") from e
    if not isinstance(sizes, dict):
        raise InputError(f"{path}: expected an object of feature names and dims, got {sizes!r}")
    for name, dim in sizes.items():
        if isinstance(dim, bool) or not isinstance(dim, int) or dim < 0:
            raise InputError(f"{path}: {name}: expected an integer >= 0, got {dim!r}")
        if dim > MAX_DIM:
            raise InputError(f"{path}: {name}: expected an integer <= {MAX_DIM}, got {dim}")
    return sizes
