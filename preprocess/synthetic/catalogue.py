"""What exists before anybody clicks: documents, and the ads with their campaigns and advertisers.

Documents are numbered from 0 here and document_id = number + 1 in the files; ads are numbered by rank of exposure.
"""

from dataclasses import dataclass

import numpy as np

from preprocess.synthetic.draws import Draws, heavy_rank
from preprocess.synthetic.sizes import CATEGORIES, TOPICS, Sizes

HELD = 3  # topics of a document that the planted model looks at, the most confident ones
ENTITY_SLOTS = 10  # at most so many entities a document, each from its own part of the topic's pool
_BLOCK = 1 << 18  # documents at a time: temporaries stay at some ten megabytes
_HAS_CATEGORY, _HAS_TOPIC, _HAS_ENTITY = 0.94309, 0.83199, 0.59727  # shares of the published documents
_ENTITY_COUNTS = np.cumsum([0.27, 0.22, 0.17, 0.12, 0.08, 0.05, 0.035, 0.025, 0.02, 0.01])  # mean 3.13; published 3.09


@dataclass(frozen=True)
class Documents:
    source: np.ndarray  # [documents] int16
    publisher_of: np.ndarray  # [sources] int16
    category: np.ndarray  # [documents, 2] int8, -1 = none
    topic: np.ndarray  # [documents, HELD] int16, -1 = none, by descending confidence
    topics: np.ndarray  # [documents] uint8: how many, 0..39
    entity: np.ndarray  # [documents, 2] int32: the two first, -1 = none
    entities: np.ndarray  # [documents] uint8: how many, 0..10
    pages: np.ndarray  # [event_documents] int32: documents on which ads are shown
    landing: np.ndarray  # [promoted_documents] int32: documents that ads lead to


@dataclass(frozen=True)
class Ads:
    ad_id: np.ndarray  # [ads] int32, distinct
    document: np.ndarray  # [ads] int32
    campaign: np.ndarray  # [ads] int32
    advertiser: np.ndarray  # [ads] int32
    category: np.ndarray  # [ads] int8: first category of the landing page as its advertiser meant it
    by_category: np.ndarray  # [ads] int32: ads sorted by category, inside one by exposure
    category_start: np.ndarray  # [CATEGORIES + 1] int64


def category_of_topic(topic: np.ndarray) -> np.ndarray:
    """About three neighbouring topics make a category."""
    return topic * CATEGORIES // TOPICS


def advertiser_of_campaign(draws: Draws, sizes: Sizes) -> np.ndarray:
    """[campaigns] advertiser numbers: a few have many of the campaigns."""
    u = draws.uniform("campaign advertiser", np.arange(sizes.campaigns))
    rank = heavy_rank(u, sizes.advertisers, sizes.advertisers / 4)
    return draws.permutation("advertiser order", sizes.advertisers)[rank]


def advertiser_category(draws: Draws, sizes: Sizes) -> np.ndarray:
    """[advertisers] categories, from 0 to CATEGORIES - 1: what each advertises."""
    return draws.integers("advertiser category", np.arange(sizes.advertisers), CATEGORIES)


def entity_number(draws: Draws, sizes: Sizes, document: np.ndarray, topic: np.ndarray, slot: int) -> np.ndarray:
    """Entity of a document's slot: popular ones of its first topic's pool are shared by many documents."""
    each = sizes.entities // TOPICS // ENTITY_SLOTS
    rank = heavy_rank(draws.uniform("entity", document * np.int64(ENTITY_SLOTS) + slot), each, 2.0)
    pool = np.where(topic >= 0, topic, draws.integers("entity pool", document, TOPICS))
    return ((pool * each + rank) * ENTITY_SLOTS + slot).astype(np.int32)


def topic_offsets(draws: Draws, document: np.ndarray, slot: int) -> np.ndarray:
    """Distance of a document's topic number `slot` from its first one, distinct for every slot below 39."""
    if slot == 1:
        return np.where(draws.uniform("topic 1", document) < 0.5, 1, TOPICS - 1)
    if slot == 2:
        return np.array([2, 3, 4, TOPICS - 2, TOPICS - 3, TOPICS - 4])[draws.integers("topic 2", document, 6)]
    return 5 + 7 * (slot - 3) + draws.integers("topic offset", document * np.int64(64) + slot, 7)


def build_documents(draws: Draws, sizes: Sizes) -> Documents:
    """All documents; landing pages have the category of their advertiser more often than chance would."""
    order = draws.permutation("document order", sizes.documents)
    pages = order[: sizes.event_documents]
    first = sizes.event_documents - sizes.promoted_documents // 10  # some pages are landing pages too
    landing = order[first : first + sizes.promoted_documents]
    source, home = _sources(draws, sizes, landing)
    count = sizes.documents
    advertised = np.zeros(count, bool)
    advertised[landing] = True
    parts: dict[str, np.ndarray] = {
        "category": np.empty((count, 2), np.int8),
        "topic": np.empty((count, HELD), np.int16),
        "topics": np.empty(count, np.uint8),
        "entity": np.empty((count, 2), np.int32),
        "entities": np.empty(count, np.uint8),
    }
    for start in range(0, count, _BLOCK):
        block = np.arange(start, min(start + _BLOCK, count))
        for name, values in _attributes(draws, sizes, block, home[block], advertised[block]).items():
            parts[name][block] = values
    u = draws.uniform("source publisher", np.arange(sizes.sources))
    publisher = heavy_rank(u, sizes.publishers, sizes.publishers / 20)
    publisher_of = draws.permutation("publisher order", sizes.publishers)[publisher].astype(np.int16)
    return Documents(source=source, publisher_of=publisher_of, pages=pages, landing=landing, **parts)


def _sources(draws: Draws, sizes: Sizes, landing: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Source of every document, and the category its site leans to (int8). Landing pages follow their advertiser."""
    document = np.arange(sizes.documents)
    rank = heavy_rank(draws.uniform("document source", document), sizes.sources, max(sizes.sources / 200, 4.0))
    source = draws.permutation("source order", sizes.sources)[rank].astype(np.int16)
    home = draws.integers("source category", source, CATEGORIES).astype(np.int8)
    campaign = np.arange(sizes.promoted_documents) * sizes.campaigns // sizes.promoted_documents
    advertiser = advertiser_of_campaign(draws, sizes)[campaign]
    own = draws.integers("advertiser source", advertiser, sizes.sources)
    stays = draws.uniform("own site", landing) < 0.8
    source[landing[stays]] = own[stays]
    home[landing] = advertiser_category(draws, sizes)[advertiser]
    return source, home


def _coverage(sizes: Sizes, advertised: np.ndarray, share: float) -> np.ndarray:
    """Chance that a document has an attribute: `share` over all of them, 0.99 for landing pages."""
    others = (share * sizes.documents - 0.99 * sizes.promoted_documents) / (sizes.documents - sizes.promoted_documents)
    return np.where(advertised, 0.99, others)


def _attributes(draws: Draws, sizes: Sizes, document: np.ndarray, home: np.ndarray, advertised: np.ndarray):
    """Categories, topics and entities of a block of documents: a dict keyed as in Documents."""
    leaning = home * np.int64(TOPICS) // CATEGORIES + 1 + draws.integers("home topic", document, 3)
    rank = heavy_rank(draws.uniform("any topic", document), TOPICS, 60.0)
    first = np.where(draws.uniform("leans", document) < 0.6, leaning % TOPICS, rank * 7 % TOPICS)
    topics = 1 + np.floor(np.log1p(-draws.uniform("topics", document)) / np.log(1 - 1 / 4.56)).astype(np.int64)
    has_topic = draws.uniform("has topic", document) < _coverage(sizes, advertised, _HAS_TOPIC)
    topics = np.where(has_topic, np.minimum(topics, 39), 0)
    topic = np.stack([first] + [(first + topic_offsets(draws, document, s)) % TOPICS for s in range(1, HELD)], axis=1)
    entities = 1 + np.searchsorted(_ENTITY_COUNTS[:-1], draws.uniform("entities", document), side="right")
    entities = np.where(draws.uniform("has entity", document) < _HAS_ENTITY, entities, 0)
    topic = np.where(np.arange(HELD) < topics[:, None], topic, -1)
    entity = np.stack([entity_number(draws, sizes, document, topic[:, 0], slot) for slot in range(2)], axis=1)
    has_category = draws.uniform("has category", document) < _coverage(sizes, advertised, _HAS_CATEGORY)
    main = category_of_topic(first)
    other = (main + 1 + draws.integers("second category", document, CATEGORIES - 1)) % CATEGORIES
    two = has_category & (draws.uniform("two categories", document) < 0.938)
    return {
        "category": np.stack([np.where(has_category, main, -1), np.where(two, other, -1)], axis=1),
        "topic": topic,
        "topics": topics,
        "entity": np.where(np.arange(2) < entities[:, None], entity, -1),
        "entities": entities,
    }


def build_ads(draws: Draws, sizes: Sizes, documents: Documents) -> Ads:
    """All ads, by falling exposure: each has a campaign, and leads to one of the landing pages of that."""
    ad = np.arange(sizes.ads)
    campaign = heavy_rank(draws.uniform("ad campaign", ad), sizes.campaigns, sizes.campaigns / 8)
    campaign = draws.permutation("campaign order", sizes.campaigns)[campaign].astype(np.int64)
    # Landing pages of campaign c are those numbered [c P / C, (c + 1) P / C), so none is shared between campaigns.
    low = -(-campaign * sizes.promoted_documents // sizes.campaigns)
    high = -(-(campaign + 1) * sizes.promoted_documents // sizes.campaigns)
    landing = low + draws.integers("ad landing page", ad, np.maximum(high - low, 1))
    advertiser = advertiser_of_campaign(draws, sizes)[campaign]
    category = advertiser_category(draws, sizes)[advertiser].astype(np.int8)
    number = draws.permutation("ad order", sizes.ads).astype(np.int64)
    return Ads(
        ad_id=(1 + number + number // 41).astype(np.int32),  # ids have gaps: 559,583 ads below 573,232
        document=documents.landing[landing],
        campaign=campaign.astype(np.int32),
        advertiser=advertiser.astype(np.int32),
        category=category,
        by_category=np.argsort(category, kind="stable").astype(np.int32),
        category_start=np.searchsorted(np.sort(category), np.arange(CATEGORIES + 1)),
    )
