"""Checkpoints: a resumed run ends with the bits of an uninterrupted one, and nothing on disk can execute."""

import json
import logging
import os
import random
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

from persona_sdk.adapters import LoRA, checkpoints
from persona_sdk.adapters.borrowing import borrowed
from persona_sdk.adapters.checkpoints import Checkpoints, describe_run
from persona_sdk.adapters.evaluation import Evaluation
from persona_sdk.adapters.random_state import random_state, same_random_state, set_random_state
from persona_sdk.adapters.training import TrainingOptions, fit
from persona_sdk.adapters.training_data import encode_rows
from persona_sdk.errors import AdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.testing import tiny_language_model

from . import runs
from .runs import STEPS, result

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


class StopError(Exception):
    """What a test raises in the middle of a run."""


@pytest.fixture(scope="module")
def whole() -> dict[str, Any]:
    """The outcome of a run that nothing interrupts and that keeps nothing."""
    return result()


def interrupt(folder: Path, *, at: int, every: int = 1, **options: Any) -> None:
    """Run until `at` steps are done."""

    def before(done: int) -> None:
        if done == at:
            raise StopError

    with pytest.raises(StopError):
        result(checkpoints=Checkpoints(folder=folder, every=every), before=before, **options)


def content(folder: Path) -> dict[str, bytes]:
    return {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}


# --- resuming -----------------------------------------------------------------------------------------


def test_writing_checkpoints_changes_nothing_and_the_newest_stay(
    whole: dict[str, Any], tmp_path: Path
) -> None:
    assert result(checkpoints=Checkpoints(folder=tmp_path / "a", every=3)) == whole
    assert [path.name for path in (tmp_path / "a").iterdir()] == [f"checkpoint-{STEPS}"]
    assert result(checkpoints=Checkpoints(folder=tmp_path / "b", every=3, keep=2)) == whole
    assert {path.name for path in (tmp_path / "b").iterdir()} == {"checkpoint-6", f"checkpoint-{STEPS}"}


@pytest.mark.parametrize("at", range(1, STEPS))
def test_a_run_that_failed_at_any_step_ends_with_the_same_bits(
    at: int, whole: dict[str, Any], tmp_path: Path
) -> None:
    interrupt(tmp_path, at=at)
    steps = []
    assert result(checkpoints=Checkpoints(folder=tmp_path, every=1), before=steps.append) == whole
    assert len(steps) == STEPS - at  # it went on, it did not begin again


@pytest.mark.parametrize("scheduler", ["cosine", "constant_with_warmup"])
def test_a_run_may_fail_again_and_again(scheduler: Any, tmp_path: Path) -> None:
    options = {"lr_scheduler_type": scheduler, "warmup_steps": 3}
    for _ in range(3):
        interrupt(tmp_path, at=2, every=2, **options)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-6"]
    resumed = result(checkpoints=Checkpoints(folder=tmp_path, every=2), **options)
    assert resumed == result(**options)


def test_a_finished_run_is_read_and_not_trained_again(whole: dict[str, Any], tmp_path: Path) -> None:
    kept = Checkpoints(folder=tmp_path, every=5)
    result(checkpoints=kept)

    def refuse(_: int) -> None:
        raise AssertionError("trained again")

    assert result(checkpoints=kept, before=refuse) == whole


def test_steps_that_end_within_an_epoch_are_not_passed(tmp_path: Path) -> None:
    kept = Checkpoints(folder=tmp_path, every=1)
    first = result(checkpoints=kept, max_steps=3)
    assert first["steps"] == 3
    assert result(checkpoints=kept, max_steps=3) == first


def program(folder: Path, die: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "ignore", runs.__file__, str(folder), die]
    path = os.pathsep.join([str(ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)


@pytest.mark.parametrize("die", ["step:5", "write:12"])
def test_a_killed_process_is_gone_on_from(
    die: str, whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    killed = program(tmp_path, die)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    names = {path.name for path in tmp_path.iterdir()}
    if die == "step:5":
        assert names == {"checkpoint-4"}
    else:  # the second checkpoint lies half-written beside the first
        assert names == {"checkpoint-2", ".checkpoint-4.new"}
    ended = program(tmp_path, "never")
    assert ended.returncode == 0, ended.stderr
    assert json.loads(ended.stdout) == json.loads(json.dumps(whole))
    assert [path.name for path in tmp_path.iterdir()] == [f"checkpoint-{STEPS}"]


class Counting(nn.Module):
    """The base with a learned factor and a running mean of its own, which later steps depend on."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module.requires_grad_(False)
        self.factor = nn.Parameter(torch.ones(()))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, **batch: Any) -> dict[str, Any]:
        loss = self.module(**batch).loss
        self.mean.mul_(0.9).add_(0.1 * loss.detach())
        noise = float(numpy.random.standard_normal()) + float(torch.randn(()))
        return {"loss": self.factor * (loss - self.mean) + self.factor**2 * noise}


def test_buffers_and_every_random_generator_go_on_where_they_were(tmp_path: Path) -> None:
    base = tiny_language_model()
    rows = encode_rows(base.tokenizer, runs.DATA, 64)

    def run(stop: int | None, kept: Checkpoints | None) -> tuple[float, float]:
        left = iter(range(10**6))

        def check() -> None:
            if next(left) == stop:
                raise StopError

        with borrowed(base):
            module = Counting(base.module)
            fit(base, module, rows, TrainingOptions(**runs.OPTIONS), check=check, checkpoints=kept)
            return module.factor.item(), module.mean.item()

    kept = Checkpoints(folder=tmp_path, every=1)
    with pytest.raises(StopError):
        run(3, kept)
    assert set(load_file(tmp_path / "checkpoint-3" / "weights.safetensors")) == {"factor", "mean"}
    assert run(None, kept) == run(None, None)


# --- what is on disk ----------------------------------------------------------------------------------


def test_a_checkpoint_holds_safetensors_and_json_of_what_is_trained(tmp_path: Path) -> None:
    base = tiny_language_model()
    score = Evaluation(score=lambda: 1.0, every=2)
    result(base, checkpoints=Checkpoints(folder=tmp_path, every=2), evaluation=lambda _: score)
    (folder,) = tmp_path.iterdir()
    tensors = {f.name: load_file(f) for f in folder.iterdir() if f.suffix == ".safetensors"}
    texts = {f.name: json.loads(f.read_text()) for f in folder.iterdir() if f.suffix == ".json"}
    assert {*tensors, *texts} == {f.name for f in folder.iterdir()}
    expected = {"weights", "best", "optimizer", "random"}
    assert set(tensors) == {f"{name}.safetensors" for name in expected}
    trained = set(tensors["weights.safetensors"])
    assert len(trained) == 6  # A and B of three modules
    assert all("lora_" in name for name in trained)
    moments = {name.partition(".")[2] for name in tensors["optimizer.safetensors"]}
    assert moments == {"step", "exp_avg", "exp_avg_sq"}


def test_nothing_is_pickled_or_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("pickle was used")

    monkeypatch.setattr(torch, "save", refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr("pickle.dumps", refuse)
    monkeypatch.setattr("pickle.loads", refuse)
    interrupt(tmp_path, at=3)
    result(checkpoints=Checkpoints(folder=tmp_path, every=1))


# --- damage -------------------------------------------------------------------------------------------


def damage(folder: Path, how: str) -> None:
    weights = folder / "weights.safetensors"
    if how == "a flipped bit":
        raw = bytearray(weights.read_bytes())
        raw[-1] ^= 1
        weights.write_bytes(raw)
    elif how == "a file cut short":
        weights.write_bytes(weights.read_bytes()[:-7])
    elif how == "a missing file":
        (folder / "scheduler.json").unlink()
    elif how == "an edited state":
        path = folder / "trainer_state.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "global_step": 7}))
    elif how == "a file too many":
        (folder / "more.json").write_text("{}")
    elif how == "no manifest":
        (folder / "run.json").unlink()
    else:
        (folder / "run.json").write_bytes(b'{"run": ' if how == "half a manifest" else b"[1, 2]")


DAMAGES = [
    "a flipped bit",
    "a file cut short",
    "a missing file",
    "an edited state",
    "a file too many",
    "no manifest",
    "half a manifest",
    "another manifest",
]


@pytest.mark.parametrize("how", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_for_the_one_before_it(
    how: str, whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    kept = Checkpoints(folder=tmp_path, every=1, keep=2)
    with pytest.raises(StopError):
        result(checkpoints=kept, before=_stop_at_five)
    damage(tmp_path / "checkpoint-5", how)
    steps: list[int] = []
    with caplog.at_level(logging.WARNING, logger="persona_sdk"):
        assert result(checkpoints=kept, before=steps.append) == whole
    assert len(steps) == STEPS - 4
    assert "checkpoint-5 is damaged" in caplog.text
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-7", "checkpoint-8"}


def _stop_at_five(done: int) -> None:
    if done == 5:
        raise StopError


def test_a_run_with_nothing_but_damage_begins_again(
    whole: dict[str, Any], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    interrupt(tmp_path, at=5)
    damage(tmp_path / "checkpoint-5", "a flipped bit")
    steps: list[int] = []
    with caplog.at_level(logging.WARNING, logger="persona_sdk"):
        kept = Checkpoints(folder=tmp_path, every=2)
        # the damaged one comes later than all of these and must not push them out
        with pytest.raises(StopError):
            result(checkpoints=kept, before=lambda done: _stop_at_five(done + 2))
        assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-2", "checkpoint-5"}
        assert result(checkpoints=kept, before=steps.append) == whole
    assert len(steps) == STEPS - 2
    assert "is damaged" in caplog.text


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"learning_rate": 1e-3}, "learning_rate 0.02 (now 0.001)"),
        ({"seed": 4}, "seed 3 (now 4)"),
        ({"data": runs.DATA[1:]}, "rows"),
        ({"rank": 3}, "parameters"),
        ({"base": tiny_language_model(seed=1)}, "base"),
        ({"evaluation": lambda _: Evaluation(score=lambda: 0.0, every=1)}, "evaluation"),
    ],
    ids=["option", "seed", "rows", "rank", "base", "evaluation"],
)
@pytest.mark.parametrize("damaged", [False, True])
def test_another_runs_checkpoint_is_refused_and_stays(
    changed: dict[str, Any], named: str, damaged: bool, tmp_path: Path
) -> None:
    interrupt(tmp_path, at=2)
    if damaged:
        damage(tmp_path / "checkpoint-2", "a flipped bit")
    before = content(tmp_path)
    with pytest.raises(InvalidInputError) as caught:
        result(**{**changed, "checkpoints": Checkpoints(folder=tmp_path, every=1)})
    assert "belongs to another run" in caught.value.message
    assert f"differs in {named}" in caught.value.message
    assert content(tmp_path) == before


def test_folders_of_others_are_refused_and_stay(tmp_path: Path) -> None:
    foreign = tmp_path / "checkpoint-1"
    foreign.mkdir()
    (foreign / "optimizer.pt").write_bytes(b"pickled")
    with pytest.raises(InvalidInputError, match=r"it holds optimizer\.pt"):
        result(checkpoints=Checkpoints(folder=tmp_path, every=1))
    file = tmp_path / "file"
    file.write_text("a file")
    with pytest.raises(InvalidInputError, match="is a file"):
        result(checkpoints=Checkpoints(folder=file, every=1))
    assert content(tmp_path) == {"checkpoint-1/optimizer.pt": b"pickled", "file": b"a file"}


def test_a_disk_that_refuses_leaves_the_checkpoint_before(
    whole: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter(range(10**6))
    rename = os.rename

    def full(*paths: Any) -> None:
        if next(calls) == 2:
            raise OSError(28, "No space left on device")
        rename(*paths)

    monkeypatch.setattr(checkpoints.os, "rename", full)
    kept = Checkpoints(folder=tmp_path, every=1)
    with pytest.raises(AdapterError, match="No space left"):
        result(checkpoints=kept)
    assert "checkpoint-2" in {path.name for path in tmp_path.iterdir()}
    assert result(checkpoints=kept) == whole


def test_the_base_is_given_back_when_a_checkpoint_is_refused(tmp_path: Path) -> None:
    base = tiny_language_model()
    tree = [type(part) for part in base.module.modules()]
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError):
        LoRA.train(base, runs.DATA, checkpoints=Checkpoints(folder=tmp_path / "file", every=1))
    assert [type(part) for part in base.module.modules()] == tree
    assert base.lock.acquire(blocking=False)


def test_lora_train_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    base: LanguageModel = tiny_language_model()
    options = {"rank": 2, "max_steps": 4, "dropout": 0.1}
    kept = Checkpoints(folder=tmp_path, every=1)
    seen: list[float] = []

    def failing() -> float:
        seen.append(0.0)
        if len(seen) == 3:
            raise StopError
        return float(len(seen))

    with pytest.raises(StopError):
        LoRA.train(base, runs.DATA, options, checkpoints=kept, evaluation=Evaluation(failing, every=1))
    again = LoRA.train(base, runs.DATA, options, checkpoints=kept, evaluation=Evaluation(failing, every=1))
    assert again.digest == LoRA.train(base, runs.DATA, options).digest
    assert again.report is not None
    assert [step for step, _ in again.report.evaluations] == [1, 2, 3, 4]


# --- parts --------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32 - 1), st.integers(0, 3), st.integers(0, 700))
def test_the_random_state_survives_as_tensors(seed: int, normals: int, words: int) -> None:
    with same_random_state():
        random.seed(seed)
        numpy.random.seed(seed)
        torch.manual_seed(seed)
        for _ in range(normals):  # an odd number leaves one behind in both generators
            random.gauss(0, 1)
            numpy.random.standard_normal()
        numpy.random.randint(0, 2**16, words)
        torch.rand(words)
        state = random_state(CPU)

        def draw() -> list[float]:
            drawn = [random.gauss(0, 1), random.random(), *torch.randn(3).tolist()]
            return [*drawn, *numpy.random.standard_normal(3).tolist(), float(numpy.random.rand())]

        first = draw()
        draw()
        set_random_state(state, CPU)
        assert draw() == first


def test_the_description_of_a_run_sees_every_part() -> None:
    row = {"input_ids": [1, 2], "w": 0.5, "teacher": torch.arange(3.0)}
    shapes = {"a": torch.zeros(2, 3)}
    plain = describe_run({"seed": 0}, [row], "base", shapes)
    assert plain == describe_run({"seed": 0}, [dict(reversed(row.items()))], "base", {"a": torch.ones(2, 3)})
    others = [
        describe_run({"seed": 1}, [row], "base", shapes),
        describe_run({"seed": 0}, [row, row], "base", shapes),
        describe_run({"seed": 0}, [{**row, "w": 0.25}], "base", shapes),
        describe_run({"seed": 0}, [{**row, "teacher": torch.arange(3.0) + 1}], "base", shapes),
        describe_run({"seed": 0}, [row], "other", shapes),
        describe_run({"seed": 0}, [row], "base", {"b": torch.zeros(2, 3)}),
        describe_run({"seed": 0}, [row], "base", {"a": torch.zeros(3, 2)}),
        describe_run({"seed": 0}, [row], "base", {"a": torch.zeros(2, 3).half()}),
        describe_run({"seed": 0}, [row], "base", shapes, processes=2),
    ]
    assert plain not in others
    with pytest.raises(TypeError, match="holds a object"):
        describe_run({}, [{"x": object()}], "base", shapes)
