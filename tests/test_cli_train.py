"""``persona train`` through typer's runner, on the tiny model."""

import json
import re

import pytest

from persona_sdk.adapters import Panacea, checkpoints
from persona_sdk.adapters.checkpoints import Checkpoints
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


# --- held-out rows and checkpoints --------------------------------------------------------------------

LONGER = ("--set", "rank=2", "--set", "max_steps=6", "--set", 'target_modules=["q_proj"]')


class KilledError(Exception):
    """What a test raises in the middle of a run."""


def arguments(folder, saved, out: str, *more: str, rows=replies) -> tuple[str, ...]:
    data = file_of(folder, rows(2))
    return ("train", "panacea", "--data", data, "--model", saved, "--out", str(folder / out), *LONGER, *more)


def renamed(folder, name: str, rows) -> str:
    """A second file of rows beside the first."""
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(("objective", "rows"), [("sft", replies), ("dpo", labelled)])
@pytest.mark.parametrize("with_held_out", [False, True])
def test_the_same_command_again_goes_on_to_the_same_adapter(
    tmp_path, saved, monkeypatch, objective, rows, with_held_out
):
    more = ["--set", f"objective={objective}", "--set", 'dimensions=["concise", "detailed"]']
    if with_held_out:
        more += ["--held-out", renamed(tmp_path, "held_out.jsonl", rows(2)), "--set", "eval_steps=2"]
    kept = ["--checkpoints", str(tmp_path / "kept"), "--save-steps", "2"]
    run(*arguments(tmp_path, saved, "whole", *more, rows=rows))

    written, write = [], checkpoints.write

    def noted(options: Checkpoints, step: int, *rest) -> None:
        write(options, step, *rest)
        written.append(step)
        if written == [2, 4]:
            raise KilledError

    monkeypatch.setattr(checkpoints, "write", noted)
    command = arguments(tmp_path, saved, "resumed", *more, *kept, rows=rows)
    with pytest.raises(KilledError):
        run(*command)
    assert not (tmp_path / "resumed").exists()
    run(*command)
    assert written == [2, 4, 6]  # steps 1 to 4 were not taken again
    whole, resumed = (Panacea.from_pretrained(tmp_path / name) for name in ("whole", "resumed"))
    assert resumed.digest == whole.digest


def test_held_out_rows_decide_which_weights_are_kept(tmp_path, tiny, saved):
    held_out = renamed(tmp_path, "held_out.jsonl", replies(2))
    more = ("--set", "eval_steps=1", "--set", "early_stopping_patience=2", "--set", "learning_rate=3.0")
    shown = run(*arguments(tmp_path, saved, "adapter", *more, "--held-out", held_out))
    data = {row.pop("dimension"): [row] for row in replies(2)}
    options = {"rank": 2, "max_steps": 6, "target_modules": ("q_proj",), "learning_rate": 3.0}
    options |= {"dimensions": ("concise", "detailed"), "eval_steps": 1, "early_stopping_patience": 2}
    made = Panacea.train(tiny, data, options, held_out=data)
    assert Panacea.from_pretrained(tmp_path / "adapter").digest == made.digest
    assert made.digest != Panacea.train(tiny, data, options).digest
    [steps, best] = re.search(r"(\d+) steps, best after (\d+)", shown).groups()
    assert (int(steps), int(best)) == (made.report.steps, made.report.best_step)


def test_held_out_rows_of_other_dimensions_are_named_before_the_model_is_loaded(tmp_path):
    held_out = renamed(tmp_path, "held_out.jsonl", replies(3))
    with pytest.raises(InvalidInputError, match=r"held_out\.jsonl, line 3: 'formal' is no dimension"):
        run(*arguments(tmp_path, "no-such-model", "out", "--held-out", held_out))
    missing = renamed(tmp_path, "missing.jsonl", replies(1))
    with pytest.raises(InvalidInputError, match=r"missing\.jsonl has no row for detailed"):
        run(*arguments(tmp_path, "no-such-model", "out", "--held-out", missing))


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (("--save-steps", "2"), "has no folder"),
        (("--checkpoints", "{}/out"), "would lie in the adapter"),
        (("--checkpoints", "{}/out/kept"), "would lie in the adapter"),
        (("--checkpoints", "{}/rows.jsonl"), "cannot be written"),
    ],
)
def test_checkpoints_that_cannot_be_kept_are_refused_before_the_model_is_loaded(tmp_path, more, said):
    given = [part.format(tmp_path) for part in more]
    with pytest.raises(InvalidInputError, match=said):
        run(*arguments(tmp_path, "no-such-model", "out", *given))
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl"}


def test_checkpoints_of_other_options_are_refused(tmp_path, saved):
    kept = ("--checkpoints", str(tmp_path / "kept"))
    run(*arguments(tmp_path, saved, "one", *kept))
    with pytest.raises(InvalidInputError, match="belongs to another run"):
        run(*arguments(tmp_path, saved, "two", *kept, "--set", "seed=1"))
