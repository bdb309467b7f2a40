"""Training: learns what it is shown, is repeatable, and gives the base back exactly as it was."""

import logging
import os
import random
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import nn

from persona_sdk.adapters import LoRA, training
from persona_sdk.adapters.training_data import IGNORED, collate, encode_rows
from persona_sdk.errors import AdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, encode
from persona_sdk.testing import tiny_language_model

PAIRS = [("How are you?", "Very well."), ("What is it?", "A short answer."), ("Name?", "Alice")]
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "See you"},
]
QUICK = {"rank": 2, "max_steps": 2, "learning_rate": 1e-2}


@pytest.fixture
def base() -> LanguageModel:
    return tiny_language_model()


def learned(row: dict[str, list[int]]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def state_of(model: LanguageModel) -> dict[str, Any]:
    """Everything about a base model that training must give back."""
    parts = dict(model.module.named_modules())
    return {
        "tree": [(path, type(part)) for path, part in parts.items()],
        "same": [id(part) for part in parts.values()],
        "attributes": [sorted(vars(part)) for part in parts.values()],
        "weights": {name: tensor.clone() for name, tensor in model.module.state_dict().items()},
        "flags": [(name, p.requires_grad, p.grad) for name, p in model.module.named_parameters()],
        "modes": [part.training for part in parts.values()],
        "hooks": [
            (len(part._forward_hooks), len(part._forward_pre_hooks), len(part._backward_hooks))
            for part in parts.values()
        ],
        "config": model.module.config.to_dict(),
        "fingerprint": training.peft_format.digest(dict(model.module.named_parameters())),
    }


def assert_same_state(before: dict[str, Any], after: dict[str, Any]) -> None:
    weights = before.pop("weights"), after.pop("weights")
    assert before == after
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


# --- rows ---------------------------------------------------------------------------------------------


def test_a_pair_learns_its_reply_and_the_end_token_after_the_serving_prompt(tiny: LanguageModel) -> None:
    for given in (PAIRS[0], list(PAIRS[0]), {"prompt": PAIRS[0][0], "completion": PAIRS[0][1]}):
        (row,) = encode_rows(tiny.tokenizer, [given], 512)
        prompt = encode(tiny.tokenizer, [Message(role="user", content=PAIRS[0][0])])
        assert tuple(row["input_ids"][: len(prompt)]) == prompt
        assert row["labels"][: len(prompt)] == [IGNORED] * len(prompt)
        assert tiny.tokenizer.decode(learned(row)) == "Very well.<|im_end|>"


def test_a_chat_learns_every_assistant_turn_after_its_own_history(tiny: LanguageModel) -> None:
    for given in (CHAT, {"messages": CHAT}, [Message(**turn) for turn in CHAT]):
        rows = encode_rows(tiny.tokenizer, [given], 512)
        assert [tiny.tokenizer.decode(learned(row)) for row in rows] == [
            "Hello<|im_end|>",
            "See you<|im_end|>",
        ]
        assert "Hello" in tiny.tokenizer.decode(rows[1]["input_ids"][:-3])
        assert "See" not in tiny.tokenizer.decode(rows[0]["input_ids"])


def test_a_text_learns_all_its_tokens_but_the_first(tiny: LanguageModel) -> None:
    for given in ("Two dogs every morning", {"text": "Two dogs every morning"}):
        (row,) = encode_rows(tiny.tokenizer, [given], 512)
        assert learned(row) == row["input_ids"][1:]
        assert row["input_ids"][-1] == tiny.tokenizer.eos_token_id


def test_text_cannot_smuggle_in_special_tokens(tiny: LanguageModel) -> None:
    nasty = "a<|im_end|><|im_start|>user"
    for given in (nasty, ("hi", nasty), (nasty, "hi")):
        (row,) = encode_rows(tiny.tokenizer, [given], 512)
        clean = encode_rows(tiny.tokenizer, [("a", "a") if isinstance(given, tuple) else "a"], 512)[0]
        for token in (1, 2):
            assert row["input_ids"].count(token) == clean["input_ids"].count(token)


@pytest.mark.parametrize("prompt_words", [1, 40])
@pytest.mark.parametrize("reply_words", [1, 40])
def test_long_rows_lose_the_start_of_the_prompt_first_and_are_counted(
    prompt_words: int, reply_words: int, tiny: LanguageModel, caplog: pytest.LogCaptureFixture
) -> None:
    pair = ("dogs " * prompt_words, "walks " * reply_words)
    (whole,) = encode_rows(tiny.tokenizer, [pair], 512)
    with caplog.at_level(logging.WARNING, logger="persona_sdk"):
        (row, short) = encode_rows(tiny.tokenizer, [pair, ("a", "b")], 24)
    assert len(short["input_ids"]) <= 24
    if len(whole["input_ids"]) <= 24:
        assert row == whole
        assert not caplog.records
        return
    assert len(row["input_ids"]) == 24
    assert "1 of 2 training rows were cut to 24 tokens" in caplog.text
    reply = learned(whole)
    assert learned(row) == reply[: len(learned(row))]
    assert len(learned(row)) == min(len(reply), 23)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "nothing to train on"),
        ("a text", "data is a str"),
        (None, "data is a NoneType"),
        (7, "data is a int"),
        ({"text": "a"}, "data is a dict"),
        ([PAIRS[0], ""], "row 1: the text is blank"),
        ([PAIRS[0], " \n"], "row 1: the text is blank"),
        ([PAIRS[0], ("hi", "  ")], "row 1: the reply is blank"),
        ([PAIRS[0], ("", "hi")], "row 1: the prompt is blank"),
        ([PAIRS[0], PAIRS[1], 5], "row 2: 5 is not usable"),
        ([None], "row 0: None"),
        ([("a", "b", "c")], "row 0"),
        ([("a", 3)], "row 0"),
        ([b"bytes"], "row 0"),
        ([[]], "row 0"),
        ([{"question": "a"}], "row 0: it has the keys"),
        ([{"text": 3}], "row 0: the text is a int"),
        ([CHAT[:2]], "row 0: the chat has no assistant turn"),
        ([CHAT[2:3]], "row 0: There are no messages"),
        ([[{"role": "wizard", "content": "x"}, CHAT[2]]], "row 0: Message 0"),
        ([[CHAT[1], {"role": "assistant"}]], "row 0: the reply is blank"),
    ],
)
def test_unusable_rows_are_named(data: Any, message: str, tiny: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match=message) as caught:
        LoRA.train(tiny, data, QUICK)
    assert caught.value.hint


def test_padding_is_masked_and_as_short_as_it_can_be() -> None:
    rows = [{"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}, {"input_ids": [8], "labels": [8]}]
    batch = collate(rows, pad_id=9)
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [8, -100, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]


# --- learning -----------------------------------------------------------------------------------------


def test_training_lowers_the_loss_and_reports_it(base: LanguageModel) -> None:
    adapter = LoRA.train(base, PAIRS, {"rank": 4, "num_train_epochs": 25, "learning_rate": 2e-2})
    report = adapter.report
    assert report is not None
    assert report.last_loss < 0.5 * report.first_loss
    assert (report.rows, report.steps) == (3, 25)
    assert report.tokens == 25 * sum(len(r["input_ids"]) for r in encode_rows(base.tokenizer, PAIRS, 512))
    assert report.seconds > 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_does_not(base: LanguageModel) -> None:
    def run(**options: Any) -> str:
        return LoRA.train(base, [*PAIRS, CHAT, "text"], {**QUICK, "dropout": 0.1, **options}).digest

    first = run()
    torch.manual_seed(99)  # the caller's random state does not matter
    assert run() == first
    assert run(seed=1) != first


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2"])
def test_the_base_is_given_back_exactly(
    architecture: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_language_model(architecture=architecture)
    hook = base.module.register_forward_hook(lambda *_: None)
    before = state_of(base)
    monkeypatch.chdir(tmp_path)
    LoRA.train(base, PAIRS, QUICK)
    assert_same_state(before, state_of(base))
    hook.remove()
    assert not any(part._forward_hooks for part in base.module.modules())
    assert not list(tmp_path.iterdir())


def callers_state() -> tuple[Any, ...]:
    """All but the state of `random`, which beartype draws from whenever it checks a list."""
    arrays: Any = numpy.random.get_state()
    return arrays[1].tolist(), arrays[2], torch.get_rng_state().tolist(), dict(os.environ)


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("when", ["injecting", "forward", "loading"])
def test_the_base_is_given_back_when_training_fails(
    fault: type[BaseException], when: str, base: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, caller = state_of(base), callers_state()
    calls = 0

    def fail(*_: Any, **__: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise fault("fault on purpose")
        return original(*_, **__)

    if when == "injecting":  # half of the layers are peft's by then
        from peft.tuners.lora import LoraModel

        original = LoraModel._create_and_replace
        monkeypatch.setattr(LoraModel, "_create_and_replace", fail)
    elif when == "forward":
        original = nn.functional.silu
        monkeypatch.setattr(nn.functional, "silu", fail)
    else:
        original = collate
        monkeypatch.setattr(training, "collate", fail)
    with pytest.raises(fault, match="fault on purpose"):
        LoRA.train(base, PAIRS * 4, {**QUICK, "max_steps": 6})
    monkeypatch.undo()
    assert calls == 3
    assert_same_state(before, state_of(base))
    assert callers_state() == caller
    assert base.lock.acquire(blocking=False)
    base.lock.release()


def test_the_callers_random_state_and_environment_stay(base: LanguageModel) -> None:
    before = callers_state()
    LoRA.train(base, PAIRS, QUICK)
    assert callers_state() == before


def test_borrowing_restores_every_random_state(base: LanguageModel) -> None:
    before, python = callers_state(), random.getstate()
    draws = []
    for _ in range(2):
        with training.borrowed(base):
            training.seed_everything(5)
            draws.append((random.random(), float(numpy.random.rand()), float(torch.rand(()))))
        assert random.getstate() == python
        assert callers_state() == before
    assert draws[0] == draws[1]


def test_the_lock_is_held_while_training(base: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []

    def watch(rows: Sequence[Any], pad_id: int) -> Any:
        def try_it() -> None:
            free = base.lock.acquire(blocking=False)
            seen.append(free)
            if free:
                base.lock.release()

        other = threading.Thread(target=try_it)
        other.start()
        other.join()
        return collate(rows, pad_id)

    monkeypatch.setattr(training, "collate", watch)
    LoRA.train(base, PAIRS, QUICK)
    assert seen
    assert not any(seen)


def test_a_diverging_run_gives_no_adapter(base: LanguageModel) -> None:
    before = state_of(base)
    with pytest.raises(AdapterError, match="diverged") as caught:
        LoRA.train(base, PAIRS, {**QUICK, "learning_rate": 1e30, "max_steps": 8})
    assert "learning_rate" in caught.value.hint
    assert_same_state(before, state_of(base))


def test_weights_that_break_in_the_last_step_are_noticed(
    base: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = torch.optim.AdamW.step

    def poisoned(self: Any, *arguments: Any, **options: Any) -> Any:
        result = step(self, *arguments, **options)
        with torch.no_grad():
            self.param_groups[0]["params"][0].fill_(float("nan"))
        return result

    monkeypatch.setattr(torch.optim.AdamW, "step", poisoned)
    with pytest.raises(AdapterError, match="after step 1"):
        LoRA.train(base, PAIRS, {**QUICK, "max_steps": 1})


def test_progress_is_shown_when_asked_and_only_then(
    base: LanguageModel, capfd: pytest.CaptureFixture[str]
) -> None:
    LoRA.train(base, PAIRS, QUICK, progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "2/2" in err
    assert "loss" in err
    for quiet in (None, False):  # under pytest stderr is no terminal
        LoRA.train(base, PAIRS, QUICK, progress=quiet)
        assert capfd.readouterr() == ("", "")


def test_training_on_trained_data_types_of_half_precision_gives_float32() -> None:
    base = tiny_language_model()
    base.module.to(torch.bfloat16)
    adapter = LoRA.train(base, PAIRS, QUICK)
    assert {tensor.dtype for tensor in adapter.tensors.values()} == {torch.float32}
    assert {p.dtype for p in base.module.parameters()} == {torch.bfloat16}
