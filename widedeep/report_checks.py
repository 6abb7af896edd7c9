"""What a report takes from the files of a run, checked as they are read, so that nothing after has to."""

import math
from collections.abc import Callable
from typing import Any

from widedeep.errors import InputError

Fields = dict[str, tuple[Callable[[Any], Any], str]]  # by name: what makes a value of it, and what was expected


def checked(values: dict[str, Any], fields: Fields, where: str) -> dict[str, Any]:
    """`values`, those of `fields` among them as these make them; null stays. where: the file, and its line if it has.

    Raises:
        InputError: one is not what was expected.
    """
    made = {}
    for name, (make, what) in fields.items():
        if (value := values.get(name)) is not None:
            try:
                made[name] = make(value)
            except (ValueError, TypeError, KeyError, AttributeError, OverflowError):
                raise InputError(f"{where}: {name}: expected {what}, got {value!r:.60}") from None
    return values | made


def _number(value: Any) -> float | None:
    """Of a string what it spells: early DLLL logs have numbers in quotes. None for what is not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        raise TypeError
    found = value if isinstance(value, int) else float(value)
    return found if math.isfinite(found) else None


def _finite(value: Any) -> float:
    if (found := _number(value)) is None:
        raise ValueError
    return found


def _whole(value: Any) -> int:
    found = _finite(value)
    if found != int(found) or not 0 <= found < 2**63:
        raise ValueError
    return int(found)


def _steps(value: Any) -> list[int]:
    return [_whole(step) for step in value]


def _bins(value: Any) -> dict[str, list[float]]:
    columns = {name: [_finite(item) for item in value[name]] for name in ("rows", "predicted", "observed")}
    for rows, *rates in zip(*columns.values(), strict=True):
        if rows <= 0 or not all(0 <= rate <= 1 for rate in rates):
            raise ValueError
    return columns


def _splits(value: Any) -> dict[str, dict[str, Any]]:
    return {name: checked(split, {"click_rate": NUMBER}, name) for name, split in value.items()}


def _features(value: Any) -> list[dict[str, Any]]:
    return [{name: feature[name] for name in ("name", "cardinality", "dim", "hotness")} for feature in value]


def _names(value: Any) -> list[str]:
    if not isinstance(value, list):
        raise TypeError
    return [str(name) for name in value]


NUMBER, WHOLE = (_number, "a number"), (_whole, "a whole number from 0")
SCORES = ("loss", "schedule", "loss_val", "auc_val", "streaming_map_val", "map_all_val", "binary_accuracy_val")
ARGUMENTS: Fields = {"num_epochs": WHOLE, "global_batch_size": WHOLE}
DLLL_LINE: Fields = {"elapsedtime": NUMBER}
RECORD: Fields = {"step": (_steps, "whole numbers from 0"), "seconds": NUMBER} | dict.fromkeys(SCORES, NUMBER)
EVALUATION: Fields = {
    "calibration": (_bins, "lists of one length: rows above 0, predicted and observed from 0 to 1"),
}
DATA: Fields = {
    "splits": (_splits, "a JSON object for each split, its click_rate a number"),
    "categorical": (_features, "a list of JSON objects with name, cardinality, dim and hotness"),
    "numeric": (_names, "a list of names"),
    "parameters": WHOLE,
}
