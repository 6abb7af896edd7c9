"""tf-idf cosine similarity of two documents by their categories, topics or entities.

With c(d, a) the confidence of attribute a in document d, N = largest document id + 1 and df(a) the documents with a:
    idf(a) = ln(N / df(a));  w(d, a) = c(d, a) idf(a);  v(d, a) = w(d, a) / sqrt(sum_a w(d, a)^2)
    similarity(d, e) = sum_a v(d, a) v(e, a), in float64; 0 for a document without attributes.
Source: nvtabular.ops.ColumnSimilarity, metric "tfidf". Confidences of a pair (d, a) that occurs twice are added.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from types import ModuleType
from typing import Any

import numpy as np

from preprocess.outbrain.lookup import Lookup, with_null

# Attribute entries merged at a time: about 100 bytes of scratch each.
_MERGE_ENTRIES = 1 << 19


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
    ) -> "Attributes":
        """documents, attributes: [n] int32 >= 0, in any order; confidences: [n] float64; idf: as `natural_idf`."""
        if not len(documents):
            none = np.empty(0, np.int32)
            zero = np.zeros(1, np.int64)
            return cls(Lookup.build(none), zero, zero, zero.astype(np.uint64), none, np.empty(0))
        width = int(attributes.max()) + 1
        pair = documents.astype(np.int64) * width + attributes
        order = np.argsort(pair, kind="stable")
        pair = pair[order]
        first = _run_starts(pair)
        confidence = np.add.reduceat(confidences[order], first)
        document, attribute = np.divmod(pair[first], width)
        df = np.bincount(attribute, minlength=width)
        weight = confidence * idf(np.maximum(df, 1), int(document[-1]) + 1)[attribute]
        start = _run_starts(document)
        length = np.diff(np.append(start, len(document)))
        norm = np.sqrt(np.add.reduceat(weight * weight, start))
        value = weight / np.repeat(np.where(norm > 0, norm, 1), length)
        signature = np.bitwise_or.reduceat(np.uint64(1) << (attribute & 63).astype(np.uint64), start)
        return cls(
            Lookup.build(document[start].astype(np.int32)),
            with_null(start, 0),
            with_null(length, 0),
            with_null(signature, 0),
            attribute.astype(np.int32),
            value,
        )

    def similarity(self, left: Any, right: Any, xp: ModuleType = np) -> Any:
        """left, right: [n] int32 document ids, -1 for null -> [n] float64."""
        left, right = self.lookup.find(left, xp), self.lookup.find(right, xp)
        out = xp.zeros(len(left), xp.float64)
        hits = xp.nonzero(self.signature[left] & self.signature[right])[0]
        if not len(hits):
            return out
        left, right = left[hits], right[hits]
        total = xp.cumsum(self.length[left])
        bounds = _cuts(total, xp)
        for low, high in pairwise(bounds):
            out[hits[low:high]] = self._merge(left[low:high], right[low:high], xp)
        return out

    def _merge(self, left: Any, right: Any, xp: ModuleType) -> Any:
        """Rows [n], [n] -> [n] float64: every entry of the left row is looked up in the right one by binary search."""
        n = len(left)
        length = self.length[left]
        ends = xp.cumsum(length)
        owner = (
            xp.repeat(xp.arange(n), length) if xp is np else xp.searchsorted(ends, xp.arange(int(ends[-1])), "right")
        )
        entry = xp.arange(len(owner)) + (self.start[left] - ends + length)[owner]
        wanted = self.attribute[entry]
        bit = (self.signature[right][owner] >> (wanted & 63).astype(xp.uint64)) & xp.uint64(1)
        likely = xp.nonzero(bit)[0]
        owner, entry, wanted = owner[likely], entry[likely], wanted[likely]
        low = self.start[right][owner]
        stop = low + self.length[right][owner]
        high = stop
        for _ in range(int(self.length[right].max()).bit_length()):
            middle = (low + high) >> 1
            # low == high only at the end of the search; the entry read there is not used.
            below = self.attribute[xp.minimum(middle, len(self.attribute) - 1)] < wanted
            active = low < high
            low, high = xp.where(active & below, middle + 1, low), xp.where(active & ~below, middle, high)
        found = xp.nonzero((low < stop) & (self.attribute[xp.minimum(low, len(self.attribute) - 1)] == wanted))[0]
        products = self.value[entry[found]] * self.value[low[found]]
        return xp.bincount(owner[found], weights=products, minlength=n)


def _run_starts(ordered: np.ndarray) -> np.ndarray:
    """Positions at which a new value begins."""
    return np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))


def _cuts(total: Any, xp: ModuleType) -> list[int]:
    """Slices of pairs that hold at most about _MERGE_ENTRIES entries each, from the running total of entries."""
    parts = int(total[-1]) // _MERGE_ENTRIES
    inner = xp.searchsorted(total, xp.arange(1, parts + 1) * _MERGE_ENTRIES).tolist()
    return sorted({0, *inner, len(total)})
