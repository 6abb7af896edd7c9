"""tf-idf cosine similarity of two documents by their categories, topics or entities.

With c(d, a) the confidence of attribute a in document d, N = largest document id + 1 and df(a) the documents with a:
    idf(a) = ln(N / df(a));  w(d, a) = c(d, a) idf(a);  v(d, a) = w(d, a) / sqrt(sum_a w(d, a)^2)
    similarity(d, e) = sum_a v(d, a) v(e, a), in float64; 0 for a document without attributes.
Source: nvtabular.ops.ColumnSimilarity, metric "tfidf". Confidences of a pair (d, a) that occurs twice are added.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from preprocess import kernels
from preprocess.outbrain.lookup import Lookup, with_null
from preprocess.xp import take

# Attribute entries merged at a time: about 100 bytes of scratch each.
_MERGE_ENTRIES = 1 << 19
_ENTRIES_A_THREAD = 1 << 18  # fewer are not worth one when rows are built


def natural_idf(df: np.ndarray, height: int) -> np.ndarray:
    """df: [A] int64 >= 1, documents that have each attribute; height: largest document id + 1 -> [A] float64."""
    return np.log(height / df)


@dataclass(frozen=True)
class Attributes:
    """Sparse rows v(d, .) of all documents.

    Args:
        lookup: document id -> row.
        start: [D + 1] int64, first entry of a row; the last row is empty and stands for unknown documents.
        length: [D + 1] int64, entries of a row.
        signature: [D + 1] uint64, bit (a mod 64) set for every attribute a: disjoint signatures mean similarity 0.
        attribute: [E] int32, ascending within a row.
        value: [E] float64, v.
    """

    lookup: Lookup
    start: Any
    length: Any
    signature: Any
    attribute: Any
    value: Any

    @classmethod
    def build(
        cls,
        documents: np.ndarray,
        attributes: np.ndarray,
        confidences: np.ndarray,
        idf: Callable[[np.ndarray, int], np.ndarray] = natural_idf,
        workers: int = 1,
    ) -> "Attributes":
        """documents, attributes: [n] int32 >= 0, in any order; confidences: [n] float64; idf: as `natural_idf`.

        workers: threads, each of which takes a range of documents; the result does not depend on them.
        """
        if not len(documents):
            none = np.empty(0, np.int32)
            zero = np.zeros(1, np.int64)
            return cls(Lookup.build(none), zero, zero, zero.astype(np.uint64), none, np.empty(0))
        width = int(attributes.max()) + 1
        ranges = _ranges(documents, min(workers, 1 + len(documents) // _ENTRIES_A_THREAD))
        with ThreadPoolExecutor(len(ranges)) as pool:
            ordered = list(pool.map(partial(_ordered, documents, attributes, confidences, width), ranges))
            df = sum(pool.map(lambda part: np.bincount(part[1], minlength=width), ordered))
            weights = idf(np.maximum(df, 1), int(documents.max()) + 1)
            rows = [*zip(*pool.map(lambda part: _rows(weights, *part), ordered))]
        document, length, signature, attribute, value = map(np.concatenate, rows)
        start = np.cumsum(length) - length
        start, length, signature = (with_null(column, 0) for column in (start, length, signature))
        return cls(Lookup.build(document), start, length, signature, attribute, value)

    def similarity(self, left: Any, right: Any, xp: ModuleType = np) -> Any:
        """left, right: [n] int32 document ids, -1 for null -> [n] float64; on a GPU the same in float32."""
        if xp is np and not len(self.attribute):
            return np.zeros(len(left), np.float64)
        left, right = self.lookup.find(left, xp), self.lookup.find(right, xp)
        if xp is not np:
            rows = (self.start, self.length, self.signature, self.attribute, self.value)
            return kernels.similarity(left, right, *rows, xp)
        out = np.zeros(len(left), np.float64)
        hits = np.nonzero(take(self.signature, left) & take(self.signature, right))[0]
        if not len(hits):
            return out
        left, right = left[hits], right[hits]
        for low, high in pairwise(_cuts(np.cumsum(self.length[left]))):
            out[hits[low:high]] = self._merge(left[low:high], right[low:high])
        return out

    def _merge(self, left: np.ndarray, right: np.ndarray) -> np.ndarray:
        """Rows [n], [n] -> [n] float64: every entry of the left row is looked up in the right one by binary search."""
        n = len(left)
        length = self.length[left]
        ends = np.cumsum(length)
        owner = np.repeat(np.arange(n), length)
        entry = np.arange(len(owner)) + (self.start[left] - ends + length)[owner]
        wanted = self.attribute[entry]
        bit = (self.signature[right][owner] >> (wanted & 63).astype(np.uint64)) & np.uint64(1)
        likely = np.nonzero(bit)[0]
        owner, entry, wanted = owner[likely], entry[likely], wanted[likely]
        low = self.start[right][owner]
        stop = low + self.length[right][owner]
        high = stop
        for _ in range(int(self.length[right].max()).bit_length()):
            middle = (low + high) >> 1
            # low == high only at the end of the search; the entry read there is not used.
            below = self.attribute[np.minimum(middle, len(self.attribute) - 1)] < wanted
            active = low < high
            low, high = np.where(active & below, middle + 1, low), np.where(active & ~below, middle, high)
        found = np.nonzero((low < stop) & (self.attribute[np.minimum(low, len(self.attribute) - 1)] == wanted))[0]
        products = self.value[entry[found]] * self.value[low[found]]
        return np.bincount(owner[found], weights=products, minlength=n)


def _ranges(documents: np.ndarray, parts: int) -> list[tuple[int, int]]:
    """Ranges [low, high) of document ids that hold all entries, about as many each; none is empty, for each begins at
    a document that is there."""
    sample = np.sort(documents[:: 1 + len(documents) // 4096])
    lows = {int(documents.min()), *(int(sample[len(sample) * i // parts]) for i in range(1, parts))}
    return [*pairwise([*sorted(lows), int(documents.max()) + 1])]


def _ordered(
    documents: np.ndarray, attributes: np.ndarray, confidences: np.ndarray, width: int, span: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The entries of a range: document, attribute [e] int64, ascending and distinct, and confidence, added up."""
    mine = np.flatnonzero((documents >= span[0]) & (documents < span[1]))
    pair = documents[mine].astype(np.int64) * width + attributes[mine]
    order = np.argsort(pair, kind="stable")
    pair = pair[order]
    first = _run_starts(pair)
    return *np.divmod(pair[first], width), np.add.reduceat(confidences[mine[order]], first)


def _rows(weights: np.ndarray, document: np.ndarray, attribute: np.ndarray, confidence: np.ndarray) -> tuple:
    """Entries in order -> document ids [d] int32; length, signature [d]; attribute, value [e]."""
    weight = confidence * weights[attribute]
    start = _run_starts(document)
    length = np.diff(np.append(start, len(document)))
    norm = np.sqrt(np.add.reduceat(weight * weight, start))
    value = weight / np.repeat(np.where(norm > 0, norm, 1), length)
    signature = np.bitwise_or.reduceat(np.uint64(1) << (attribute & 63).astype(np.uint64), start)
    return document[start].astype(np.int32), length, signature, attribute.astype(np.int32), value


def _run_starts(ordered: np.ndarray) -> np.ndarray:
    """Positions at which a new value begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _cuts(total: np.ndarray) -> list[int]:
    """Slices of pairs that hold at most about _MERGE_ENTRIES entries each, from the running total of entries."""
    parts = int(total[-1]) // _MERGE_ENTRIES
    inner = np.searchsorted(total, np.arange(1, parts + 1) * _MERGE_ENTRIES).tolist()
    return sorted({0, *inner, len(total)})
