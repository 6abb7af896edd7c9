"""Who saw which page when: one event per display, in the order of time."""

from dataclasses import dataclass

import numpy as np

from preprocess.synthetic.catalogue import Documents
from preprocess.synthetic.draws import Draws, heavy_rank
from preprocess.synthetic.geo import Places
from preprocess.synthetic.sizes import Sizes

DAY_MS = 86_400_000
TRAIN_DAYS = 13  # displays with known clicks lie in days 0..12, those of the contest's test set in days 0..14
DAYS = 15
_FIRST_MS = 61  # the first event of the published file
_PLATFORM_SHARES = np.array([9_027_268, 10_976_278, 3_116_575]) / 23_120_121
_NO_PLATFORM, _NO_GEO = 0.0003, 0.001


@dataclass(frozen=True)
class Events:
    index: np.ndarray  # [B] int64: display_id - 1
    timestamp: np.ndarray  # [B] int64, milliseconds since the origin of the data set
    user: np.ndarray  # [B] int64
    page: np.ndarray  # [B] int32: document number
    platform: np.ndarray  # [B] int8: 0 desktop, 1 mobile, 2 tablet
    place: np.ndarray  # [B] int16: row of Places
    no_platform: np.ndarray  # [B] bool: not recorded (the user has one all the same)
    no_geo: np.ndarray  # [B] bool

    @property
    def day(self) -> np.ndarray:
        return self.timestamp // DAY_MS


def _hourly(day_weights: np.ndarray) -> np.ndarray:
    """Cumulative share of the traffic at the end of every hour of the given days; the origin is 04:00 UTC."""
    hour = (np.arange(24) + 4) % 24
    profile = 1.0 + 0.55 * np.sin(2 * np.pi * (hour - 10) / 24)  # busiest at 16 UTC, which is daytime in America
    cumulative = np.cumsum(np.outer(day_weights, profile).ravel())
    return np.concatenate([[0.0], cumulative / cumulative[-1]])


def _day_weights() -> np.ndarray:
    """Day 0 is a Tuesday; weekends are a tenth quieter, which leaves 14 % of the displays to days 11 and 12."""
    weekday = (np.arange(DAYS) + 1) % 7
    return np.where(weekday >= 5, 0.9, 1.0)


def build_clock() -> tuple[np.ndarray, np.ndarray]:
    """Cumulative traffic by hour: of displays with clicks, and of test displays (half of them in the last two days)."""
    train = _day_weights() * (np.arange(DAYS) < TRAIN_DAYS)
    late = _day_weights() * (np.arange(DAYS) >= TRAIN_DAYS)
    return _hourly(train), _hourly(train / train.sum() + late / late.sum())


def _timestamps(draws: Draws, sizes: Sizes, clock: tuple, index: np.ndarray) -> np.ndarray:
    """Display i of n takes the place (i + u) / n of the traffic, so ids are in the order of time."""
    jitter = draws.uniform("time", index)
    known = index < sizes.displays
    of_test = (index - sizes.displays + jitter) / max(sizes.test_displays, 1)
    place = np.where(known, (index + jitter) / sizes.displays, of_test)
    hours = np.arange(DAYS * 24 + 1.0)
    hour = np.where(known, np.interp(place, clock[0], hours), np.interp(place, clock[1], hours))
    last = np.where(known, TRAIN_DAYS, DAYS) * DAY_MS - 1
    return np.clip((hour * 3_600_000).astype(np.int64), _FIRST_MS, last)


def make_events(
    draws: Draws, sizes: Sizes, documents: Documents, places: Places, clock: tuple, index: np.ndarray
) -> Events:
    """Events of the displays `index` ([B] int64); from number `sizes.displays` on they are test displays."""
    timestamp = _timestamps(draws, sizes, clock, index)
    user = draws.integers("user", index, sizes.users)
    # Half of the traffic goes to a lasting head, half to a window of pages that moves on with the day: news.
    count = sizes.event_documents
    rank = heavy_rank(draws.uniform("page", index), count, max(count / 4000, 8.0))
    moved = (rank + timestamp // DAY_MS * (count // 20)) % count
    page = documents.pages[np.where(draws.uniform("news", index) < 0.5, moved, rank)]
    platforms = np.cumsum(_PLATFORM_SHARES)[:2]
    return Events(
        index=index,
        timestamp=timestamp,
        user=user,
        page=page,
        platform=np.searchsorted(platforms, draws.uniform("platform", user), side="right").astype(np.int8),
        place=np.searchsorted(places.cumulative[:-1], draws.uniform("place", user), side="right").astype(np.int16),
        no_platform=draws.uniform("no platform", index) < _NO_PLATFORM,
        no_geo=draws.uniform("no geo", index) < _NO_GEO,
    )
