"""What the encoders learned, as a file of the data set: `<out>/statistics/statistics.json`."""

import json
from pathlib import Path

from preprocess.tabular.spec import Feature, TabularSpec
from widedeep.errors import InputError
from widedeep.feature_spec import STATISTICS

FILE = "statistics.json"


def save(spec: TabularSpec, out: Path) -> None:
    learned = {f.name: {"transform": spec.transform(f.name), **f.encoder.state()} for f in _kept(spec)}
    (out / STATISTICS).mkdir()
    (out / STATISTICS / FILE).write_text(json.dumps({"features": learned}, indent=1) + "\n", encoding="utf-8")


def load(spec: TabularSpec, directory: Path) -> None:
    """Give the encoders what an earlier run learned; `directory` is its output or the statistics inside.

    Raises:
        InputError: the file is missing or damaged, or was learned with other transforms.
    """
    path = directory / STATISTICS / FILE if (directory / STATISTICS / FILE).is_file() else directory / FILE
    try:
        saved = json.loads(path.read_text(encoding="utf-8"))["features"]
        for feature in _kept(spec):
            state = saved[feature.name]
            if state["transform"] != spec.transform(feature.name):
                raise InputError(f"{path}: {feature.name}: was learned with another transform than {spec.path} has")
            if not feature.crossed:
                feature.encoder.load(state)
            elif any(state.get(key) != value for key, value in feature.encoder.state().items()):
                told = f"expected the cardinalities of {spec.path}, for the cross or its features"
                raise InputError(f"{path}: {feature.name}: {told}, got others")
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        raise InputError(f"{path}: expected the statistics of an earlier run, got {why}") from error
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(
            f"{path}: expected the statistics of an earlier run of `widedeep preprocess tabular`, for every feature of"
            f" {spec.path}"
        ) from error


def _kept(spec: TabularSpec) -> list[Feature]:
    """Features whose ids or numbers depend on what is in the file: crosses last, since theirs follow from others'."""
    learned = [f for f in spec.features if f.encoder.learns]
    return [*learned, *(f for f in spec.features if f.crossed)]
