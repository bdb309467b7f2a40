"""Words of a slice: tokenizer, light stemmer, BM25 and how much of a query a memory covers.

    tf(t, i)    = count(t, i) + context * (count(t, before i) + count(t, after i))
    idf(t)      = ln(1 + (n - df(t) + 0.5) / (df(t) + 0.5))
    bm25(i)     = sum over t in query of  idf(t) * tf * (k1 + 1) / (tf + k1 * (1 - b + b * len(i) / mean len))
    coverage(i) = sum of idf(t) over t in query and i  /  sum of idf(t) over t in query

    symbol               field               shape
    t                    Postings.terms      [terms], sorted
    i with tf(t, i) > 0  Postings.rows       [entries], grouped by term, rising
    addend of bm25       Postings.impacts    [entries]
    idf                  Postings.idf        [terms]

``before`` and ``after`` are a row's neighbours in its conversation: with ``context`` above 0 a turn can be
found by the words of the question that it answers. Terms are kept as 64-bit hashes, because a dictionary of
strings per owner would take more room than the vectors, and would be words of the memories in clear.
A term that no row holds has the idf of df = 0, so that what nobody ever said lowers the coverage.
"""

import re
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from jaxtyping import Float, Int, Int64

K1, B = 1.2, 0.75

_WORD = re.compile(r"[^\W_]+(?:['’][^\W_]+)*")
_IDEOGRAPH = re.compile(r"([぀-ヿ㐀-鿿豈-﫿])")  # written without spaces: one token each
_VOWEL = re.compile(r"[aeiouy]")
_STOPWORDS = frozenset(
    re.findall(
        r"\w+",
        """a about above after again against all also am an and any are as at be because been before being
        below between both but by can could did do does doing don down during each few for from further had
        has have having he her here hers him his how i if in into is it its itself just let ll me more most
        my no nor not now of off on once only or other our out over own re s same she should so some such t
        than that the their them then there these they this those through to too under until up ve very was
        we were what when where which while who whom why will with would you your yours""",
    )
)


def tokens(text: str) -> list[str]:
    """The stems of a text's words in order, without stop words."""
    plain = _IDEOGRAPH.sub(r" \1 ", unicodedata.normalize("NFKC", text).casefold())
    words = (part for word in _WORD.findall(plain) for part in re.split("['’]", word))
    return [stem(word) for word in words if word not in _STOPWORDS]


@lru_cache(maxsize=1 << 14)
def stem(word: str) -> str:
    """A word without its plural, ``-ed``, ``-ing``, ``-ly`` or final ``e``; short words stay as they are.

    Steps 1 and 5 of Porter's stemmer, roughly: both sides of a match go through it, so it need only be
    consistent, and a light stemmer joins fewer words that have nothing to do with each other.
    """
    if len(word) <= 3 or not word.isascii() or not word.isalpha():
        return word
    if word.endswith(("sses", "shes", "ches", "xes", "zes")):
        word = word[:-2]
    elif word.endswith("ies"):
        word = word[:-3] + "y"
    elif word.endswith("s") and not word.endswith(("ss", "us", "is")):
        word = word[:-1]
    if word.endswith("ied"):
        word = word[:-3] + "y"
    for ending in ("ing", "ed", "ly"):
        root = word.removesuffix(ending)
        if root != word and len(root) > 2 and _VOWEL.search(root):
            word = root[:-1] if root[-1] == root[-2] and root[-1] not in "lsz" else root
            break
    if len(word) > 3 and word.endswith("e"):
        word = word[:-1]
    return word[:-1] + "i" if len(word) > 2 and word.endswith("y") else word


def hashes(words: Iterable[str]) -> Int64[np.ndarray, " words"]:
    """Terms as numbers; they hold within one process."""
    return np.fromiter(map(hash, words), np.int64)


@dataclass(frozen=True, eq=False)
class Counts:
    """How often each row of a slice says each term: three columns of one table, in no order."""

    terms: Int64[np.ndarray, " entries"]
    rows: Int[np.ndarray, " entries"]
    counts: Float[np.ndarray, " entries"]

    @classmethod
    def of(cls, texts: Sequence[str], first: int = 0) -> "Counts":
        """Count `texts` as the rows from `first` on."""
        words = [tokens(text) for text in texts]
        rows = np.repeat(np.arange(first, first + len(words), dtype=np.int32), [len(w) for w in words])
        terms = hashes(word for row in words for word in row)
        return cls(terms, rows, np.ones(len(terms), np.float32)).summed()

    @property
    def bytes(self) -> int:
        """Bytes of the three columns."""
        return self.terms.nbytes + self.rows.nbytes + self.counts.nbytes

    def kept(self, renumbered: Int[np.ndarray, " n"]) -> "Counts":
        """The counts with every row moved to its new number; rows with a negative one go."""
        rows = renumbered[self.rows]
        stay = rows >= 0
        return Counts(self.terms[stay], rows[stay].astype(np.int32), self.counts[stay])

    def plus(self, *others: "Counts") -> "Counts":
        """All tables in one, `summed`; entries of one term and row are added."""
        columns = zip(*((of.terms, of.rows, of.counts) for of in (self, *others)), strict=True)
        return Counts(*map(np.concatenate, columns)).summed()

    def summed(self) -> "Counts":
        """Sorted by term and row, with one entry each."""
        order = np.lexsort((self.rows, self.terms))
        terms, rows, counts = self.terms[order], self.rows[order], self.counts[order]
        first = np.ones(len(terms), bool)
        first[1:] = (terms[1:] != terms[:-1]) | (rows[1:] != rows[:-1])
        starts = np.flatnonzero(first)
        total = np.add.reduceat(counts, starts) if len(starts) else counts
        return Counts(terms[starts], rows[starts], total)


@dataclass(frozen=True, eq=False)
class Postings:
    """An index over the rows of one slice. ``ends[t - 1]:ends[t]`` are the entries of term number t."""

    terms: Int64[np.ndarray, " terms"]
    ends: Int[np.ndarray, " terms"]
    idf: Float[np.ndarray, " terms"]
    rows: Int[np.ndarray, " entries"]
    impacts: Float[np.ndarray, " entries"]
    size: int

    @classmethod
    def of(
        cls,
        counts: Counts,
        before: Int[np.ndarray, " n"],
        after: Int[np.ndarray, " n"],
        *,
        context: float = 0.0,
        k1: float = K1,
        b: float = B,
    ) -> "Postings":
        """Index `counts`, which are summed; ``before`` and ``after`` name each row's neighbours, -1: none."""
        size = len(before)
        if context > 0:
            around = Counts(counts.terms, counts.rows, counts.counts * np.float32(context))
            # Row r is the one before after[r], so it lends its words to that row, and likewise backwards.
            counts = around.kept(before).plus(counts, around.kept(after))
        starts = np.flatnonzero(np.diff(counts.terms, prepend=counts.terms[:1] - 1))
        ends = np.append(starts[1:], len(counts.terms)).astype(np.int64)[: len(starts)]
        df = ends - starts
        idf = np.log1p((size - df + 0.5) / (df + 0.5)).astype(np.float32)
        lengths = np.bincount(counts.rows, counts.counts, minlength=size).astype(np.float32)
        norm = k1 * (1 - b + b * lengths / max(float(lengths.mean()) if size else 0.0, 1e-9))
        tf = counts.counts
        impacts = np.repeat(idf, df) * tf * (k1 + 1) / (tf + norm[counts.rows])
        return cls(counts.terms[starts], ends, idf, counts.rows, impacts.astype(np.float32), size)

    @property
    def bytes(self) -> int:
        """Bytes of all arrays."""
        return sum(a.nbytes for a in (self.terms, self.ends, self.idf, self.rows, self.impacts))

    def search(self, words: Sequence[str]) -> tuple[Float[np.ndarray, " n"], Float[np.ndarray, " n"]]:
        """BM25 and coverage of every row for a query's stems; a repeated stem counts once."""
        bm25, coverage = np.zeros(self.size, np.float32), np.zeros(self.size, np.float32)
        wanted = list({hash(word) for word in words})
        places = np.searchsorted(self.terms, np.asarray(wanted, np.int64)).tolist()
        total = 0.0
        for term, place in zip(wanted, places, strict=True):
            if place == len(self.terms) or self.terms[place] != term:
                total += float(np.log1p((self.size + 0.5) / 0.5))
                continue
            entries = slice(self.ends[place - 1] if place else 0, self.ends[place])
            rows, idf = self.rows[entries], self.idf[place]
            bm25[rows] += self.impacts[entries]
            coverage[rows] += idf
            total += float(idf)
        return bm25, coverage / np.float32(max(total, 1e-9))
