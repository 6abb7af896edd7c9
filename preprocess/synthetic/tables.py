"""The document files and promoted_content.csv as Arrow tables of the raw columns, of some of their documents or ads.

A row depends on its document or ad alone, so a file may be made in blocks of any size.
"""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from preprocess.synthetic.catalogue import Ads, Documents, entity_number, topic_offsets
from preprocess.synthetic.draws import Draws
from preprocess.synthetic.sizes import TOPICS, Sizes

NULL = "\\N"
ORIGIN_SECONDS = 1_465_876_799  # time 0 of events.csv is 2016-06-14 03:59:59.998 UTC
_LAST_PUBLICATION = ORIGIN_SECONDS + 14 * 86_400
_UNLISTED = 0.0002  # documents that documents_meta.csv lacks
_NO_SOURCE, _NO_PUBLISHER, _NO_TIME = 0.00084, 0.02135, 0.337  # null rates of the published documents_meta.csv
_FAR_PAST, _FUTURE = 0.002, 0.001
_HEX = np.array([f"{byte:02x}" for byte in range(256)], dtype="S2").view(np.uint16)


def hex_strings(words: np.ndarray, digits: int) -> pa.StringArray:
    """The leading hex digits of each row of `words` ([M, k] uint64)."""
    octets = np.ascontiguousarray(words.astype(">u8")).view(np.uint8).reshape(len(words), -1)[:, : digits // 2]
    text = np.ascontiguousarray(_HEX[octets])
    offsets = np.arange(len(words) + 1, dtype=np.int32) * digits
    return pa.StringArray.from_buffers(len(words), pa.py_buffer(offsets), pa.py_buffer(text))


def category_code(number: np.ndarray) -> np.ndarray:
    """97 four-digit codes in blocks of eight, like 1000, 1001 ... 2200."""
    return 1000 + 100 * (number // 8) + number % 8


def publication(draws: Draws, document: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Publish time in seconds since 1970 ([M] int64) and whether it is null. Most are recent, some implausible."""
    age = 3650.0 * 86_400 * draws.uniform("age", document) ** 5
    seconds = (_LAST_PUBLICATION - age).astype(np.int64)
    seconds -= np.where(draws.uniform("midnight", document) < 0.5, seconds % 86_400, 0)
    odd = draws.uniform("odd date", document)
    years = draws.uniform("odd year", document)
    seconds = np.where(odd < _FAR_PAST, (-2_145_916_800 + years * 2_400_000_000).astype(np.int64), seconds)
    seconds = np.where(odd > 1 - _FUTURE, (1_483_228_800 + years * 2_500_000_000).astype(np.int64), seconds)
    return seconds, draws.uniform("no time", document) < _NO_TIME


def with_nulls(draws: Draws, stream: str, index: np.ndarray, values: np.ndarray, null: np.ndarray) -> pa.Array:
    """Values as text, with nulls written in both published ways: mostly an empty field, a quarter `\\N`."""
    marker = pa.array(["", NULL]).take(pa.array(draws.uniform(stream + " marker", index) < 0.25).cast(pa.int8()))
    return pc.if_else(pa.array(null), marker, pa.array(values).cast(pa.string()))


def documents_meta(draws: Draws, documents: Documents, block: np.ndarray) -> pa.Table:
    """Rows of documents_meta.csv for the document numbers `block` [n] int64; a few documents have none."""
    document = block[draws.uniform("unlisted", block) >= _UNLISTED]
    source = documents.source[document].astype(np.int64)
    publisher = documents.publisher_of[source].astype(np.int64)
    seconds, unknown = publication(draws, document)
    no_source = draws.uniform("no source", document) < _NO_SOURCE
    no_publisher = draws.uniform("no publisher", document) < _NO_PUBLISHER
    return pa.table(
        {
            "document_id": document + 1,
            "source_id": with_nulls(draws, "no source", document, source + 1, no_source),
            "publisher_id": with_nulls(draws, "no publisher", document, publisher + 1, no_publisher),
            "publish_time": with_nulls(draws, "no time", document, seconds.astype("M8[s]"), unknown),
        }
    )


def documents_categories(draws: Draws, documents: Documents, block: np.ndarray) -> pa.Table:
    """Rows of documents_categories.csv for the document numbers `block` [n] int64: none to two for each."""
    held = documents.category[block] >= 0
    row, place = np.nonzero(held)
    rest = np.round(0.02 + 0.1 * draws.uniform("second confidence", block), 4)
    usual = draws.uniform("usual confidence", block) < 0.7
    main, other = np.where(usual, 0.92, 0.9 - rest), np.where(usual, 0.07, rest)
    confidence = np.where(place == 0, main[row], other[row])
    category = category_code(documents.category[block][held].astype(np.int64))
    return pa.table({"document_id": block[row] + 1, "category_id": category, "confidence_level": confidence})


def _slots(block: np.ndarray, count: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Document of each row, where document i has count[i] of them, and the row's number among these, from 0."""
    document = np.repeat(block, count)
    return document, np.arange(document.size) - np.repeat(np.cumsum(count) - count, count)


def documents_topics(draws: Draws, documents: Documents, block: np.ndarray) -> pa.Table:
    """Rows of documents_topics.csv for the document numbers `block` [n] int64: none to 39 for each."""
    count = documents.topics[block].astype(np.int64)
    document, slot = _slots(block, count)
    topic = np.empty(document.size, np.int64)
    for place in range(int(count.max(initial=0))):
        at = slot == place
        offset = topic_offsets(draws, document[at], place) if place else 0
        topic[at] = (documents.topic[document[at], 0] + offset) % TOPICS
    scale = 0.05 + 0.6 * draws.uniform("topic scale", document)
    jitter = 0.9 + 0.2 * draws.uniform("topic jitter", document * np.int64(64) + slot)
    confidence = 0.008 + (39 - slot) * 1e-5 + scale * 0.55**slot * jitter  # falls strictly: 0.55 x 1.1 < 0.9
    return pa.table({"document_id": document + 1, "topic_id": topic, "confidence_level": np.round(confidence, 12)})


def documents_entities(draws: Draws, sizes: Sizes, documents: Documents, block: np.ndarray) -> pa.Table:
    """Rows of documents_entities.csv for the document numbers `block` [n] int64: none to ten for each."""
    count = documents.entities[block].astype(np.int64)
    document, slot = _slots(block, count)
    entity = np.empty(document.size, np.int64)
    first = documents.topic[document, 0]
    for place in range(int(count.max(initial=0))):
        at = slot == place
        entity[at] = entity_number(draws, sizes, document[at], first[at], place)
    words = np.stack([draws.bits("entity name", entity), draws.bits("entity name, second half", entity)], axis=1)
    confidence = 0.2 + 0.75 * draws.uniform("entity confidence", document) * 0.8**slot
    return pa.table(
        {
            "document_id": document + 1,
            "entity_id": hex_strings(words, 32),
            "confidence_level": np.round(confidence, 12),
        }
    )


def promoted_content(ads: Ads, ad: np.ndarray) -> pa.Table:
    """Rows of promoted_content.csv for the ad numbers `ad` [n]."""
    return pa.table(
        {
            "ad_id": ads.ad_id[ad],
            "document_id": ads.document[ad] + 1,
            "campaign_id": ads.campaign[ad] + 1,
            "advertiser_id": ads.advertiser[ad] + 1,
        }
    )
