"""BM25 and coverage equal their formulas, on any texts and however the counts were put together."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.memory.lexical import K1, B, Counts, Postings, stem, tokens

WORDS = ("dog", "cat", "bird", "house", "river", "stone", "tree")
texts = st.lists(st.lists(st.sampled_from(WORDS), max_size=6).map(" ".join), min_size=1, max_size=9)
queries = st.lists(st.sampled_from((*WORDS, "unknown")), min_size=1, max_size=5)


def chained(n: int) -> tuple[np.ndarray, np.ndarray]:
    """All rows in one conversation."""
    before = np.arange(-1, n - 1)
    after = np.append(np.arange(1, n), -1)
    return before, after


def by_the_formula(rows: list[str], query: list[str], context: float) -> tuple[list[float], list[float]]:
    """BM25 and coverage with dictionaries, one memory at a time."""
    own = [Counter(row.split()) for row in rows]
    tf: list[dict[str, float]] = []
    for i in range(len(rows)):
        around = [own[j] for j in (i - 1, i + 1) if 0 <= j < len(rows)] if context else []
        total: dict[str, float] = dict(own[i])
        for other in around:
            for word, count in other.items():
                total[word] = total.get(word, 0.0) + context * count
        tf.append(total)
    lengths = [sum(row.values()) for row in tf]
    mean = sum(lengths) / len(lengths) or 1.0
    df = {word: sum(word in row for row in tf) for word in query}
    idf = {word: math.log(1 + (len(rows) - df[word] + 0.5) / (df[word] + 0.5)) for word in query}
    bm25, coverage = [], []
    for row, length in zip(tf, lengths, strict=True):
        norm = K1 * (1 - B + B * length / mean)
        there = [word for word in set(query) if word in row]
        bm25.append(sum(idf[w] * row[w] * (K1 + 1) / (row[w] + norm) for w in there))
        coverage.append(sum(idf[w] for w in there) / sum(idf[w] for w in set(query)))
    return bm25, coverage


@given(rows=texts, query=queries, context=st.sampled_from((0.0, 0.25, 1.0)))
@settings(deadline=None)
def test_bm25_and_coverage_equal_the_formula(rows: list[str], query: list[str], context: float) -> None:
    rows, query = [" ".join(map(stem, row.split())) for row in rows], [stem(word) for word in query]
    found = Postings.of(Counts.of(rows), *chained(len(rows)), context=context).search(query)
    for got, expected in zip(found, by_the_formula(rows, query, context), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)


@given(rows=texts, more=texts, drop=st.sets(st.integers(0, 8)), query=queries)
@settings(deadline=None)
def test_counts_that_grew_and_shrank_equal_counts_made_at_once(
    rows: list[str], more: list[str], drop: set[int], query: list[str]
) -> None:
    stay = [row for row in range(len(rows)) if row not in drop]
    renumbered = np.full(len(rows), -1)
    renumbered[stay] = np.arange(len(stay))
    grown = Counts.of(rows).kept(renumbered).plus(Counts.of(more, len(stay)))
    at_once = [*(rows[row] for row in stay), *more]
    around = chained(len(at_once))
    expected = Postings.of(Counts.of(at_once), *around, context=0.5).search(query)
    found = Postings.of(grown, *around, context=0.5).search(query)
    np.testing.assert_array_equal(found, expected)


def test_a_word_nobody_said_lowers_the_coverage() -> None:
    postings = Postings.of(Counts.of(["a red kite", "a blue kite"]), *chained(2))
    assert postings.search(tokens("red kite"))[1][0] == pytest.approx(1.0)
    assert postings.search(tokens("red kite zeppelin"))[1][0] < 0.6
    assert not postings.search(tokens("zeppelin"))[0].any()


def test_the_turn_before_lends_its_words() -> None:
    rows = ["Where did you go to school?", "In Lyon.", "Nice weather today."]
    counts = Counts.of(rows)
    plain, wide = (Postings.of(counts, *chained(3), context=c).search(tokens("school")) for c in (0.0, 0.5))
    assert np.flatnonzero(plain[0]).tolist() == [0]
    assert np.flatnonzero(wide[0]).tolist() == [0, 1]
    assert wide[0][0] > wide[0][1] > 0


@pytest.mark.parametrize(
    "words",
    [
        ("hike", "hiked", "hikes", "hiking"),
        ("party", "parties"),
        ("stop", "stopped", "stopping"),
        ("box", "boxes"),
        ("dog", "dogs", "dog's"),
    ],
)
def test_forms_of_a_word_have_one_stem(words: tuple[str, ...]) -> None:
    assert len({tokens(word)[0] for word in words}) == 1


@pytest.mark.parametrize("pair", [("bus", "busy"), ("sing", "s"), ("bed", "b"), ("glass", "glas")])
def test_words_that_only_look_alike_stay_apart(pair: tuple[str, str]) -> None:
    assert stem(pair[0]) != stem(pair[1])


def test_tokens_of_anything() -> None:
    assert tokens("The dog's   bowl; it IS empty!") == ["dog", "bowl", stem("empty")]
    assert tokens("") == tokens("the and of") == []
    assert tokens("猫が好き") == list("猫が好き")
    assert tokens("Straße ＦＵＬＬ") == [stem("strasse"), "full"]


@given(st.text(max_size=60))
def test_no_text_breaks_the_tokenizer(text: str) -> None:
    assert all(word and not word.isspace() for word in tokens(text))


def test_an_empty_slice_is_searched_in_vain() -> None:
    postings = Postings.of(Counts.of([]), np.zeros(0, int), np.zeros(0, int), context=0.5)
    bm25, coverage = postings.search(["dog"])
    assert len(bm25) == len(coverage) == 0
    silent = Postings.of(Counts.of(["the", "of"]), *chained(2)).search(["dog"])
    assert not np.asarray(silent).any()
