"""The planted click model: which ads a display shows, what each is worth there, and which one is clicked.

The worth of an ad in a display is its standing quality plus what page, place and device make of it plus Gumbel noise,
and the highest is clicked. So the chance of each ad is the softmax of the noiseless worths over its display: known.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from preprocess.synthetic.catalogue import HELD, Ads, Documents
from preprocess.synthetic.draws import Draws, heavy_rank
from preprocess.synthetic.events import Events
from preprocess.synthetic.geo import REGIONS, Places
from preprocess.synthetic.sizes import CATEGORIES, Sizes
from preprocess.synthetic.tables import ORIGIN_SECONDS, publication

MOST_ADS = 12
# Displays by number of ads, 2 to 12: mean 5.174 (published 5.164); a random order scores MAP@12 0.479 (samples of the
# real data 0.481).
_ADS_SHARES = np.array([0.088, 0.092, 0.306, 0.078, 0.255, 0.007, 0.073, 0.070, 0.028, 0.001, 0.002])
_ROUNDS = 8  # of drawing again an ad that a display already has
_VERTICALS, _CAMPAIGN_GROUPS, _PAGE_GROUPS, _ADVERTISER_GROUPS, _QUARTERS = 5, 4, 4, 4, 4
_RANK_WEIGHTS = np.array([1.0, 0.55, 0.30])  # of a document's topics, about their confidences


@dataclass(frozen=True)
class Weights:
    """Standard deviations (of the first eight) and factors (of the similarities, in [0, 1]) in logit units."""

    advertiser: float = 0.25
    campaign: float = 0.2
    ad: float = 0.15
    exposure: float = 0.1
    platform_vertical: float = 0.55
    region_campaign: float = 0.3
    publisher_advertiser: float = 0.3
    hour_vertical: float = 0.05
    topics: float = 2.9
    category: float = 1.1
    entities: float = 0.8
    freshness: float = 0.2
    contextual_share: float = 0.4  # slots filled with ads of the page's own category


class Model(NamedTuple):
    """What the planted model knows of an ad, a page or a place; groups are small integers, tables are centred."""

    weights: Weights
    standing: np.ndarray  # [ads] float32: the worth that does not depend on the display
    vertical: np.ndarray  # [ads] int8
    campaign_group: np.ndarray  # [ads] int8
    advertiser_group: np.ndarray  # [ads] int8
    page_group: np.ndarray  # [publishers] int8
    platform_vertical: np.ndarray  # [3, 5]
    region_campaign: np.ndarray  # [REGIONS, 4]
    publisher_advertiser: np.ndarray  # [4, 4]
    hour_vertical: np.ndarray  # [4, 5]


class Shown(NamedTuple):
    """Displays with their ads: row-major over [B, 12] with `present` saying which places are filled."""

    present: np.ndarray  # [B, 12] bool
    ad: np.ndarray  # [B, 12] int32: ad number, -1 where not present
    probability: np.ndarray  # [B, 12] float64, 0 where not present
    clicked: np.ndarray  # [B] int64: the place that was clicked


def build_model(draws: Draws, sizes: Sizes, ads: Ads, weights: Weights) -> Model:
    ad = np.arange(sizes.ads)
    exposure = 1.0 - 2.0 * ad / sizes.ads  # the better shown ad is a little better
    standing = weights.advertiser * draws.normal("advertiser quality", ads.advertiser)
    standing += weights.campaign * draws.normal("campaign quality", ads.campaign)
    standing += weights.ad * draws.normal("ad quality", ad) + weights.exposure * np.sqrt(3.0) * exposure
    published, unknown = publication(draws, ads.document)
    age = np.maximum(ORIGIN_SECONDS - published, 0) / 86_400
    standing += weights.freshness * np.where(unknown, 0.0, np.exp(-age / 60.0))

    def table(name: str, rows: int, columns: int, deviation: float) -> np.ndarray:
        """Rows sum to zero over the other axis and back, so that a table holds interaction only."""
        values = draws.normal(name, np.arange(rows * columns)).reshape(rows, columns)
        values -= values.mean(axis=0)
        values -= values.mean(axis=1, keepdims=True)
        return deviation * values / values.std()

    return Model(
        weights=weights,
        standing=standing.astype(np.float32),
        vertical=(ads.category.astype(np.int64) * _VERTICALS // CATEGORIES).astype(np.int8),
        campaign_group=draws.integers("campaign group", ads.campaign, _CAMPAIGN_GROUPS).astype(np.int8),
        advertiser_group=draws.integers("advertiser group", ads.advertiser, _ADVERTISER_GROUPS).astype(np.int8),
        page_group=draws.integers("page group", np.arange(sizes.publishers), _PAGE_GROUPS).astype(np.int8),
        platform_vertical=table("platform x vertical", 3, _VERTICALS, weights.platform_vertical),
        region_campaign=table("region x campaign", REGIONS, _CAMPAIGN_GROUPS, weights.region_campaign),
        publisher_advertiser=table("page x advertiser", _PAGE_GROUPS, _ADVERTISER_GROUPS, weights.publisher_advertiser),
        hour_vertical=table("hour x vertical", _QUARTERS, _VERTICALS, weights.hour_vertical),
    )


def show_ads(
    draws: Draws, sizes: Sizes, ads: Ads, category: np.ndarray, index: np.ndarray, contextual: float
) -> np.ndarray:
    """Ads of each display, distinct within it: [B, 12] int32, -1 beyond the display's number of ads.

    Args:
        category: [B] first category of the page, -1 = none; index: [B] display numbers.
    """
    shares = np.cumsum(_ADS_SHARES / _ADS_SHARES.sum())[:-1]
    count = 2 + np.searchsorted(shares, draws.uniform("ads", index), side="right")
    ad = np.full((index.size, MOST_ADS), -1, np.int32)
    row, place = np.nonzero(np.arange(MOST_ADS) < count[:, None])
    for attempt in range(_ROUNDS):
        cell = index[row] * 16 + place
        ad[row, place] = _draw_ads(draws, sizes, ads, category[row], cell, attempt, contextual)
        row, place = _repeated(ad)
        if row.size == 0:
            return ad
    for r, p in zip(row, place):  # a display that a small head of ads keeps catching takes the next free one
        while (ad[r, :p] == ad[r, p]).any() or (ad[r, p + 1 :] == ad[r, p]).any():
            ad[r, p] = (ad[r, p] + 1) % sizes.ads
    return ad


def _draw_ads(draws, sizes, ads, category, cell, attempt, contextual) -> np.ndarray:
    u = draws.uniform(f"shown ad {attempt}", cell)
    rank = heavy_rank(u, sizes.ads, max(sizes.ads / 2400, 100.0))
    start, stop = ads.category_start[category], ads.category_start[category + 1]
    held = stop - start
    inside = (category >= 0) & (held >= 2 * MOST_ADS) & (draws.uniform(f"contextual {attempt}", cell) < contextual)
    rank[inside] = heavy_rank(u[inside], held[inside], np.maximum(held[inside] / 200, 10.0))
    rank[inside] = ads.by_category[start[inside] + rank[inside]]
    return rank.astype(np.int32)


def _repeated(ad: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places whose ad stands in an earlier place of the same display."""
    order = np.argsort(ad, axis=1, kind="stable")
    value = np.take_along_axis(ad, order, axis=1)
    row, later = np.nonzero((value[:, 1:] == value[:, :-1]) & (value[:, 1:] >= 0))
    return row, order[row, later + 1]


def worth(
    model: Model, documents: Documents, places: Places, ads: Ads, events: Events, row: np.ndarray, ad: np.ndarray
):
    """Noiseless worth: [M] float64, of ads ([M]) in the displays `row` ([M], index into events)."""
    weights = model.weights
    quarter = (events.timestamp // 21_600_000 % _QUARTERS)[row]
    page_group = model.page_group[documents.publisher_of[documents.source[events.page]]][row]
    vertical = model.vertical[ad]
    total = model.standing[ad].astype(np.float64)
    total += model.platform_vertical[events.platform[row], vertical]
    total += model.region_campaign[places.region[events.place][row], model.campaign_group[ad]]
    total += model.publisher_advertiser[page_group, model.advertiser_group[ad]]
    total += model.hour_vertical[quarter, vertical]
    page, landing = events.page[row], ads.document[ad]
    total += weights.topics * topic_similarity(documents, page, landing)
    main = documents.category[:, 0]
    total += weights.category * ((main[page] == main[landing]) & (main[page] >= 0))
    shared = (documents.entity[page] == documents.entity[landing]) & (documents.entity[page] >= 0)
    return total + weights.entities * shared.any(axis=1)


def topic_similarity(documents: Documents, page: np.ndarray, landing: np.ndarray) -> np.ndarray:
    """Cosine of two documents' first topics, weighted by rank; about what the preprocessing computes: [M] float64."""
    norm = np.sqrt(np.concatenate([[1.0], np.cumsum(_RANK_WEIGHTS**2)]))
    dot = np.zeros(page.size)
    first, second = documents.topic[page], documents.topic[landing]
    for i in range(HELD):
        for j in range(HELD):
            both = (first[:, i] == second[:, j]) & (first[:, i] >= 0)
            dot[both] += _RANK_WEIGHTS[i] * _RANK_WEIGHTS[j]
    return dot / (norm[np.minimum(documents.topics[page], HELD)] * norm[np.minimum(documents.topics[landing], HELD)])


def click(
    draws: Draws, sizes: Sizes, model: Model, documents: Documents, places: Places, ads: Ads, events: Events
) -> Shown:
    """Fill the displays of `events` with ads and draw the click of each."""
    category = documents.category[events.page, 0].astype(np.int64)
    ad = show_ads(draws, sizes, ads, category, events.index, model.weights.contextual_share)
    present = ad >= 0
    row, place = np.nonzero(present)
    value = np.full(ad.shape, -np.inf)
    value[present] = worth(model, documents, places, ads, events, row, ad[present])
    u = draws.uniform("gumbel", events.index[row] * 16 + place)
    noisy = value.copy()
    noisy[present] -= np.log(-np.log(u + 2.0**-54))
    chance = np.exp(value - value.max(axis=1, keepdims=True))
    chance /= chance.sum(axis=1, keepdims=True)
    return Shown(present=present, ad=ad, probability=chance, clicked=noisy.argmax(axis=1))
