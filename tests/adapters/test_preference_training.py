"""Training under preferences: it follows λ, leaves the base alone, resumes, and stops early."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from persona_sdk.adapters import Panacea, pareto
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preference_data import encode_examples, items
from persona_sdk.adapters.preference_likelihood import choose, mean_length
from persona_sdk.adapters.preference_student import Student
from persona_sdk.adapters.preferences import grid
from persona_sdk.adapters.svd_layers import Layers, Preference
from persona_sdk.errors import AdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import digest
from persona_sdk.testing import tiny_language_model

from .support import logits

TWO = ("concise", "detailed")
DATA = {
    "concise": [("Is it warm?", "Yes."), ("Is it far?", "No.")],
    "detailed": [("Is it warm?", "Yes, the sun is out."), ("Is it far?", "No, you walk there.")],
}
PAIRS = [
    {
        "prompt": prompt,
        "response_0": "Yes.",
        "response_1": "Yes, the sun is out.",
        "better": {"concise": 0, "detailed": 1, "ignored": 0},
    }
    for prompt in ("Is it warm?", "Is it far?")
]
OPTIONS: dict[str, Any] = {"dimensions": TWO, "rank": 4, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    return tiny_language_model(hidden=64)


def len_of(prompt: str, reply: str) -> float:
    return len(reply) / 10


def values(base: LanguageModel, adapter: Panacea, data: Any = DATA, **more: Any) -> torch.Tensor:
    return pareto.evaluate(base, adapter, data, **more).values


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preference_sampling": "example"},
        {"sampled_objective": True, "max_steps": 200},
        {"aggregation": "tchebycheff", "max_steps": 200},
        {"aggregation": "smooth_tchebycheff", "ideal": (5.0, 5.0)},
        {"init": "normal", "alpha": 512.0, "learning_rate": 5e-3},
        {"orthogonality_weight": 0.1},
        {"preference_rank": 2, "scale_per_dimension": True},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "max_steps": 60},
    ],
    ids=str,
)
def test_every_way_of_training_makes_each_style_likelier_where_it_is_preferred(
    options: dict[str, Any], base: LanguageModel
) -> None:
    adapter = Panacea.train(base, DATA, {**OPTIONS, "max_steps": 120, **options})
    found, measured = values(base, adapter), pareto.evaluate(base, adapter, DATA)
    assert (found.amax(0) - measured.base).min() > 5  # nats: far better than the base
    for i in range(2):
        order = found[:, i].argsort()
        weights = measured.preferences[order, i]
        assert np.corrcoef(weights, np.arange(11))[0, 1] > 0.9
        assert float(found[weights.argmax(), i]) <= float(found[:, i].max())
    assert adapter.report is not None
    assert adapter.report.tokens > 0


def test_the_front_of_sft_is_that_of_the_mixture() -> None:
    """Replies learned by heart are certain at their vertex, and log λ_i nats below that elsewhere.

    The base is wide: logits of the tiny one are too small to be sure of two tokens at once.
    """
    wide = tiny_language_model(hidden=256, layers=1)
    options = {**OPTIONS, "max_steps": 240, "preference_sampling": "example"}
    measured = pareto.evaluate(wide, Panacea.train(wide, DATA, options), DATA)
    for weights, found in zip(measured.preferences.T, measured.values.T, strict=True):
        inner = (weights > 0.25) & (weights < 0.75)
        assert found[inner].tolist() == pytest.approx(weights[inner].log().tolist(), abs=0.2)
        assert float(found[weights == 1]) > -0.2
        assert float(found[weights == 0]) < -2.5


def test_dpo_learns_the_margin_that_the_preference_asks_for(base: LanguageModel) -> None:
    law = {"preference_sampling": "example", "concentration": 2.0, "vertex_probability": 0.0}
    options = {**OPTIONS, "objective": "dpo", "beta": 1.0, "max_steps": 400, "learning_rate": 5e-3}
    adapter = Panacea.train(base, PAIRS, {**options, **law})
    points = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.5, 0.5], [0.2, 0.8]])
    found = pareto.evaluate(base, adapter, PAIRS, points)
    assert found.base.tolist() == pytest.approx([-0.6931, -0.6931], abs=1e-4)
    # J_1 = log sigmoid(margin) and J_2 = log sigmoid(-margin): their difference is the margin itself.
    margins = found.values[:, 0] - found.values[:, 1]
    assert margins.tolist() == pytest.approx(torch.logit(points[:, 0]).tolist(), abs=0.35)


def test_rewards_raise_what_is_preferred(base: LanguageModel) -> None:
    def early(prompt: str, reply: str) -> float:
        letters = [letter for letter in reply.lower() if letter.isalpha()]
        return sum(letter < "n" for letter in letters) / max(len(letters), 1)

    rewards = {"early": early, "late": lambda prompt, reply: 1 - early(prompt, reply)}
    options = {"dimensions": ("early", "late"), "rank": 4, "objective": "reward", "max_new_tokens": 6}
    more = {"learning_rate": 2e-2, "kl": 0.01, "max_steps": 100, "samples_per_prompt": 16}
    law = {"preference_sampling": "example", "vertex_probability": 0.8}
    prompts = ["Is it warm?", "Is it far?"]
    adapter = Panacea.train(base, prompts, {**options, **more, **law}, rewards=rewards)
    found = pareto.evaluate(base, adapter, prompts * 30, torch.eye(2), rewards=rewards)
    assert (found.values.diagonal() - found.base).min() > 0.15
    again = pareto.evaluate(base, adapter, prompts * 30, torch.eye(2), rewards=rewards)
    assert torch.equal(again.values, found.values)


def test_a_frozen_scale_flattens_the_front(base: LanguageModel) -> None:
    adapter = Panacea.train(base, DATA, {**OPTIONS, "max_steps": 60, "train_scale": False})
    assert all(not tensor.any() for name, tensor in adapter.tensors.items() if name.endswith(".s"))
    found = values(base, adapter)
    assert float((found - found[0]).abs().max()) < 1e-4


@pytest.mark.parametrize("m", [3, 5, 10])
def test_many_dimensions_are_told_apart(m: int, base: LanguageModel) -> None:
    names = tuple(f"style{i}" for i in range(m))
    data = {name: [("Is it warm?", f"{chr(97 + i) * 2}{chr(110 + i) * 2}")] for i, name in enumerate(names)}
    options = {**OPTIONS, "dimensions": names, "max_steps": 40 * m, "vertex_probability": 0.5}
    adapter = Panacea.train(base, data, {**options, "scale_per_dimension": True})
    found = values(base, adapter, data, preferences=torch.eye(m))
    assert found.argmax(0).tolist() == list(range(m))  # each style is likeliest at its own vertex


def test_the_base_is_left_as_it_was_also_by_an_error(base: LanguageModel) -> None:
    before, random_state = logits(base.module), torch.get_rng_state()
    flags = [parameter.requires_grad for parameter in base.module.parameters()]
    attention = base.module.config._attn_implementation
    Panacea.train(base, DATA, {**OPTIONS, "max_steps": 2})
    with pytest.raises(AdapterError, match="above its ideal"):
        Panacea.train(base, DATA, {**OPTIONS, "aggregation": "tchebycheff", "ideal": (-90.0, -90.0)})
    assert torch.equal(logits(base.module), before)
    assert [parameter.requires_grad for parameter in base.module.parameters()] == flags
    assert base.module.config._attn_implementation == attention
    assert torch.equal(torch.get_rng_state(), random_state)


def test_the_same_seed_gives_the_same_weights_and_another_one_others(base: LanguageModel) -> None:
    one, two, other = (
        Panacea.train(base, DATA, {**OPTIONS, "max_steps": 5, "seed": seed}) for seed in (3, 3, 4)
    )
    assert one.digest == two.digest != other.digest


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preference_sampling": "example", "sampled_objective": True},
        {"objective": "dpo"},
        {"objective": "reward", "max_new_tokens": 4},
    ],
    ids=str,
)
def test_a_resumed_run_goes_on_with_the_preference_that_was_due(
    options: dict[str, Any], base: LanguageModel, tmp_path: Path
) -> None:
    objective = options.get("objective", "sft")
    data = {"sft": DATA, "dpo": PAIRS, "reward": ["Is it warm?", "Is it far?"]}[objective]
    rewards = dict.fromkeys(TWO, len_of) if objective == "reward" else None
    whole = Panacea.train(base, data, {**OPTIONS, "max_steps": 12, **options}, rewards=rewards)
    code = f"""
import os
import torch
torch.set_num_threads(1)  # as here: the number of threads decides the last bits
from pathlib import Path
from persona_sdk.adapters import Panacea
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.preference_student import Student
from persona_sdk.testing import tiny_language_model
begin = Student.begin
def dying(self, step):
    if step == 8:
        os._exit(9)
    begin(self, step)
Student.begin = dying
def len_of(prompt, reply):
    return len(reply) / 10
options = {{**{OPTIONS!r}, "max_steps": 12, **{options!r}}}
rewards = {{name: len_of for name in {TWO!r}}} if {objective!r} == "reward" else None
checkpoints = Checkpoints(folder=Path({str(tmp_path / "run")!r}), every=5)
Panacea.train(tiny_language_model(hidden=64), {data!r}, options, rewards=rewards, checkpoints=checkpoints)
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode == 9
    checkpoints = Checkpoints(folder=tmp_path / "run", every=5)
    options = {**OPTIONS, "max_steps": 12, **options}
    resumed = Panacea.train(base, data, options, rewards=rewards, checkpoints=checkpoints)
    assert resumed.digest == whole.digest
    written = {path.suffix for path in (tmp_path / "run").rglob("*") if path.is_file()}
    assert written <= {".safetensors", ".json"}


def test_held_out_hypervolume_keeps_the_best_weights_and_ends_the_training(base: LanguageModel) -> None:
    options = {**OPTIONS, "max_steps": 400, "eval_steps": 10, "early_stopping_patience": 2}
    held_out = {"concise": [("Is it late?", "Yes.")], "detailed": [("Is it late?", "Yes, go to bed.")]}
    adapter = Panacea.train(base, DATA, options, held_out=held_out)
    report = adapter.report
    assert report is not None
    assert report.stopped_early
    assert report.steps < 400
    best = max(report.evaluations, key=lambda pair: pair[1])
    assert best[0] == report.best_step
    found = pareto.evaluate(base, adapter, held_out, grid(2, 4))
    from persona_sdk.adapters.dominance import hypervolume

    assert hypervolume(found.values, pareto.reference_point(found.base, "sft")) == pytest.approx(
        best[1], rel=1e-3
    )


def test_calibrated_margins_are_worth_more_than_the_base_they_started_from() -> None:
    """Opposed labels: the optimum, (log λ, log(1 - λ)), is below the base in one dimension nearly always."""
    from persona_sdk.adapters.dominance import hypervolume

    base = torch.full((2,), -math.log(2))
    optimum = grid(2, 4).clamp(1e-3, 1).log()
    z = pareto.reference_point(base, "dpo")
    assert hypervolume(optimum, z) > 1.1 * hypervolume(base[None], z) > 0


@pytest.mark.filterwarnings("ignore:.*generation flags are not valid.*")
def test_replies_are_sampled_from_the_policy_whatever_the_model_is_shipped_with() -> None:
    from persona_sdk.adapters.preference_rewards import encode_prompts, sample_replies

    base = tiny_language_model()
    base.module.generation_config.update(temperature=0.01, min_p=0.9, repetition_penalty=5.0)
    before = base.module.generation_config
    prompts = encode_prompts(base, ["Is it warm?"] * 16, 100)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        rows = sample_replies(base, prompts, 8)
    assert len({tuple(row["input_ids"]) for row in rows}) == 16
    assert base.module.generation_config is before


def test_dropout_of_the_base_stays_off_while_its_layers_learn() -> None:
    base = tiny_language_model(architecture="gpt2")
    dropouts = [part for part in base.module.modules() if isinstance(part, torch.nn.Dropout) and part.p]
    assert dropouts
    student = Student(base.module, Layers(Preference(), {}), PanaceaConfig(**OPTIONS)).train()
    assert student.training
    assert not any(part.training for part in dropouts)


class TestDraws:
    """Which λ is due."""

    def student(self, **options: Any) -> Student:
        config = PanaceaConfig(**{**OPTIONS, **options})
        return Student(torch.nn.Identity(), Layers(Preference(), {}), config)

    def test_one_for_a_step_whatever_its_parts_and_another_for_the_next(self) -> None:
        student = self.student()
        student.begin(7)
        first, second = student.draw(3)[0], student.draw(5)[0]
        assert torch.equal(first, second[:3])
        assert torch.equal(first[0], first[2])
        student.begin(8)
        assert not torch.equal(student.draw(3)[0], first)
        student.begin(7)
        assert torch.equal(student.draw(3)[0], first)

    def test_one_for_every_example_differs_by_part_and_process(self, monkeypatch) -> None:
        student = self.student(preference_sampling="example", vertex_probability=0.0)
        student.begin(7)
        first, second = student.draw(3)[0], student.draw(3)[0]
        assert len({tuple(row) for row in torch.cat([first, second]).tolist()}) == 6
        monkeypatch.setenv("RANK", "1")
        student.begin(7)
        assert not torch.equal(student.draw(3)[0], first)

    def test_all_processes_draw_the_same_for_a_step(self, monkeypatch) -> None:
        student = self.student()
        student.begin(7)
        first = student.draw(3)[0]
        monkeypatch.setenv("RANK", "1")
        student.begin(7)
        assert torch.equal(student.draw(3)[0], first)

    def test_a_fixed_preference_is_always_due(self) -> None:
        student = self.student(fixed_preference=(0.25, 0.75))
        assert student.draw(2)[0].tolist() == [[0.25, 0.75]] * 2

    def test_one_dimension_is_chosen_as_often_as_its_weight(self) -> None:
        preference = torch.tensor([[0.2, 0.0, 0.8]]).expand(20_000, 3)
        chosen = choose(preference, np.random.default_rng(0)).float()
        assert torch.equal(chosen.sum(1), torch.ones(20_000))
        assert chosen.mean(0).tolist() == pytest.approx([0.2, 0.0, 0.8], abs=0.01)

    @pytest.mark.parametrize("how", ["batch", "example"])
    def test_the_dimension_is_drawn_independently_of_how_its_weight_came_about(self, how: str) -> None:
        """For every item of a batch, also the first: λ and the choice must not share random numbers."""
        student = self.student(preference_sampling=how, vertex_probability=0.0)
        weights, chosen = [], []
        for step in range(4000):
            student.begin(step)
            preference, draw = student.draw(3)
            weights.append(preference[:, 0])
            chosen.append(choose(preference, draw)[:, 0])
        weight, taken = torch.stack(weights), torch.stack(chosen).float()
        for item in range(3):
            for low in (0.0, 0.25, 0.5, 0.75):
                inside = (weight[:, item] >= low) & (weight[:, item] < low + 0.25)
                expected = float(weight[inside, item].mean())
                assert float(taken[inside, item].mean()) == pytest.approx(expected, abs=0.05)


class TestData:
    def encoded(self, base: LanguageModel, data: Any, objective: Any = "sft") -> Any:
        return encode_examples(base.tokenizer, data, TWO, objective, 512)

    def test_items_are_balanced_and_go_through_everything(self, base: LanguageModel) -> None:
        data = {"concise": [(f"Question {i}?", "Yes.") for i in range(7)], "detailed": DATA["detailed"]}
        made = items(self.encoded(base, data), seed=0)
        assert len(made) == 7
        for i, count in ((0, 7), (1, 2)):
            seen = [tuple(item[i].rows[0]["input_ids"]) for item in made]
            assert len(set(seen)) == count
            assert max(map(seen.count, seen)) <= -(-7 // count)

    def test_labels_send_a_pair_to_every_dimension_that_has_one(self, base: LanguageModel) -> None:
        found = self.encoded(base, PAIRS, "dpo")
        for concise, detailed in zip(found["concise"], found["detailed"], strict=True):
            assert concise.rows == detailed.rows[::-1]

    def test_the_mean_length_is_that_of_replies(self, base: LanguageModel) -> None:
        found = self.encoded(
            base, {"concise": [("A long question?", "Yes.")], "detailed": [("Why?", "Yes.")]}
        )
        reply = base.tokenizer("Yes.", add_special_tokens=False)["input_ids"]
        assert mean_length(found) == len(reply) + 1  # and the end token

    @pytest.mark.parametrize(
        ("data", "objective", "said"),
        [
            ([("a", "b")], "sft", "is a list"),
            ({"concise": DATA["concise"]}, "sft", "lacks 'detailed'"),
            ({**DATA, "funny": DATA["concise"]}, "sft", "'funny', which is no dimension"),
            ({**DATA, "concise": [("a", 3)]}, "sft", "Dimension 'concise': Training row 0"),
            ({**DATA, "concise": []}, "sft", "lacks 'concise'"),
            ([{"prompt": "a"}], "dpo", "Pair 0"),
            ([{**PAIRS[0], "better": {"concise": 2}}], "dpo", "concise=2"),
            ([{**PAIRS[0], "better": {"concise": 1.0}}], "dpo", "concise=1.0"),
            (dict.fromkeys(TWO, 3), "dpo", "its data is a int"),
            ([{**PAIRS[0], "better": {"concise": 0}}], "dpo", "lacks 'detailed'"),
            ({name: [{"prompt": "a", "chosen": "b"}] for name in TWO}, "dpo", "pair 0"),
            ({name: [{"prompt": "a", "chosen": "b", "rejected": " "}] for name in TWO}, "dpo", "blank"),
        ],
    )
    def test_data_that_cannot_be_used_is_named(self, data, objective, said, base: LanguageModel) -> None:
        with pytest.raises(InvalidInputError, match=said):
            self.encoded(base, data, objective)

    @pytest.mark.parametrize(
        ("prompts", "rewards", "said"),
        [
            (["Hi?"], None, "rewards for none"),
            (["Hi?"], {"concise": len}, "rewards for concise"),
            ([], dict.fromkeys(TWO, len), "no prompt"),
            ("Hi?", dict.fromkeys(TWO, len), "is a str"),
            ([""], dict.fromkeys(TWO, len), "Prompt 0"),
            (["long " * 500], dict.fromkeys(TWO, len), "leave room"),
        ],
    )
    def test_prompts_and_rewards_that_cannot_be_used_are_named(
        self, prompts, rewards, said, base: LanguageModel
    ) -> None:
        with pytest.raises(InvalidInputError, match=said):
            Panacea.train(base, prompts, {**OPTIONS, "objective": "reward"}, rewards=rewards)

    def test_rewards_without_their_objective_are_refused(self, base: LanguageModel) -> None:
        with pytest.raises(InvalidInputError, match="objective is 'sft'"):
            Panacea.train(base, DATA, OPTIONS, rewards=dict.fromkeys(TWO, len_of))

    def test_labels_of_no_dimension_are_counted_in_the_log(self, base: LanguageModel, caplog) -> None:
        self.encoded(base, PAIRS, "dpo")
        assert "'ignored': 2" in caplog.text

    def test_a_reward_that_is_no_number_ends_the_training(self, base: LanguageModel) -> None:
        rewards = {"concise": lambda prompt, reply: 1.0, "detailed": lambda prompt, reply: float("nan")}
        options = {**OPTIONS, "objective": "reward", "max_steps": 1, "max_new_tokens": 4}
        with pytest.raises(InvalidInputError, match="'detailed'"):
            Panacea.train(base, ["Hi?"], options, rewards=rewards)
        assert json.dumps(logits(base.module).tolist())


def test_an_adapter_of_another_base_is_not_evaluated(base: LanguageModel, tiny: LanguageModel) -> None:
    adapter = Panacea.random(tiny, OPTIONS)
    assert digest(adapter.tensors) == adapter.digest
    with pytest.raises(AdapterError, match="made for base model"):
        pareto.evaluate(base, adapter, DATA)
