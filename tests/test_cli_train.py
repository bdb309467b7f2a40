"""``persona train`` through typer's runner, on the tiny model."""

import json

import pytest

from persona_sdk.adapters import Panacea
from persona_sdk.errors import InvalidInputError

from .test_cli import run
from .test_cli_pareto import file_of, labelled, pairs, replies, saved

__all__ = ["saved"]  # the fixture

FAST = ("--set", "rank=2", "--set", "max_steps=2")


@pytest.mark.parametrize(("objective", "rows"), [("sft", replies), ("dpo", pairs), ("dpo", labelled)])
def test_the_adapter_is_the_one_that_train_makes(tmp_path, tiny, saved, objective, rows):
    out, data = tmp_path / "new" / "adapter", file_of(tmp_path, rows(3))
    options = (*FAST, "--set", f"objective={objective}", "--set", 'target_modules=["q_proj"]')
    shown = run("train", "panacea", "--data", data, "--out", str(out), "--model", saved, *options)
    made = Panacea.from_pretrained(out, base=tiny)
    given = {"rank": 2, "max_steps": 2, "target_modules": ("q_proj",), "objective": objective}
    data = [{name: value for name, value in row.items() if name != "id"} for row in rows(3)]
    if rows is not labelled:
        data = {row.pop("dimension"): [row] for row in data}
    dimensions = made.config.dimensions
    assert dimensions == ("concise", "detailed", "formal", "warm")[: 4 if rows is labelled else 3]
    assert made.digest == Panacea.train(tiny, data, {"dimensions": dimensions, **given}).digest
    assert "2 steps" in shown
    assert "concise, detailed, formal" in shown


def test_named_dimensions_are_a_choice_of_those_in_labelled_pairs(tmp_path, tiny, saved):
    out = tmp_path / "adapter"
    options = (*FAST, "--set", "objective=dpo", "--set", 'dimensions=["warm", "concise"]')
    common = ("--data", file_of(tmp_path, labelled(3)), "--model", saved)
    run("train", "panacea", *common, "--out", str(out), *options)
    assert Panacea.from_pretrained(out).config.dimensions == ("warm", "concise")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("rank=0",), "rank"),
        (("rnk=4",), "rnk"),
        (("rank",), "'rank'"),
        (("rank=1", "rank=2"), "rank=2"),
        (("objective=reward",), "reward"),
        (('objective=["sft"]',), "objective"),
        (("dimensions=concise",), "PanaceaConfig: dimensions"),
    ],
)
def test_options_that_cannot_be_used_are_known_before_the_model_is_loaded(tmp_path, options, said):
    common = (
        "--data",
        file_of(tmp_path, replies(2)),
        "--out",
        str(tmp_path / "out"),
        "--model",
        "no-such-model",
    )
    with pytest.raises(InvalidInputError, match=said):
        run("train", "panacea", *common, *(part for option in options for part in ("--set", option)))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["", "rows.jsonl", "rows.jsonl/adapter"])
def test_what_is_there_already_is_not_replaced(tmp_path, out):
    data = file_of(tmp_path, replies(2))
    with pytest.raises(InvalidInputError, match=r"exists already|cannot be written"):
        run("train", "panacea", "--data", data, "--out", str(tmp_path / out), "--model", "no-such-model")
    assert [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()] == replies(2)


def test_an_empty_file_is_no_data(tmp_path):
    empty = file_of(tmp_path, [])
    with pytest.raises(InvalidInputError, match="no rows"):
        run("train", "panacea", "--data", empty, "--out", str(tmp_path / "out"), "--model", "no-such-model")
