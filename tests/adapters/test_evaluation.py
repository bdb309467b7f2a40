"""Evaluation while training: the best weights come back, patience ends the run, training does not notice."""

import logging
import math
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.evaluation import Evaluation, standing
from persona_sdk.adapters.resumable import ByLength
from persona_sdk.adapters.training import TrainingOptions, fit, lora_layers
from persona_sdk.adapters.training_data import encode_rows
from persona_sdk.errors import AdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import digest
from persona_sdk.testing import tiny_language_model

from .runs import DATA, STEPS, result

RISING = [float(step) for step in range(1, STEPS + 1)]


def scripted(
    scores: Sequence[float], every: int = 1, **options: Any
) -> Callable[[LanguageModel], Evaluation]:
    left = iter(scores)
    return lambda _: Evaluation(score=lambda: next(left), every=every, **options)


@given(st.lists(st.integers(-3, 3).map(float)), st.sampled_from([0.0, 0.5, 1.0]))
def test_the_standing_is_that_of_a_plain_loop(scores: list[float], min_delta: float) -> None:
    best, waited, found = -math.inf, 0, None
    for position, score in enumerate(scores):
        if score > best + min_delta:
            best, waited, found = score, 0, position
        else:
            waited += 1
    assert standing(scores, min_delta) == (found, waited)


@pytest.mark.parametrize(
    "options", [{"every": 0}, {"every": 1, "patience": 0}, {"every": 1, "min_delta": -1.0}]
)
def test_unusable_evaluations_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="cannot be used"):
        Evaluation(score=lambda: 0.0, **options)


@pytest.mark.parametrize("option", [{"every": 0}, {"every": 1, "keep": 0}, {"every": 1, "more": 1}])
def test_unusable_checkpoints_are_refused(option: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="Bad options for Checkpoints"):
        Checkpoints.parse({"folder": tmp_path, **option})


def test_training_does_not_notice_that_it_is_evaluated() -> None:
    modes, gradients = [], []

    def evaluation(base: LanguageModel) -> Evaluation:
        left = iter(RISING)

        def score() -> float:
            random.random(), numpy.random.rand(), torch.rand(7)
            modes.append(any(part.training for part in base.module.modules()))
            gradients.append(torch.is_grad_enabled())
            return next(left)

        return Evaluation(score=score, every=1)

    plain, evaluated = result(), result(evaluation=evaluation)
    assert evaluated["losses"] == plain["losses"]
    assert len(plain["losses"]) == STEPS
    assert evaluated["weights"] == plain["weights"]  # the last step was the best
    assert (plain["first_loss"], plain["last_loss"]) == (plain["losses"][0], plain["losses"][-1])
    assert modes == gradients == [False] * STEPS
    assert evaluated["evaluations"] == tuple(enumerate(RISING, 1))
    assert (plain["evaluations"], plain["best_step"]) == ((), None)


@pytest.mark.parametrize("best", [1, 4, STEPS])
def test_the_weights_of_the_best_evaluation_come_back(best: int) -> None:
    seen: list[dict[str, Tensor]] = []

    def evaluation(base: LanguageModel) -> Evaluation:
        def score() -> float:
            named = base.module.named_parameters()
            seen.append({name: p.detach().clone() for name, p in named if p.requires_grad})
            return 1.0 if len(seen) == best else 0.0

        return Evaluation(score=score, every=1)

    base = tiny_language_model()
    rows = encode_rows(base.tokenizer, DATA, 64)
    with lora_layers(base, list(base.linears()), seed=0, rank=2, alpha=2):
        report = fit(base, base.module, rows, TrainingOptions(max_steps=STEPS), evaluation=evaluation(base))
        trained = {name: p for name, p in base.module.named_parameters() if p.requires_grad}
        assert trained.keys() == seen[best - 1].keys()
        assert all(torch.equal(trained[name], seen[best - 1][name]) for name in trained)
    assert (report.best_step, report.steps, report.stopped_early) == (best, STEPS, False)
    assert len({digest(tensors) for tensors in seen}) == STEPS


@pytest.mark.parametrize(
    ("scores", "options", "steps", "best"),
    [
        ([3, 2, 1, 9, 9, 9, 9, 9], {"patience": 2}, 3, 1),
        ([1, 1, 1, 9, 9, 9, 9, 9], {"patience": 2}, 3, 1),  # equal is no improvement
        ([1, 2, 3, 2, 4, 3, 3, 3], {"patience": 2}, 7, 5),
        ([1.0, 1.5, 1.9, 9, 9, 9, 9, 9], {"patience": 2, "min_delta": 1.0}, 3, 1),
        ([1.0, 1.5, 2.1, 2.2, 2.3, 9, 9, 9], {"patience": 2, "min_delta": 1.0}, 5, 3),
        ([8, 7, 6, 5, 4, 3, 2, 1], {"patience": None}, STEPS, 1),
        ([8, 7, 6, 5, 4, 3, 2, 1], {"patience": STEPS}, STEPS, 1),
    ],
)
def test_patience_ends_the_run(scores: Any, options: Any, steps: int, best: int) -> None:
    found = result(evaluation=scripted(scores, **options))
    assert (found["steps"], found["best_step"]) == (steps, best)
    assert found["stopped_early"] == (steps < STEPS)


def test_there_is_an_evaluation_after_the_last_step() -> None:
    for every, steps in ((3, [3, 6, 8]), (100, [8]), (4, [4, 8])):
        found = result(evaluation=scripted(RISING, every=every))
        assert [step for step, _ in found["evaluations"]] == steps


class StopError(Exception):
    pass


@pytest.mark.parametrize("at", [2, 4, 6])
def test_a_resumed_run_keeps_scores_patience_and_best_weights(at: int, tmp_path: Path) -> None:
    scores = [1, 5, 3, 4, 2, 1, 9, 9]
    expected = result(evaluation=scripted(scores, patience=4))
    assert (expected["steps"], expected["best_step"]) == (6, 2)

    def before(done: int) -> None:
        if done == at:
            raise StopError

    kept = Checkpoints(folder=tmp_path, every=1)
    if at < 6:
        with pytest.raises(StopError):
            result(checkpoints=kept, before=before, evaluation=scripted(scores, patience=4))
    else:  # ended by itself; there is nothing left to do
        result(checkpoints=kept, evaluation=scripted(scores, patience=4))
    assert result(checkpoints=kept, evaluation=scripted(scores[at:], patience=4)) == expected


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_a_score_that_is_no_number_ends_the_run(score: float) -> None:
    with pytest.raises(AdapterError, match="after step 2 is"):
        result(evaluation=scripted([1.0, score]))


# --- options ------------------------------------------------------------------------------------------


def test_bfloat16_computes_coarser_and_trains_float32(caplog: pytest.LogCaptureFixture) -> None:
    seen: dict[str, Any] = {}

    def evaluation(base: LanguageModel) -> Evaluation:
        def score() -> float:
            linear = next(iter(base.linears().values()))
            handle = linear.register_forward_hook(lambda *a: seen.update(output=a[2].dtype))
            base.module(input_ids=torch.tensor([[1, 2, 3]]))
            handle.remove()
            seen["trained"] = {p.dtype for p in base.module.parameters() if p.requires_grad}
            return 0.0

        return Evaluation(score=score, every=STEPS)

    base = tiny_language_model()
    with caplog.at_level(logging.WARNING):
        coarse = result(base, bf16=True, evaluation=evaluation)
    assert seen == {"output": torch.bfloat16, "trained": {torch.float32}}
    fine = result(base)
    assert coarse["losses"] != fine["losses"]
    assert coarse["losses"] == pytest.approx(fine["losses"], rel=0.05)
    assert coarse["last_loss"] < coarse["first_loss"]
    assert result(base) == fine  # autocast did not stay
    assert not caplog.records


def test_the_order_of_rows_is_another_in_every_epoch_and_for_every_seed() -> None:
    class Trainer:
        class state:  # noqa: N801
            epoch = 0.0

    def order(seed: int, epoch: float) -> list[int]:
        Trainer.state.epoch = epoch
        return list(ByLength([1] * 50, 4, seed, Trainer()))

    assert order(0, 1.0) == order(0, 1.0)
    assert sorted(order(0, 0.0)) == list(range(50))
    assert len({tuple(order(seed, float(epoch))) for seed in range(4) for epoch in range(4)}) == 16


def test_further_callbacks_see_the_run() -> None:
    from transformers import TrainerCallback

    class Seen(TrainerCallback):
        def __init__(self) -> None:
            self.logged: list[float] = []

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if "loss" in logs:
                self.logged.append(logs["loss"])

    base, seen = tiny_language_model(), Seen()
    rows = encode_rows(base.tokenizer, DATA, 64)
    with lora_layers(base, list(base.linears()), seed=0, rank=2, alpha=2):
        report = fit(base, base.module, rows, TrainingOptions(max_steps=2), callbacks=[seen])
    assert tuple(seen.logged) == report.losses
    assert len(report.losses) == 2


def test_a_checkpoint_from_before_the_first_evaluation_is_gone_on_from(tmp_path: Path) -> None:
    def before(done: int) -> None:
        if done == 2:
            raise StopError

    kept = Checkpoints(folder=tmp_path, every=1)
    with pytest.raises(StopError):
        result(checkpoints=kept, before=before, evaluation=scripted([], every=4))
    expected = result(evaluation=scripted([2, 1], every=4))
    assert expected["best_step"] == 4
    assert result(checkpoints=kept, evaluation=scripted([2, 1], every=4)) == expected
