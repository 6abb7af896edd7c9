"""Propose a feature spec from the data: types, transforms and embedding dims, for a person to look over."""

import re
import string
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from preprocess import csv_hints, csv_io
from preprocess.engine import ThreadEngine
from preprocess.inputs import files_of
from preprocess.tabular import source, transforms
from preprocess.tabular.config import TabularConfig
from preprocess.tabular.seen import NULL_WORDS, Seen
from preprocess.tabular.spec import csv_format
from widedeep.errors import InputError

MAX_ROWS = 1 << 20
FEW_VALUES = 16  # numbers with no more distinct values are taken as categories
MANY_VALUES = 100_000  # more distinct texts than this are hashed, fewer make a vocabulary
LABELS = ("label", "click", "clicked", "is_click", "is_clicked", "target", "y")  # names taken when none is given
POSITIVE_TEXTS = ("1", "true", "yes", "y", "t", "click", "clicked", "positive")
PANDAS_INDEX = re.compile(r"__index_level_\d+__")  # as pandas calls an index without a name that it writes to a file
TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}([ T][0-9]{2}:[0-9]{2}[0-9:.]*(Z|[+-][0-9:]+)?)?")  # as ISO 8601 has it
ID_NAME = re.compile(r"(.*[_ .-])?(?i:id)|(?i:id)[_ .-].*|.*[^A-Z]I[dD]")  # id, id_ad, ad_id, adId, adID; not PAID


def infer_spec(
    inputs: Sequence[str | Path],
    label: str | None = None,
    *,
    group: str | None = None,
    max_rows: int = MAX_ROWS,
    delimiter: str | None = None,
    columns: Sequence[str] = (),
) -> tuple[dict[str, Any], list[str]]:
    """A proposal from the first `max_rows` rows.

    Numbers of more than 16 distinct values become numeric features (with log where they are far from symmetric) and,
    in buckets, categorical ones; words such as NA or ? among them are taken as no value. Texts, other numbers, and
    integers whose name says id, become categorical: by vocabulary, or hashed when there are very many. Lists and texts
    with `|` or `;` become multi-hot. Columns that hold one value, texts, ids and entries of lists that hardly repeat,
    times, the number of the row, the index of a pandas table, and columns that cannot be read, are left out. Without a
    `label` the column is taken whose name is one of `LABELS`.
    delimiter and columns are those of `metadata.csv`, for CSV files with other delimiters or without a header; None: a
    tab in files called .tsv, a comma in others.

    Returns:
        The spec as a dict for YAML, and sentences about each column that was left out, what the label was taken to
        mean, which integers were taken as numbers, and which columns are of numbers but for a few texts.
    Raises:
        InputError: a file is malformed or empty, lacks the label or the group, or has nothing else to learn from; the
            label has not two values.
    """
    if max_rows < 1:
        raise InputError(f"max_rows is {max_rows}, expected at least 1")
    inputs = files_of(inputs)
    described: dict[str, Any] = {"delimiter": delimiter} if delimiter is not None else {}
    described |= {"columns": list(columns)} if columns else {}
    csv = csv_format(inputs[0], described)
    names, faults = _columns(inputs, csv)
    label = label or _guessed_label(inputs[0], names, delimiter)
    for name in filter(None, (label, group)):
        if name in faults:
            raise InputError(f"{inputs[0]}: column {name}: {faults[name]}")
        if name not in names:
            raise InputError(f"{inputs[0]}: column {name} is missing; {_has(names, delimiter)}")
    seen = _look(inputs, names, csv, max_rows)
    spec, notes = _proposal(inputs[0], seen, faults, label, group)
    return spec | ({"metadata": {"csv": described}} if described else {}), notes


def _columns(inputs: list[Path], csv: csv_io.Format) -> tuple[list[str], dict[str, str]]:
    """The columns of the first file that can be read in all, and what is wrong with each of the others."""
    names, faults = source.column_names(inputs[0], csv)
    for path in inputs[1:]:
        faults |= source.column_names(path, csv)[1]
    return [name for name in names if name not in faults], faults


def _has(names: list[str], delimiter: str | None) -> str:
    """What a message says of the columns that are there."""
    found = csv_hints.other_delimiter(names)
    if found in (None, delimiter):
        told = f"the file has {', '.join(map(repr, names))[:200]}"
        return f"{told}; one without a header wants --columns" if csv_hints.are_values(names) else told
    return f"the file has one column, {names[0][:200]!r}, and may want --delimiter {found!r}"


def _guessed_label(path: Path, names: list[str], delimiter: str | None) -> str:
    found = [name for name in names if name.lower() in LABELS]
    if len(found) != 1:
        told = f"found {' and '.join(found)}" if found else _has(names, delimiter)
        raise InputError(f"{path}: expected --label, or one column called {', '.join(LABELS)}; {told}")
    return found[0]


def _look(inputs: list[Path], names: list[str], csv: csv_io.Format, max_rows: int) -> dict[str, Seen]:
    seen = {name: Seen() for name in names}
    rows = 0
    with ThreadEngine(1) as engine:
        for chunk in source.chunks(inputs, names, engine, TabularConfig.chunk_bytes, csv=lambda _: csv):
            for name, values in chunk.columns.items():
                seen[name].add(values)
            rows += len(chunk.rows)
            if rows >= max_rows:
                break
    if not rows:
        raise InputError(f"{inputs[0]}: expected rows, found none")
    return seen


def _proposal(
    path: Path, seen: dict[str, Seen], faults: dict[str, str], label: str, group: str | None
) -> tuple[dict[str, Any], list[str]]:
    chosen = {name: seen[name] for name in (label, group) if name}
    others = {name: column for name, column in seen.items() if name not in chosen}
    missing = []
    for name, column in chosen.items():
        if fault := column.fault or ("expected one value a row, found lists" if column.lengths else ""):
            raise InputError(f"{path}: column {name}: {fault}")
        if column.nulls:
            missing.append(f"{name}: {column.nulls} of {column.rows} rows have no value; preprocess refuses such rows")
    features, channels, left_out = _features(others)
    notes = [f"left out: {name}: {why}" for name, why in [*faults.items(), *left_out]]
    if not features:
        raise InputError(f"{path}: expected a column to learn from, found none; {'; '.join(notes)[:300]}")
    positive, negative, meaning = _label(path, seen[label], label)
    features[label] = {"transform": {"positive": [positive], "negative": [negative]}}
    if group:
        features[group] = {} if seen[group].are_int64 else {"transform": "hash"}
    channels |= {"label": [label], "map": [group] if group else []}
    integers = [name for name in channels["numerical"] if seen[name].are_whole]
    notes += [meaning, *missing]
    if integers:
        notes.append(f"integers taken as numbers: {', '.join(integers)}; one that is an id wants a vocabulary")
    for name, column in others.items():
        if strays := _strays(name, column):
            told = f"{', '.join(map(repr, strays[:3]))}{', ...' if strays[3:] else ''}"
            notes.append(f"{name}: numbers but for {told}; a numeric feature wants these in its `nulls`")
    return {"feature_spec": features, "channel_spec": channels}, notes


def _features(seen: dict[str, Seen]) -> tuple[dict[str, Any], dict[str, list[str]], list[tuple[str, str]]]:
    """The features by name, their names by channel, and of each column left out its name and why."""
    features: dict[str, Any] = {}
    channels: dict[str, list[str]] = {"onehot_categorical": [], "multihot_categorical": [], "numerical": []}
    left_out = []
    for name, column in seen.items():
        if why := _unfit(name, column):
            left_out.append((name, why))
        elif column.lengths or (not column.numbers and column.separator):
            features[name] = _multi_hot(column)
            channels["multihot_categorical"].append(name)
        elif _is_numeric(name, column):
            features[name] = {"transform": _number(column)}
            channels["numerical"].append(name)
            bucket = f"{name}_bucket"
            if bucket not in seen:
                transform = {"column": name} | _nulls(column) | {"bucketise": {"quantiles": 16}}
                features[bucket] = {"embedding_dim": 8, "transform": transform}
                channels["onehot_categorical"].append(bucket)
        else:
            features[name] = _texts(len(column.counts))
            channels["onehot_categorical"].append(name)
    tables = {f"{name}_embedding": name for kind in channels if kind != "numerical" for name in channels[kind]}
    for name in [name for name in channels["numerical"] if name in tables]:
        del features[name]
        channels["numerical"].remove(name)
        left_out.append((name, f"as a number, for the table of {tables[name]} has this name"))
    return features, channels, left_out


def _unfit(name: str, column: Seen) -> str | None:
    """Why a column makes no feature; None if it makes one."""
    distinct = len(column.counts)
    if column.fault:
        return column.fault
    if distinct < 2:
        return f"holds {'one value' if distinct else 'no value'}"
    if PANDAS_INDEX.fullmatch(name):
        return "is the index of a pandas table"
    if not column.lengths and all(TIME.fullmatch(text) for text in column.counts):
        return f"holds times, which seldom come again; `--split time:{name}:0.2` divides the rows by them"
    if distinct <= FEW_VALUES or (not column.lengths and not column.numbers and column.separator):
        return None
    if column.lengths:  # the numbers of a vector, say
        entries = column.counts.total()
        return f"its entries hardly repeat ({distinct} in {entries})" if distinct > 0.9 * entries else None
    if column.numbers_the_rows:
        return "numbers the rows"
    if not _is_numeric(name, column) and distinct > 0.9 * (column.rows - column.nulls):
        return f"its values hardly repeat ({distinct} in {column.rows} rows)"
    return None


def _is_numeric(name: str, column: Seen) -> bool:
    return column.numbers > FEW_VALUES and not (column.are_whole and ID_NAME.fullmatch(name))


def _strays(name: str, column: Seen) -> list[str]:
    """The few texts, of no usual word for no value, that keep a column from being one of numbers; empty if many do."""
    if column.are_numbers or column.lengths or ID_NAME.fullmatch(name):
        return []
    strays = []
    for text in column.counts:
        if transforms.number_of(text) is None and text.strip().lower() not in NULL_WORDS:
            strays.append(text)
            if len(strays) > 0.1 * len(column.counts):
                return []
    return strays if len(column.counts) - len(strays) > FEW_VALUES else []


def _texts(distinct: int) -> dict[str, Any]:
    dim = 8 if distinct < 32 else 16 if distinct < 1000 else 32 if distinct < 50_000 else 64
    if distinct > MANY_VALUES:
        # A power of two of twice the values seen: a third of them then share a row.
        return {"embedding_dim": dim, "cardinality": 1 << (2 * distinct - 1).bit_length(), "transform": "hash"}
    least = 1 if distinct < 32 else 2
    return {"embedding_dim": dim, "transform": {"vocabulary": {"min_count": least}}}


def _multi_hot(column: Seen) -> dict[str, Any]:
    separator = None if column.lengths else column.separator
    if separator:
        elements: Counter = Counter()
        lengths: Counter = Counter()
        for text, count in column.counts.items():
            pieces = [piece for piece in text.split(separator) if piece.strip()]
            lengths[len(pieces)] += count
            elements.update(pieces)
    else:
        elements, lengths = column.counts, column.lengths
    ordered = sorted(lengths.elements())
    hotness = max(1, ordered[int(0.99 * (len(ordered) - 1))])
    feature = _texts(len(elements)) | {"max_hotness": hotness, "combiner": "mean"}
    if separator:
        transform = feature["transform"]
        feature["transform"] = ({transform: {}} if isinstance(transform, str) else transform) | {"separator": separator}
    return feature


def _number(column: Seen) -> dict[str, Any]:
    mean = column.total / column.number_rows
    # The mean of a long-tailed column lies near its lower end.
    skewed = mean - column.low < 0.1 * (column.high - column.low)
    # A sample without a missing value says nothing about later rows.
    return _nulls(column) | {"fill": "median"} | ({"log": True} if skewed else {}) | {"standardise": True}


def _nulls(column: Seen) -> dict[str, Any]:
    return {"nulls": sorted(column.words)} if column.words else {}


def _label(path: Path, column: Seen, label: str) -> tuple[str | int | float, str | int | float, str]:
    """The value that means 1 (the larger number, a usual word for it, else the rarer), the other one, and a sentence
    that says so. Spellings that `transforms.Label` takes for one value are one, written as most rows have it.
    """
    spellings: dict[str | int | float, Counter] = {}
    for text, count in sorted(column.counts.items()):
        value = next((v for v in (transforms.number_of(text), transforms.word_of(text)) if v is not None), text)
        spellings.setdefault(value, Counter())[text] = count
    texts = [counts.most_common(1)[0][0] for counts in spellings.values()]
    if len(texts) != 2:
        found = ", ".join(repr(text) for text in texts[:5]) + (", ..." if len(texts) > 5 else "")
        raise InputError(
            f"{path}: column {label}: expected two values, found {len(texts)}: {found}; a spec written by hand may "
            "have more, with those that mean 1 in `positive`"
        )
    numbers = [number for text in texts if (number := transforms.number_of(text)) is not None]
    rows = [counts.total() for counts in spellings.values()]
    usual = [text.strip().rstrip(string.punctuation + string.whitespace).lower() in POSITIVE_TEXTS for text in texts]
    values, guessed = None, ""
    if len(numbers) == 2:
        # As a number it means 1 and 1.0: another file may have the other spelling.
        values = max(numbers), min(numbers)
        one = texts[numbers.index(values[0])]
    elif sum(usual) == 1:
        one = texts[usual.index(True)]
    else:
        one = texts[rows.index(min(rows))]
        guessed = "; a guess: the rarer of the two"
    zero = texts[1 - texts.index(one)]
    share = 100 * rows[texts.index(one)] / sum(rows)
    told = {text: " or ".join(map(repr, counts)) for text, counts in zip(texts, spellings.values())}
    meaning = f"label {label}: 1 means {told[one]} ({share:.3g} % of rows), 0 means {told[zero]}{guessed}"
    return *(values or (one, zero)), meaning
