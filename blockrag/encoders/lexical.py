"""An encoder without weights: BM25, projected onto seeded random directions, one per word stem.

    passage vector = sum over its stems of  saturated term frequency * r(stem)
    query vector   = sum over its stems of  idf(stem)                * r(stem)

The directions r are nearly orthogonal, so the inner product of a query and a passage is their BM25 score plus noise
of standard deviation about |q| |p| / sqrt(dimension): word matching in the dense index every other encoder uses, with
nothing to download or train. The noise decides who becomes a candidate, not the final order: `score` computes BM25
itself from the text of the candidates. It matches words, not meanings; it is no replacement for a trained encoder where
questions and passages use different words.

Sources: BM25 as in Robertson and Zaragoza, "The Probabilistic Relevance Framework" (2009), with the idf of Lucene
(never negative); random projection by signs, Achlioptas, "Database-friendly random projections" (2003). A direction's
entries are +-1/sqrt(dimension) read from SHAKE-128 of the stem, not Gaussian draws: same mean and variance, each
direction has length one exactly, and every platform and numpy release gives the same bits. Stems are those of
Porter's 1980 algorithm because it is frozen; the newer English stemmer changes between releases.
"""

from __future__ import annotations

import hashlib
import math
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Protocol

import numpy as np

from blockrag.encoders.protocol import CorpusStatistics, Vectors
from blockrag.errors import InputError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from blockrag.passage import Passage

__all__ = ["CorpusCounts", "LexicalEncoder", "words"]

_SATURATION = 1.2
_LENGTH_SHARE = 0.75
# The length BM25 calls average, in counted words. A constant, because a passage's vector must not depend on which
# passages came before or after it. On SQuAD (true mean 81 to 85) every value from 75 to 300 is within 0.4 points of
# the true mean's recall@1 or above it: benchmarks/lexical_recall.py.
_AVERAGE_LENGTH = 100
_SPARE_CANDIDATES = 64
_REMEMBERED_CHARACTERS = 4000
_LONGEST_WORD = 64
_ROWS_AT_ONCE = 1024

_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an and are as at be been by did do does for from had has have how in is it its of on or that the this to "
        "was were what when where which who whom whose why with",
    )
)

# Optional marks (accents, Hebrew points, Arabic vowel signs): dropped, so that "Beyoncé" and "Beyonce" agree.
_OPTIONAL_MARKS = re.compile(
    "[\u0300-\u036f\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670\u06d6-\u06dc"
    "\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe00-\ufe0f\ufe20-\ufe2f]"
)
# Scripts written without spaces (Thai to Khmer, kana, Han, Hangul): cut into pairs of neighbouring characters, as
# Lucene's CJKAnalyzer does. Hangul is spaced, but its particles join the word.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af\U00020000-\U0003134f"
)
# \w misses the vowel signs of the Indic scripts, which would cut their words apart.
_INDIC = "\u0900-\u0963\u0966-\u0dff"
_WORDS = re.compile(rf"(\d+(?:[.,]\d+)+)|([{_UNSPACED}]+)|((?:[^\W_{_UNSPACED}]+|[{_INDIC}]+)+)(?:['’]s\b)?")


class LexicalEncoder:
    """BM25 as vectors; needs no weights and no network.

    Args:
        dimension: Length of the vectors, a multiple of 8. Doubling it divides the projection's noise by sqrt(2).

    Raises:
        InputError: The dimension is not a multiple of 8 between 8 and 65,536.
    """

    def __init__(self, dimension: int = 1024) -> None:
        if dimension % 8 or not 8 <= dimension <= 65536:
            raise InputError(f"lexical dimension {dimension} is not a multiple of 8 from 8 to 65536; use 1024 or 2048")
        self._dimension = dimension

    @property
    def name(self) -> str:
        """Identity: method version and dimension. Any change to the words or weights must change the version."""
        return f"lexical-1-{self._dimension}"

    @property
    def dimension(self) -> int:
        """Length of every vector."""
        return self._dimension

    def encode_passages(self, passages: Sequence[Passage]) -> Vectors:
        """Saturated term frequencies, projected; `[len(passages), dimension]` float32.

        A passage without a single word to match has the zero vector.
        """
        return self._project(_term_weights(words(f"{passage.title} {passage.text}")) for passage in passages)

    def encode_queries(self, questions: Sequence[str]) -> Vectors:
        """Query vectors with every stem weighing the same, for use without a corpus; `[len(questions), dimension]`."""
        return self._project(dict.fromkeys(words(question), 1.0) for question in questions)

    def passage_terms(self, passages: Sequence[Passage]) -> list[frozenset[str]]:
        """The distinct stems of each passage, its title included."""
        return [frozenset(words(f"{passage.title} {passage.text}")) for passage in passages]

    def encode_queries_with(self, questions: Sequence[str], statistics: CorpusStatistics) -> Vectors:
        """Query vectors weighted by idf over `statistics`; `[len(questions), dimension]` float32.

        Stems that no passage holds are left out, since they could only add noise. A question without any known stem
        (empty, only stop words, nothing in common with the corpus) has the zero vector.
        """
        stems = [frozenset(words(question)) for question in questions]
        known = statistics.passages_with(frozenset().union(*stems)) if stems else {}
        weights = {stem: _idf(count, statistics.passages) for stem, count in known.items() if count > 0}
        return self._project({stem: weights[stem] for stem in query if stem in weights} for query in stems)

    @property
    def spare_candidates(self) -> int:
        """Enough that the projection's noise rarely hides a passage that belongs among the first ten."""
        return _SPARE_CANDIDATES

    def score(self, question: str, passages: Sequence[Passage], statistics: CorpusStatistics) -> list[float]:
        """BM25 of each passage, computed from its words: the inner product without the projection's noise."""
        stems = sorted(frozenset(words(question)))
        known = statistics.passages_with(stems)
        weights = {stem: _idf(known[stem], statistics.passages) for stem in stems if known.get(stem)}
        scores = []
        for passage in passages:
            counted = _passage_weights(f"{passage.title} {passage.text}")
            scores.append(sum(weight * counted.get(stem, 0.0) for stem, weight in weights.items()))
        return scores

    def _project(self, weighted: Iterable[Mapping[str, float]]) -> Vectors:
        rows = [_weighted_sum(weights, self._dimension) for weights in weighted]
        return np.stack(rows) if rows else np.zeros((0, self._dimension), dtype=np.float32)


class CorpusCounts:
    """Corpus statistics in memory, for evaluation and for corpora that fit; the index keeps its own in SQLite."""

    def __init__(self, terms: Iterable[Collection[str]] = ()) -> None:
        self._counts: Counter[str] = Counter()
        self._passages = 0
        for passage in terms:
            self.add(passage)

    @property
    def passages(self) -> int:
        """Number of passages counted."""
        return self._passages

    def add(self, terms: Collection[str]) -> None:
        """Count one more passage with these distinct terms."""
        self._passages += 1
        self._counts.update(frozenset(terms))

    def passages_with(self, terms: Collection[str]) -> Mapping[str, int]:
        """How many passages hold each of `terms`."""
        return {term: self._counts[term] for term in terms if term in self._counts}


def _idf(count: int, passages: int) -> float:
    """Lucene's idf: log(1 + (N - n + 0.5) / (n + 0.5)), positive for every n <= N."""
    return math.log(1 + (max(passages, count) - count + 0.5) / (count + 0.5))


def _term_weights(words: Sequence[str]) -> dict[str, float]:
    """BM25's saturated term frequency of each stem, in order of first appearance."""
    penalty = _SATURATION * (1 - _LENGTH_SHARE + _LENGTH_SHARE * len(words) / _AVERAGE_LENGTH)
    return {stem: n * (_SATURATION + 1) / (n + penalty) for stem, n in Counter(words).items()}


def _passage_weights(text: str) -> Mapping[str, float]:
    """The term weights of a passage, remembered while it is popular unless it is huge."""
    return _remembered_weights(text) if len(text) <= _REMEMBERED_CHARACTERS else _term_weights(words(text))


@lru_cache(maxsize=2048)
def _remembered_weights(text: str) -> Mapping[str, float]:
    return _term_weights(words(text))


def _weighted_sum(weights: Mapping[str, float], dimension: int) -> Vectors:
    """The sum of weight * r(stem), `[dimension]` float32; summed in float64 in a fixed order, then rounded."""
    total = np.zeros(dimension, dtype=np.float64)
    stems = sorted(weights)
    for start in range(0, len(stems), _ROWS_AT_ONCE):
        some = stems[start : start + _ROWS_AT_ONCE]
        packed = np.frombuffer(b"".join(_signs(stem, dimension) for stem in some), dtype=np.uint8)
        bits = np.unpackbits(packed.reshape(len(some), -1), axis=1)
        values: NDArray[np.float64] = np.array([weights[stem] for stem in some], dtype=np.float64)
        # A bit b stands for the sign 2b - 1.
        total += 2 * (values @ bits.astype(np.float64)) - values.sum()
    return (total / math.sqrt(dimension)).astype(np.float32)


@lru_cache(maxsize=1 << 17)
def _signs(stem: str, dimension: int) -> bytes:
    """The signs of r(stem), one bit each: a function of the stem alone, on every platform."""
    return hashlib.shake_128(b"blockrag lexical 1\0" + stem.encode()).digest(dimension // 8)


def words(text: str) -> list[str]:
    """The stems of a text in order, repeats kept, stop words left out."""
    return [_stem(word) for match in _WORDS.finditer(_fold(text)) for word in _cut(match) if word not in _STOP_WORDS]


def _fold(text: str) -> str:
    """Case, width and optional marks removed."""
    if text.isascii():
        return text.lower()
    bare = _OPTIONAL_MARKS.sub("", unicodedata.normalize("NFKD", text.casefold()))
    return unicodedata.normalize("NFC", bare)


def _cut(match: re.Match[str]) -> list[str]:
    """The words of one match: a number without its separators, pairs of unspaced characters, or one word."""
    number, unspaced, word = match.groups()
    if number:
        return [number.replace(",", "")[:_LONGEST_WORD]]
    if unspaced:
        return [unspaced[i : i + 2] for i in range(max(1, len(unspaced) - 1))]
    return [word[:_LONGEST_WORD]]


@lru_cache(maxsize=1 << 17)
def _stem(word: str) -> str:
    if not word.isascii():
        return word
    # PyStemmer, which snowballstemmer uses where it is installed, must not be shared between threads; a stemmer per
    # call is cheap beside a cache miss. Porter's rules leave nothing of "s".
    return _new_stemmer().stemWord(word) or word


class _Stemmer(Protocol):
    def stemWord(self, word: str) -> str: ...


def _new_stemmer() -> _Stemmer:
    import snowballstemmer

    stemmer: _Stemmer = snowballstemmer.stemmer("porter")
    return stemmer
