"""Text to weights: facts and questions of the benchmark, bars from cells, a run on a tiny model."""

import csv
import gzip
import json

import pytest

from benchmarks import memory_promotion
from benchmarks.harness import Cells
from benchmarks.memory import Run
from benchmarks.memory_promotion import (
    CATEGORIES,
    SAID,
    examine,
    made_facts,
    persona_texts,
    stored,
    summarise,
)
from persona_sdk.adapters.distillation import DistillationConfig
from persona_sdk.adapters.distillation_data import training_pairs
from persona_sdk.adapters.statements import statement_of

SMALL = DistillationConfig(rank=2, num_train_epochs=1, anchors=1, samples=False)


def cell(**adapter):
    plain = {"recall": 0.25, "said": 0.0, "ability": -2.0, "choice": 0.75}
    sides = {"base": plain, "text in the prompt": {**plain, "recall": 0.9}, "adapter": {**plain, **adapter}}
    return {"sides": sides, "texts": 3, "questions": 6, "bytes": 1, "seconds": 1.0, "tokens": 9, "steps": 2}


def cells(**adapter):
    return {f"{kind} facts, persona 0": cell(**adapter) for kind in ("made", "stored")}


@pytest.mark.parametrize("template", CATEGORIES)
def test_every_made_fact_can_be_asked_for_by_its_value(template):
    for value in CATEGORIES[template]:
        said = statement_of(template.format(value))
        assert said.value.endswith(value)
        assert said.answer.endswith(f"{value}.")
        assert said.form
    assert len(set(CATEGORIES[template])) >= 4


@pytest.mark.parametrize("template", SAID)
def test_so_can_every_stored_one(template):
    for value in SAID[template]:
        fact = stored(template.format(value))
        said = statement_of(fact)
        assert fact.text.startswith("The user")
        assert said.value.endswith(value)
        assert said.form
        assert "user" not in said.question + said.answer
    assert len({statement_of(stored(each.format(SAID[each][0]))).question for each in SAID}) == len(SAID)


def test_facts_follow_from_the_seed_and_questions_are_held_out():
    texts, probes = made_facts(3, 8)
    assert made_facts(3, 8) == (texts, probes)
    assert made_facts(4, 8)[0] != texts
    drilled = {question for text in texts for question, _ in training_pairs(text)}
    assert not drilled & {probe.question for probe in probes}
    for text, probe in zip([t for t in texts for _ in range(2)], probes, strict=True):
        assert probe.options[probe.right] == statement_of(text).value
        assert len(set(probe.options)) == 4


def test_bars_follow_from_the_cells():
    good = summarise(cells(recall=0.9, ability=-2.1))
    assert all(bar.ok for bar in good.bars.values())
    assert "accept 2 of 2" in good.notes[-1]
    bad = summarise(cells(ability=-3.0, choice=0.5), ["a note"])
    assert not any(bar.ok for bar in bad.bars.values())
    assert "accept 0 of 2" in bad.notes[-1]
    json.dumps(bad.tables, allow_nan=False)


def test_sentences_come_from_the_data_if_it_is_there(tmp_path):
    run = Run(False, 1, 1, tmp_path, Cells(None), lambda _: None)
    assert persona_texts(run, 0, 4) is None
    (tmp_path / "synthetic_persona_chat").mkdir()
    with gzip.open(tmp_path / "synthetic_persona_chat" / "valid.csv.gz", "wt", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["user 1 personas", "user 2 personas", "Best Generated Conversation"])
        writer.writerow(["I have a dog.\nI like tea.\nI am tall.\nI sing.", "-", "-"])
    assert persona_texts(run, 0, 3) == ["I have a dog.", "I like tea.", "I am tall."]


def test_a_whole_part_on_a_tiny_model(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_promotion, "smollm2", lambda: (tiny, "tiny"))
    monkeypatch.setattr(memory_promotion, "DistillationConfig", lambda **_: SMALL)
    part = memory_promotion.measure(Run(True, 1, 1, tmp_path, Cells(tmp_path), lambda _: None))
    assert len(part.tables["text to weights"]) == 6
    monkeypatch.setattr(memory_promotion, "smollm2", lambda: pytest.fail("cells were to be read"))
    again = memory_promotion.measure(Run(True, 1, 1, tmp_path, Cells(tmp_path), lambda _: None))
    assert again.bars == part.bars


def test_the_sides_differ_by_what_is_known(tiny):
    texts, probes = made_facts(0, 2)
    found = examine(tiny, texts, probes, SMALL)["sides"]
    assert found["base"]["ability"] != found["adapter"]["ability"]
    assert found["base"]["ability"] != found["text in the prompt"]["ability"]
