"""Studies of the panacea benchmark: styles that can be told apart, opposed labels, splits, filters."""

import gzip
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks import panacea_data
from benchmarks.panacea_data import (
    Limits,
    Study,
    brief_verbose,
    conflicting,
    harmless,
    labelled,
    made_pairs,
    made_styles,
    prompts,
)
from benchmarks.panacea_styles import STYLES, opposed_pairs, questions, styled
from persona_sdk.adapters.preference_data import encode_examples
from persona_sdk.adapters.training_data import encode_rows


def words(text: str) -> int:
    return len(text.split())


def jsonl(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    with gzip.open(file, "wt") as stream:
        stream.writelines(json.dumps(row) + "\n" for row in rows)


def pair(prompt, first, second, better):
    return {"prompt": prompt, "response_0": first, "response_1": second, "better": better}


@given(seed=st.integers(0, 10_000))
def test_questions_are_split_by_fact(seed):
    train, held_out = questions(train=100, held_out=40, seed=seed)
    asked = {row["prompt"] for row in train} | {row["prompt"] for row in held_out}
    assert len(asked) == 140
    assert (train, held_out) == questions(train=100, held_out=40, seed=seed)
    facts = [{(row["about"], row["answer"]) for row in rows} for rows in (train, held_out)]
    assert len(facts[1]) == 40
    assert not facts[0] & facts[1]
    assert all(row["about"] in row["prompt"] for row in train)


def test_too_many_questions_are_refused():
    with pytest.raises(ValueError, match="cannot give"):
        questions(train=1000)


@given(seed=st.integers(0, 10_000))
def test_a_style_is_told_from_its_opening_and_has_several_wordings(seed):
    asked = questions(seed=seed)[0]
    rows = styled(asked, list(STYLES), seed)
    answers = {row["answer"].casefold() for row in asked}
    openings = {}
    for style, answered in rows.items():
        assert [row["prompt"] for row in answered] == [row["prompt"] for row in asked]
        openings[style] = {row["completion"].casefold().rstrip(".").split()[0].strip(",") for row in answered}
        assert len({row["completion"].split()[0] for row in answered}) > 1
        for row, question in zip(answered, asked, strict=True):
            assert question["answer"].casefold() in row["completion"].casefold()
    openings["concise"] -= answers | {answer.split()[0] for answer in answers}
    assert openings["concise"] == {"just", "only"}
    for one in openings:
        for other in set(openings) - {one}:
            assert not openings[one] & (openings[other] | (answers if one != "concise" else set()))


@given(seed=st.integers(0, 10_000), agreeing=st.sampled_from([0.0, 0.5, 1.0]))
def test_pairs_are_labelled_in_opposite_ways_unless_they_agree(seed, agreeing):
    asked = questions(seed=seed)[0]
    pairs = opposed_pairs(asked, agreeing=agreeing, seed=seed)
    opposed = [each["better"]["brief"] != each["better"]["formal"] for each in pairs]
    assert {0.0: all(opposed), 0.5: any(opposed) and not all(opposed), 1.0: not any(opposed)}[agreeing]
    assert {each["better"]["brief"] for each in pairs} == {0, 1}  # the place of a response says nothing
    for each in pairs:
        lengths = [words(each["response_0"]), words(each["response_1"])]
        assert lengths[each["better"]["brief"]] < lengths[1 - each["better"]["brief"]]
        casual = each[f"response_{1 - each['better']['formal']}"]
        assert casual.endswith("!")


def test_studies_are_what_the_trainer_takes(tiny):
    styles = made_styles(["concise", "casual"], train=8, held_out=4)
    examples = encode_examples(tiny.tokenizer, styles.train, styles.dimensions, "sft", 512)
    assert {name: len(rows) for name, rows in examples.items()} == {"concise": 8, "casual": 8}
    pairs = made_pairs(train=8, held_out=4)
    examples = encode_examples(tiny.tokenizer, pairs.train, pairs.dimensions, "dpo", 512)
    for brief, formal in zip(examples["brief"], examples["formal"], strict=True):
        assert brief.rows == formal.rows[::-1]  # opposed: chosen and rejected change places
    assert conflicting(pairs.train) == prompts(pairs.train)
    assert 0 < len(conflicting(made_pairs(agreeing=0.5).train)) < 200


def test_a_prompt_on_both_sides_is_refused():
    rows = {"brief": [{"prompt": "Hello?", "completion": "Hi."}]}
    with pytest.raises(ValueError, match="1 prompts are on both sides"):
        Study("leak", "sft", rows, rows)


@pytest.fixture
def data(tmp_path):
    long = "a much longer reply that goes on and on"
    jsonl(
        tmp_path / "helpsteer2_dims" / "pairs.jsonl.gz",
        [
            pair("one?", "short", long, {"verbosity": 1, "helpfulness": 0}),
            pair("two?", long, "short two", {"verbosity": 0}),
            pair("two?", "another", "pair of it", {"verbosity": 0}),
            pair("turns <extra_id_1> more", "short", long, {"verbosity": 1}),
            pair("equal?", "four words are here", "and four other words", {"verbosity": 1}),
            pair("too long?", "short", " ".join(["word"] * 30), {"verbosity": 1}),
            pair("blank?", " ", long, {"verbosity": 1}),
            pair("same?", long, long, {"verbosity": 1}),
        ],
    )
    for name, first in (("depth", 0), ("specificity", 1), ("conciseness", 0)):
        rows = [{"prompt": "both?", "response_0": "x", "response_1": long, "better_response_id": first}]
        if name == "specificity":  # the very same pair, the other way round
            rows[0] |= {"response_0": long, "response_1": "x"}
        rows.append(
            {"prompt": f"only {name}?", "response_0": "y", "response_1": long, "better_response_id": 1}
        )
        jsonl(tmp_path / "hummer_dims" / f"{name}_test.jsonl.gz", rows)
    said = "\n\nHuman: {}\n\nAssistant:{}"
    rows = [{"chosen": said.format("bad?", " No."), "rejected": said.format("bad?", " Sure.")}]
    rows.append({"chosen": said.format("worse?", " No way."), "rejected": said.format("worse?", " Yes.")})
    rows.append({"chosen": said.format("a", " No."), "rejected": said.format("b", " Yes.")})
    turns = said.format("hi", " hello") + said.format("bad?", " {}")
    rows.append({"chosen": turns.format("No."), "rejected": turns.format("Yes.")})
    jsonl(tmp_path / "hh_rlhf_harmless_base_test" / "test.jsonl.gz", rows)
    return tmp_path


LIMITS = Limits(prompt=10, reply=12)


def test_real_pairs_by_length(data):
    found = brief_verbose(data, words, "dpo", limits=LIMITS, held_out=2)
    asked = {*prompts(found.train), *prompts(found.held_out)}
    assert asked == {"one?", "two?", "both?", "only depth?", "only specificity?", "only conciseness?"}
    assert len(prompts(found.held_out)) == 2
    for rows in (found.train, found.held_out):
        for brief, verbose in zip(rows["brief"], rows["verbose"], strict=True):
            assert (brief["chosen"], brief["rejected"]) == (verbose["rejected"], verbose["chosen"])
            assert words(brief["chosen"]) < words(brief["rejected"])
    texts = brief_verbose(data, words, "sft", limits=LIMITS, held_out=2)
    assert {row["completion"] for row in texts.train["brief"]} <= {"short", "short two", "x", "y"}
    assert prompts(texts.train) == prompts(found.train)


def test_labels_of_one_pair_are_put_together_and_turned(data):
    found = labelled(data, words, "dpo", limits=LIMITS, held_out=0)
    chosen = {name: {row["prompt"]: row["chosen"] for row in rows} for name, rows in found.train.items()}
    assert chosen["depth"]["both?"] == chosen["specificity"]["both?"] == chosen["conciseness"]["both?"] == "x"
    assert {name: len(rows) for name, rows in found.train.items()} == dict.fromkeys(found.dimensions, 2)
    names = ("verbosity", "helpfulness")
    found = labelled(data, words, "dpo", source="helpsteer2", dimensions=names, limits=LIMITS, held_out=0)
    assert conflicting(found.train) == ["one?"]
    assert {row["prompt"] for row in found.train["helpfulness"]} == {"one?"}


def test_harmless_pairs_are_single_turns(data):
    found = harmless(data, words, "sft", limits=LIMITS, held_out=1)
    both = {
        name: {(row["prompt"], row["completion"]) for row in [*found.train[name], *found.held_out[name]]}
        for name in found.dimensions
    }
    assert both == {
        "harmless": {("bad?", "No."), ("worse?", "No way.")},
        "compliant": {("bad?", "Sure."), ("worse?", "Yes.")},
    }


def test_without_data_there_is_no_study(tmp_path):
    for make in (brief_verbose, harmless, labelled):
        assert make(tmp_path, words, "dpo") is None


def test_a_text_is_left_out_and_never_cut(data, tiny):
    def tokens(text):
        return len(tiny.tokenizer(text, add_special_tokens=False)["input_ids"])

    limits = Limits(prompt=20, reply=10)
    found = panacea_data.harmless(data, tokens, "sft", limits=limits, held_out=0)
    for row in found.train["harmless"]:
        (encoded,) = encode_rows(tiny.tokenizer, [row], 512)
        assert sum(label != -100 for label in encoded["labels"]) <= limits.reply + 1  # its end token
