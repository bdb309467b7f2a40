"""The recall part: metrics against plain formulas, loaders on made-up files, the path on a small pool."""

import csv
import gzip
import hashlib
import json
import math
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from benchmarks import memory_recall, recall_data, recall_metrics
from benchmarks.harness import BenchmarkError, Cells
from benchmarks.memory import Part, Run
from benchmarks.recall_data import Needles, Pool, Question
from benchmarks.recall_search import minmax, reciprocal_ranks
from persona_sdk.memory import RetrievalOptions
from persona_sdk.testing import HashEmbedder


@given(arrays(np.float32, st.integers(0, 6), elements=st.floats(-1, 1, width=32)))
def test_minmax_spans_zero_to_one(values: np.ndarray) -> None:
    stretched = minmax(values)
    assert len(stretched) == len(values)
    if len(values) and values.max() > values.min():
        assert (stretched.min(), stretched.max()) == (0.0, 1.0)
    else:
        assert not stretched.any()


def test_reciprocal_ranks_add_up() -> None:
    fused = reciprocal_ranks([["a", "b"], ["b", "c"], ["b", "b"]], k=60)
    assert list(fused) == ["b", "a", "c"]
    assert fused["b"] == pytest.approx(1 / 62 + 1 / 61 + 1 / 61)
    assert reciprocal_ranks([]) == {}


@given(st.permutations(list(range(12))), st.sets(st.integers(0, 11), min_size=1))
def test_metrics_are_their_formulas(ranked: list[int], relevant: set[int]) -> None:
    values = recall_metrics.of_question(ranked, relevant)
    places = sorted(ranked.index(row) + 1 for row in relevant)
    for k in recall_metrics.CUTS:
        assert values[f"recall@{k}"] == pytest.approx(sum(p <= k for p in places) / len(relevant))
    gain = sum(1 / math.log2(p + 1) for p in places if p <= 10)
    ideal = sum(1 / math.log2(p + 1) for p in range(1, min(len(relevant), 10) + 1))
    assert values["ndcg@10"] == pytest.approx(gain / ideal)
    assert values["mrr"] == pytest.approx(1 / places[0])


def test_a_list_without_anything_relevant_scores_nothing() -> None:
    assert set(recall_metrics.of_question([1, 2], {7}).values()) == {0.0}
    assert set(recall_metrics.of_question([], {7}).values()) == {0.0}


@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=8), st.lists(st.integers(0, 4), min_size=1, max_size=8)
)
def test_auroc_counts_the_pairs(positives: list[int], negatives: list[int]) -> None:
    wins = sum((p > n) + (p == n) / 2 for p in positives for n in negatives)
    assert recall_metrics.auroc(positives, negatives) == pytest.approx(wins / len(positives) / len(negatives))


def test_the_bootstrap_holds_the_mean() -> None:
    values = [0.0, 1.0] * 50
    low, high = recall_metrics.bootstrap(values)
    assert low < 0.5 < high
    assert high - low == pytest.approx(2 * 1.96 * 0.05, rel=0.15)
    assert recall_metrics.bootstrap([0.25] * 9) == (0.25, 0.25)


def test_the_rule_prefers_less_weight_of_words_within_a_point() -> None:
    grid = [[0.5, 0.3, 2.0, 0.82], [0.5, 0.3, 1.0, 0.812], [0.25, 0.3, 1.0, 0.815], [0.5, 0.3, 0.7, 0.80]]
    assert memory_recall.pick(grid) == [0.25, 0.3, 1.0]


CONVERSATION = {
    "sample_id": "conv-1",
    "conversation": {
        "speaker_a": "Ann",
        "session_2_date_time": "1:56 pm on 8 May, 2023",
        "session_2": [{"dia_id": "D2:1", "speaker": "Ann", "text": "Hi", "blip_caption": "a dog"}],
        "session_1_date_time": "12:05 am on 1 January, 2023",
        "session_1": [{"dia_id": "D1:1", "speaker": "Bob", "text": "Hello"}],
    },
    "qa": [
        {"question": "One?", "category": 2, "evidence": ["D2:1; D1:1"]},
        {"question": "Dangling?", "category": 1, "evidence": ["D9:9"]},
        {"question": "Partly?", "category": 5, "evidence": ["D1:1", "D9:9"]},
    ],
}


def test_locomo_is_read_and_only_the_published_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "locomo" / "locomo10.json"
    with pytest.raises(BenchmarkError, match="missing"):
        recall_data.locomo(tmp_path)
    file.parent.mkdir()
    file.write_text(json.dumps([CONVERSATION]))
    with pytest.raises(BenchmarkError, match="published"):
        recall_data.locomo(tmp_path)
    monkeypatch.setattr(recall_data, "LOCOMO_SHA256", hashlib.sha256(file.read_bytes()).hexdigest())
    (pool,) = recall_data.locomo(tmp_path)
    assert pool.texts == ("Bob: Hello", "Ann: Hi [shares a dog]")
    assert pool.sessions == ("session_1", "session_2")
    assert pool.times == (datetime(2023, 1, 1, 0, 5, tzinfo=UTC), datetime(2023, 5, 8, 13, 56, tzinfo=UTC))
    assert pool.questions == (
        Question("One?", "temporal", frozenset({0, 1})),
        Question("Partly?", "adversarial", frozenset({0})),
    )


def test_realtalk_drops_questions_with_dangling_evidence(tmp_path: Path) -> None:
    chat = {
        "session_1": [
            {"dia_id": "D1:1", "speaker": "e", "clean_text": "hey", "date_time": "29.12.2023, 22:42:04"}
        ],
        "qa": [
            {"question": "Whole?", "category": 1, "evidence": ["D1:1"]},
            {"question": "Partly?", "category": 1, "evidence": ["D1:1", "D9:9"]},
        ],
    }
    with pytest.raises(BenchmarkError, match="realtalk"):
        recall_data.realtalk(tmp_path)
    (tmp_path / "realtalk").mkdir()
    (tmp_path / "realtalk" / "Chat_1.json").write_text(json.dumps(chat))
    (pool,) = recall_data.realtalk(tmp_path)
    assert [q.text for q in pool.questions] == ["Whole?"]


def test_needles_share_no_word_and_no_topic_with_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recall_data, "DISTRACTORS", 5)
    for name in ("test", "valid"):
        file = tmp_path / "synthetic_persona_chat" / f"{name}.csv.gz"
        file.parent.mkdir(exist_ok=True)
        with gzip.open(file, "wt", newline="") as out:
            personas = "I love sushi.\nMy favorite restaurant is in Rome.\nI hate jazz."
            chat = "User 1: The weather is fine and mild today.\nUser 2: I eat pizza every single day."
            csv.writer(out).writerows([["a", "b", "c"], [personas, "I like dogs.", chat]])
    tasks = tmp_path / "self_instruct_user_oriented" / "user_oriented_instructions.jsonl"
    tasks.parent.mkdir()
    lines = [{"instruction": f"Rewrite the sentence number {n} please."} for n in range(9)]
    tasks.write_text("\n".join(map(json.dumps, lines)))
    topics = {topic.topic: topic for topic in recall_data.needles(tmp_path)}
    food = topics["food"]
    assert food.preferences == ("I love sushi.", "My favorite restaurant is in Rome.")
    assert not [text for text in food.distractors if "pizza" in text]
    assert ("I love sushi.", "Which restaurant would suit me tonight?") in food.pairs()
    assert (
        "My favorite restaurant is in Rome.",
        "Which restaurant would suit me tonight?",
    ) not in food.pairs()
    assert recall_data.needles(tmp_path) == list(topics.values()), "drawn by a seed"


class Texts(HashEmbedder):
    """Counts what it encodes."""

    encoded = 0

    def encode(self, texts: list[str]) -> torch.Tensor:
        Texts.encoded += len(texts)
        return super().encode(texts)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(False, 1, 1, tmp_path, Cells(tmp_path / "cells"), lambda text: None)


def small_pool(name: str) -> Pool:
    start = datetime(2023, 5, 1, tzinfo=UTC)
    texts = tuple(f"Ann: I saw a {animal} at the lake" for animal in ("heron", "badger", "otter", "kite"))
    questions = (
        Question("Who saw the badger?", "single-hop", frozenset({1})),
        Question("Where was the otter?", "adversarial", frozenset({2})),
    )
    return Pool(
        name,
        texts,
        ("s1", "s1", "s2", "s2"),
        tuple(start + n * timedelta(hours=1) for n in range(4)),
        questions,
    )


def test_a_conversation_is_asked_through_the_store_and_resumed_from_cells(run: Run) -> None:
    pools, part = [small_pool(name) for name in ("conv-26", "conv-30", "conv-1")], Part()
    (run.data / "lmeb_results").mkdir()
    kinds = "\n".join(f"some__model,LoCoMo,{kind},0.1,0.2,0.3,0.4,0,0" for kind in memory_recall.WEIGHT)
    head = "model,task,subset,recall_at_1,recall_at_5,recall_at_10,recall_at_50,ndcg_at_10,mrr_at_10"
    (run.data / "lmeb_results" / "lmeb_dialogue_retrieval.csv").write_text(f"{head}\n{kinds}\n")
    memory_recall._conversations(run, memory_recall.Known(Texts(), {}), pools, part)
    bar = part.bars["LoCoMo recall@10, eight conversations"]
    assert (bar.value, bar.target) == (1.0, 0.72)
    rows = part.tables["recall: LoCoMo, eight conversations"]
    assert [row["retriever"] for row in rows] == list(memory_recall.ROWS)
    by_name = {row["retriever"]: row for row in rows}
    assert by_name["ours"]["recall@1"] == by_name["BM25"]["recall@1"] == 1.0
    assert by_name["ours"]["questions"] == 2
    assert len(part.tables["recall: weights on two conversations"]) >= 5
    beside = part.tables["recall: LoCoMo beside published encoders"]
    assert [row["rank of"] for row in beside] == ["1 of 2", "2 of 2"]
    assert beside[1]["recall@10"] == pytest.approx(0.3)
    encoded = Texts.encoded
    again = Part()
    memory_recall._conversations(run, memory_recall.Known(Texts(), {}), pools, again)
    assert Texts.encoded == encoded
    assert (again.bars, again.tables, again.notes) == (part.bars, part.tables, part.notes)


def test_needles_are_looked_for_one_at_a_time(run: Run) -> None:
    distractors = tuple(f"message number {n} of the day" for n in range(20))
    topic = Needles(
        "food", distractors, ("I love sushi", "I hate olives"), ("What could I have for dinner?",)
    )
    part = Part()
    memory_recall._needles(run, memory_recall.Known(HashEmbedder(), {}), [topic], part)
    (table,) = part.tables.values()
    assert {row["pairs"] for row in table} == {2}
    (bar,) = part.bars.values()
    assert bar.op == ">="
    assert -1.0 <= bar.value <= 1.0


def test_the_options_under_test_are_the_defaults() -> None:
    """The bars are about what applications get, so no cell may be reused for other weights."""
    assert memory_recall.options_key() == memory_recall.options_key()
    changed = RetrievalOptions(lexical_weight=0.123)
    assert memory_recall.options_key(changed) != memory_recall.options_key()
