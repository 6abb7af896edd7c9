"""Pass 1 over the clicks: parse, split, count. Each block of the file is independent; what it counts is merged."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

from preprocess import csv_io, kernels
from preprocess.csv_io import NULL_TIME, Block
from preprocess.outbrain import layout, store
from preprocess.outbrain.columns import AdCounts, Documents, Events, Promoted, count_ads
from preprocess.outbrain.flavour import Flavour
from preprocess.xp import arrays, take, to_host_all

SPLITS = ("train", "test")
ROW = np.dtype([("display_id", "<i4"), ("ad_id", "<i4"), ("clicked", "u1")])
_SCAN = "scan.npz"
_MERGE_ADS = 1 << 18
MISSING_AGE = layout.MAX_AGE_DAYS + 1


@dataclass(frozen=True)
class Task:
    """Block `index` of clicks_train.csv; its rows are written to `work`, the directory of the tables."""

    block: Block
    index: int
    work: Path
    flavour: Flavour
    device: str


class RowFile(NamedTuple):
    """A file of rows as `ROW`: how many, their first and last display, and whether displays ascend in it."""

    path: Path
    rows: int
    first: int
    last: int
    ascends: bool


@dataclass(frozen=True)
class Scan:
    """What a block, or all of them together, says of the clicks.

    Args:
        ads: counts by ad.
        ages: [2, 3652] int64, train rows (or all, see `Flavour`) by age of the event page and of the landing page; the
            last column is unknown.
        clicks: clicked rows by split.
        parts: by split, the files of rows in input order.
    """

    ads: AdCounts
    ages: np.ndarray
    clicks: dict[str, int]
    parts: dict[str, list[RowFile]] = field(default_factory=dict)

    @classmethod
    def merge(cls, scans: Iterable["Scan"]) -> "Scan":
        """Adds up. Ad counts wait until there are as many as are merged already: memory does not grow with the number
        of blocks, and each count is sorted a few times only."""
        waiting: list[AdCounts] = []
        ads, ages = AdCounts.merge([]), np.zeros((2, MISSING_AGE + 1), np.int64)
        clicks = dict.fromkeys(SPLITS, 0)
        parts: dict[str, list[RowFile]] = {split: [] for split in SPLITS}
        for scan in scans:
            waiting.append(scan.ads)
            if sum(len(counts.ad) for counts in waiting) > max(len(ads.ad), _MERGE_ADS):
                ads, waiting = AdCounts.merge([ads, *waiting]), []
            ages += scan.ages
            for split in SPLITS:
                clicks[split] += scan.clicks[split]
                parts[split] += scan.parts[split]
        return cls(AdCounts.merge([ads, *waiting]), ages, clicks, parts)

    def rows(self, split: str) -> int:
        return sum(part.rows for part in self.parts[split])

    def save(self, work: Path) -> dict[str, Any]:
        """Writes the arrays to `work`; returns the rest as plain values for `load`."""
        np.savez(work / _SCAN, ages=self.ages, **vars(self.ads))
        parts = {split: [(path.name, *rest) for path, *rest in self.parts[split]] for split in SPLITS}
        return {"clicks": self.clicks, "parts": parts}

    @classmethod
    def load(cls, work: Path, plain: dict[str, Any]) -> "Scan":
        with np.load(work / _SCAN) as arrays:
            ads = AdCounts(*(arrays[name] for name in ("ad", "rows", "train_rows", "train_clicks")))
            ages = arrays["ages"]
        parts = {s: [RowFile(work / name, *rest) for name, *rest in plain["parts"][s]] for s in SPLITS}
        return cls(ads, ages, plain["clicks"], parts)


def scan(task: Task) -> Scan:
    """Reads a block, decides the side of each row, writes both sides to files, and counts."""
    host = csv_io.read_block(task.block, layout.CLICKS)
    with arrays(task.device) as xp:
        train, ages, counts = _count(task, host, xp)
    sides = {split: _chosen(host, side) for split, side in zip(SPLITS, (train, ~train))}
    return Scan(
        counts,
        ages,
        {split: int(side["clicked"].sum()) for split, side in sides.items()},
        {split: _write(side, task.work / f"{split}-{task.index:06d}.npy") for split, side in sides.items()},
    )


def _chosen(host: dict[str, np.ndarray], chosen: np.ndarray) -> np.ndarray:
    """The rows of one side as `ROW`; chosen: [n] bool."""
    at = np.flatnonzero(chosen)
    rows = np.empty(len(at), ROW)
    for column in layout.CLICKS:
        rows[column.name] = np.take(host[column.name], at)
    return rows


def _count(task: Task, host: dict[str, np.ndarray], xp: ModuleType) -> tuple[np.ndarray, np.ndarray, AdCounts]:
    """host: `layout.CLICKS` -> on the host, which rows are for training [n] bool, `Scan.ages` and `Scan.ads`."""
    events = store.load(task.work, "events", Events, task.device)
    documents = store.load(task.work, "documents", Documents, task.device)
    promoted = store.load(task.work, "promoted", Promoted, task.device)
    display, ad = (xp.asarray(host[name]) for name in ("display_id", "ad_id"))
    event = events.lookup.find(display, xp)
    timestamp, train = take(events.timestamp, event, xp), take(events.train, event, xp)
    page = documents.lookup.find(take(events.document, event, xp), xp)
    promotion = promoted.lookup.find(ad, xp)
    published = take(documents.published, page, xp), take(promoted.published, promotion, xp)
    aged = None if task.flavour.ages_of_all_rows else train
    ages = [_histogram(age_in_days(timestamp, p, xp)[0], aged, xp) for p in published]
    train, *ages = to_host_all({"train": train, **dict(zip(layout.AGES, ages))}, xp).values()
    # The counts of a block by ad are nearly as many as its rows, too many to come back from a GPU.
    return train, np.stack(ages).astype(np.int64), count_ads(host["ad_id"], train, host["clicked"])


def age_in_days(timestamp: Any, published: Any, xp: ModuleType = np) -> tuple[Any, Any]:
    """[n] int64 ms since the origin (-1 = null), [n] int64 Unix ms -> [n] whole days from publication to event, and how
    many are `MISSING_AGE`, since a time is missing. 0 if negative or above ten years."""
    if xp is not np:
        constants = (layout.ORIGIN_MS, layout.MILLISECONDS_A_DAY, layout.MAX_AGE_DAYS)
        return kernels.age_in_days(timestamp, published, *constants, xp)
    days = timestamp + layout.ORIGIN_MS
    days -= published
    days //= layout.MILLISECONDS_A_DAY
    np.putmask(days, days.view(np.uint64) > layout.MAX_AGE_DAYS, 0)  # negative ones too
    missing = (timestamp < 0) | (published == NULL_TIME)
    np.putmask(days, missing, MISSING_AGE)
    return days, np.count_nonzero(missing)


def _histogram(age: Any, chosen: Any, xp: ModuleType) -> Any:
    """[n] days, [n] bool or None for all -> [3652] rows by age."""
    if xp is not np:
        return kernels.count(age, chosen, MISSING_AGE + 1, xp)
    return np.bincount(age if chosen is None else age[chosen], minlength=MISSING_AGE + 1)


def sort_by_display(scan: Scan, split: str, work: Path) -> None:
    """Makes the files of `split` ascend by display, rows of a display in input order. Does nothing if they do already;
    otherwise needs about 26 bytes of memory a row."""
    parts = scan.parts[split]
    if _ascends(parts):
        return
    rows = np.concatenate([np.load(part.path) for part in parts])
    rows = rows[np.argsort(rows["display_id"], kind="stable")]
    for part in parts:
        part.path.unlink()
    parts[:] = _write(rows, work / f"{split}-sorted.npy")


def count_displays(scan: Scan, split: str) -> int:
    """Distinct displays of a split."""
    parts = scan.parts[split]
    if not _ascends(parts):
        return len(np.unique(np.concatenate([np.unique(np.load(part.path)["display_id"]) for part in parts])))
    count, last = 0, None
    for part in parts:
        display = np.load(part.path)["display_id"]
        count += int((display[1:] != display[:-1]).sum()) + (display[0] != last)
        last = display[-1]
    return int(count)


def _ascends(parts: list[RowFile]) -> bool:
    return all(part.ascends for part in parts) and all(a.last <= b.first for a, b in pairwise(parts))


def _write(rows: np.ndarray, path: Path) -> list[RowFile]:
    if not len(rows):
        return []
    store.save_array(path, rows)
    display = rows["display_id"]
    return [RowFile(path, len(rows), int(display[0]), int(display[-1]), bool((display[1:] >= display[:-1]).all()))]
