"""Checks of a preprocessed Outbrain data set that tests of every flavour make."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from preprocess import synthetic
from preprocess.outbrain import OutbrainConfig, run
from widedeep.feature_spec import FeatureSpec
from widedeep.shards import ShardSet

if TYPE_CHECKING:  # a GPU machine need not have it
    import pandas as pd


def shuffled_raw(directory: Path, displays: int, seed: int) -> Path:
    """Synthetic raw files, about 5.2 click rows a display, with the clicks in no order."""
    synthetic.run(displays=displays, seed=seed, out=directory)
    header, *rows = (directory / "clicks_train.csv").read_text().splitlines(keepends=True)
    order = np.random.default_rng(5).permutation(len(rows))
    (directory / "clicks_train.csv").write_text(header + "".join(rows[i] for i in order))
    return directory


def files(directory: Path) -> dict[str, bytes]:
    """Contents by name; the report holds times, so it is left out."""
    paths = (p for p in sorted(directory.rglob("*")) if p.is_file() and p.name != "report.json")
    return {str(p.relative_to(directory)): p.read_bytes() for p in paths}


def check_rows(out: Path, want: "pd.DataFrame", distinct: int = 1) -> None:
    """Both splits hold the rows of `want`, which is in input order and has a column `train`; every numeric feature has
    at least `distinct` values in each."""
    spec = FeatureSpec.load(out)
    by_split = {"train": want[want.train], "test": want[~want.train].sort_values("display_id", kind="stable")}
    for split, table in by_split.items():
        shards = ShardSet.open(out / split, verify=True)
        assert shards.rows == len(table)
        got = shards.read(0, shards.rows)
        for name in (*spec.names, spec.label, *(["display_id"] if split == "test" else [])):
            np.testing.assert_array_equal(got[name], np.array(table[name].tolist()), err_msg=f"{split} {name}")
        for name in spec.numeric_names:
            assert table[name].nunique() >= distinct, f"{name} says nothing"
            np.testing.assert_allclose(got[name], table[name], rtol=1e-5, atol=1e-6, err_msg=f"{split} {name}")


def check_given_statistics(config: OutbrainConfig, again: Path) -> None:
    """The statistics that the run of `config` learned, given, make the same rows of the same data."""
    report = run(dataclasses.replace(config, out=again, stats=config.out))
    assert report["statistics"] == "given"
    before, after = files(Path(config.out)), files(again)
    assert {k for k in before if before[k] != after[k]} == {"train/manifest.json", "test/manifest.json"}
