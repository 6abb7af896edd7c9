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

from preprocess import kernels
from preprocess.outbrain.lookup import Lookup, with_null
from preprocess.xp import arrays, to_host

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
        device: str = "cpu",
    ) -> "Attributes":
        """documents, attributes: [n] int32 >= 0, in any order; confidences: [n] float64. Numpy in, numpy out: device
        "cuda" is for the sort and the sums, and gives the same bits."""
        if not len(documents):
            none = np.empty(0, np.int32)
            zero = np.zeros(1, np.int64)
            return cls(Lookup.build(none), zero, zero, zero.astype(np.uint64), none, np.empty(0))
        with arrays(device) as xp:
            entries = map(xp.asarray, (documents, attributes, confidences))
            document, *columns, attribute, value = map(to_host, _rows(*entries, idf, xp))
        return cls(Lookup.build(document), *(with_null(column, 0) for column in columns), attribute, value)

    def similarity(self, left: Any, right: Any, xp: ModuleType = np) -> Any:
        """left, right: [n] int32 document ids, -1 for null -> [n] float64."""
        left, right = self.lookup.find(left, xp), self.lookup.find(right, xp)
        if xp is not np:
            rows = (self.start, self.length, self.signature, self.attribute, self.value)
            return kernels.similarity(left, right, *rows, xp)
        out = np.zeros(len(left), np.float64)
        hits = np.nonzero(self.signature[left] & self.signature[right])[0]
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


def _rows(document: Any, attribute: Any, confidence: Any, idf: Callable, xp: ModuleType) -> tuple[Any, ...]:
    """Entries [n] -> document ids [D] int32 ascending; start, length, signature [D]; attribute, value [E]."""
    width = int(attribute.max()) + 1
    pair = document.astype(xp.int64) * width + attribute
    order = xp.argsort(pair, kind="stable")
    pair = pair[order]
    first = _run_starts(pair, xp)
    confidence = _sums(confidence[order], first, xp)
    pair = pair[first]
    document = pair // width
    attribute = (pair - document * width).astype(xp.int32)
    df = to_host(xp.bincount(attribute, minlength=width))
    # On the host, for a GPU's logarithm differs in the last bit.
    weight = confidence * xp.asarray(idf(np.maximum(df, 1), int(document[-1]) + 1))[attribute]
    start = _run_starts(document, xp)
    length = xp.concatenate([start[1:], xp.full(1, len(document))]) - start
    norm = xp.sqrt(_sums(weight * weight, start, xp))
    row = xp.zeros(len(document), xp.int64)
    row[start[1:]] = 1
    value = weight / xp.where(norm > 0, norm, 1.0)[xp.cumsum(row)]
    return document[start].astype(xp.int32), start, length, _signatures(attribute, start, xp), attribute, value


def _run_starts(ordered: Any, xp: ModuleType) -> Any:
    """Positions at which a new value begins."""
    begins = xp.ones(len(ordered), bool)
    begins[1:] = ordered[1:] != ordered[:-1]
    return xp.flatnonzero(begins)


def _sums(values: Any, start: Any, xp: ModuleType) -> Any:
    """Sums of the runs that begin at `start`, from left to right."""
    if xp is not np:
        return kernels.segment_sums(values, start, xp)
    length = np.diff(np.append(start, len(values)))
    return np.bincount(np.repeat(np.arange(len(start)), length), weights=values)


def _signatures(attribute: Any, start: Any, xp: ModuleType) -> Any:
    if xp is not np:
        return kernels.segment_signatures(attribute, start, xp)
    return np.bitwise_or.reduceat(np.uint64(1) << (attribute & 63).astype(np.uint64), start)


def _cuts(total: np.ndarray) -> list[int]:
    """Slices of pairs that hold at most about _MERGE_ENTRIES entries each, from the running total of entries."""
    parts = int(total[-1]) // _MERGE_ENTRIES
    inner = np.searchsorted(total, np.arange(1, parts + 1) * _MERGE_ENTRIES).tolist()
    return sorted({0, *inner, len(total)})
