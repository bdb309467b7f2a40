"""Peers run step by step give what they give when run whole, and a peer process can fail in every way."""

import sys
import warnings
from pathlib import Path

import pytest
import torch

from benchmarks.contenders import NO_ADAPTER, Base, Peft
from benchmarks.harness import BenchmarkError
from benchmarks.peers import vllm_rows
from benchmarks.peers.continuous import ContinuousBatching, turn_of
from benchmarks.peers.eager import Eager, Switching
from benchmarks.peers.rows import agreement, reply
from benchmarks.peers.worker import IdleWorker
from benchmarks.serve_scene import SOFT, Scene

ECHO = """
import json, sys, time
for line in sys.stdin:
    command = json.loads(line)
    if command["op"] == "die":
        print("last words", file=sys.stderr); sys.exit(3)
    if command["op"] == "sleep":
        time.sleep(command["seconds"])
    answer = {"error": "no"} if command["op"] == "refuse" else {"heard": command, "long": "x" * 100_000}
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="module")
def scene(tiny) -> Scene:
    return Scene.draw(tiny, rows=6, personas=3, width=5)


@pytest.fixture(scope="module")
def peft(tiny, scene) -> Peft:
    return Peft(tiny, scene.concatenated())


@pytest.fixture
def worker(tmp_path):
    with IdleWorker(
        [sys.executable, "-c", ECHO], environment={}, log=tmp_path / "log", timeout=20.0
    ) as started:
        yield started


def greedy(module, tokens: int, **inputs) -> list[tuple[int, ...]]:
    """By transformers' own generate."""
    out = module.generate(
        **inputs, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return [tuple(row[-tokens:]) for row in out.tolist()]


def test_eager_steps_are_a_greedy_generation(tiny, scene):
    mine = reply(Eager(Base(tiny), [NO_ADAPTER] * 6, scene.tokens), 4)
    whole = greedy(tiny.module, 4, input_ids=scene.tokens, attention_mask=torch.ones_like(scene.tokens))
    assert mine == whole


def test_switching_gives_what_the_mixed_batch_gives(tiny, scene, peft):
    prompts = (scene.after_prefix, scene.vectors, tiny.module.get_input_embeddings())
    with torch.inference_mode():
        mixed = reply(Eager(peft, scene.personas, *prompts), 4)
        switched = reply(Switching(peft, scene.personas, *prompts), 4)
    assert switched == mixed
    assert mixed != reply(Eager(Base(tiny), [NO_ADAPTER] * 6, scene.tokens), 4)


def test_a_batch_starts_afresh_after_it_was_stopped(scene, peft):
    rows = Eager(peft, scene.personas, scene.tokens)
    assert reply(rows, 3) == reply(rows, 3)


def test_agreement_counts_whole_rows():
    assert agreement([(1, 2), (3, 4)], [(1, 2), (3, 5)]) == 0.5


def test_continuous_batching_gives_a_time_for_every_step(tiny):
    turn = ContinuousBatching(Base(tiny)._module, [[5, 6, 7 + row] for row in range(3)], 5).turn()
    assert turn.prefill > 0
    assert len(turn.steps) == 4
    assert all(step > 0 for step in turn.steps)


def test_a_turn_counts_from_the_last_rows_first_token():
    turn = turn_of([10.0, 10.5], [[11.0, 13.0, 14.0], [12.0, 13.0, 14.5]], 3)
    assert turn.prefill == 2.0
    assert turn.steps == [1.0, 1.5]
    with pytest.raises(BenchmarkError, match=r"\[2, 3\] of 3"):
        turn_of([0.0, 0.0], [[1.0, 2.0, 3.0], [1.0, 2.0]], 3)


def test_a_worker_answers_line_by_line(worker):
    for number in range(3):
        assert worker.ask("hear", number=number)["heard"] == {"op": "hear", "number": number}


def test_a_worker_that_refuses_lives_on(worker):
    with pytest.raises(BenchmarkError, match="answered no at 'refuse'"):
        worker.ask("refuse")
    assert worker.ask("hear")["heard"]["op"] == "hear"


def test_a_dead_worker_is_named_with_its_last_words(worker):
    with pytest.raises(BenchmarkError, match=r"has ended at 'die'.*last words"):
        worker.ask("die")
    with pytest.raises(BenchmarkError, match="has ended"):
        worker.ask("hear")


def test_a_worker_that_does_not_answer_is_ended(tmp_path):
    slow = IdleWorker([sys.executable, "-c", ECHO], environment={}, log=tmp_path / "log", timeout=0.3)
    with pytest.raises(BenchmarkError, match="no answer"):
        slow.ask("sleep", seconds=1)


def test_vllm_is_left_out_unless_an_interpreter_is_named(monkeypatch, tmp_path):
    monkeypatch.delenv(vllm_rows.VARIABLE, raising=False)
    assert vllm_rows.interpreter(None) is None
    assert vllm_rows.interpreter(sys.executable) == sys.executable
    monkeypatch.setenv(vllm_rows.VARIABLE, sys.executable)
    assert vllm_rows.interpreter(None) == sys.executable
    with pytest.raises(BenchmarkError, match="cannot be started"):
        vllm_rows.interpreter(str(tmp_path / "none"))


def test_exported_adapters_are_what_peft_loads(tiny, scene, tmp_path):
    from peft import PeftModel

    from benchmarks.contenders import shared_copy

    base = vllm_rows.export_base(tiny, tmp_path / "base")
    assert (base / "config.json").is_file()
    folders = vllm_rows.export(tiny, base, scene.concatenated()[:1], tmp_path / "adapters")
    with warnings.catch_warnings():  # peft asks transformers a question that is being renamed
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        loaded = PeftModel.from_pretrained(shared_copy(tiny.module), str(folders[0])).eval()
    with torch.inference_mode():
        assert torch.isfinite(loaded(scene.tokens[:1]).logits).all()
        ours = Peft(tiny, scene.concatenated()[:1])
        with ours.assigned([0]) as forward:
            expected = forward(scene.tokens[:1]).logits
        torch.testing.assert_close(loaded(scene.tokens[:1]).logits, expected)


def test_concatenation_equals_the_sum_of_the_gated_branches(scene):
    user, group, gate = scene.users[1], scene.groups[1], scene.gates[1]
    merged = scene.concatenated()[1]
    for name in (key[:-2] for key in user if key.endswith(".A")):
        dense = user[f"{name}.B"] @ user[f"{name}.A"]
        dense = dense + group[f"{name}.B"] @ torch.diag(gate) @ group[f"{name}.A"]
        torch.testing.assert_close(merged[f"{name}.B"] @ merged[f"{name}.A"], dense)


def test_requests_carry_what_their_plans_name(scene):
    requests = scene.requests()
    assert [len(request.prompt) for request in requests] == [5] * 6
    for request in requests:
        named = [patch.factors for patch in request.plan.low_rank]
        assert len(named) == 2
        assert all(mark in request.tensors for mark in named)
    assert requests[0].plan == requests[3].plan
    assert len({request.plan.plan_id for request in requests}) == 3
    assert all(len(request.prompt) == 5 + SOFT for request in scene.base_requests())


def test_fewer_personas_are_the_first_ones(scene):
    fewer = scene.with_personas(2)
    assert fewer.personas == [0, 1] * 3
    assert fewer.requests()[1].plan == scene.requests()[1].plan
    assert len(scene.with_rows(4).requests()) == 4


def test_the_worker_program_imports_nothing_of_ours():
    text = (Path(vllm_rows.__file__).with_name("vllm_worker.py")).read_text()
    assert "persona_sdk" not in text
    assert "benchmarks." not in text.partition('"""\n\n')[2]
