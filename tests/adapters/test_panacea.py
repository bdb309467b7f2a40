"""The Panacea family: its configuration, its state, its plan part, its folder and its exports."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk import registry
from persona_sdk.adapters import AdapterRequest, ExportsPeft, Panacea, PanaceaConfig, Steerable
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import digest, size_bytes
from persona_sdk.testing import tiny_language_model

from .support import PEFT_WARNINGS, adapted_logits, logits, peft_logits

NAMES = ("concise", "warm", "formal")
OPTIONS = {"dimensions": NAMES, "rank": 2, "alpha": 4.0}
REQUEST = AdapterRequest(origin="nurses/tone")


@pytest.fixture
def adapter(tiny: LanguageModel) -> Panacea:
    return Panacea.random(tiny, OPTIONS, std=0.3)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({}, "dimensions"),
        ({"dimensions": ("one",)}, "dimensions"),
        ({"dimensions": ("a", "a")}, "different names"),
        ({"dimensions": ("a b", "c")}, "different names"),
        ({**OPTIONS, "rank": 0}, "rank"),
        ({**OPTIONS, "objective": "reward", "aggregation": "tchebycheff"}, "ideal point"),
        ({**OPTIONS, "sampled_objective": True, "aggregation": "tchebycheff"}, "sampled_objective"),
        ({**OPTIONS, "ideal": (0.0,), "aggregation": "tchebycheff"}, "ideal has 1"),
        ({**OPTIONS, "ideal": (0.0, 0.0, 0.0)}, "no effect"),
        ({**OPTIONS, "aggregation": "tchebycheff", "preference_sampling": "example"}, "mean of minima"),
        ({"dimensions": ("a", "weights")}, "none of them self or weights"),
        ({**OPTIONS, "fixed_preference": (0.5, 0.4, 0.2)}, "fixed_preference"),
        ({**OPTIONS, "vertex_probability": 1.5}, "vertex_probability"),
        ({**OPTIONS, "temperature": 1}, "temperature"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidInputError, match=said):
        Panacea.configure(options)


def test_the_multiplier_divides_by_the_shared_rank_alone() -> None:
    assert PanaceaConfig(dimensions=NAMES, init="normal").multiplier == 64.0
    assert PanaceaConfig(dimensions=NAMES, rank=4, alpha=8.0, preference_rank=3).multiplier == 2.0
    assert PanaceaConfig.parse(json.loads(PanaceaConfig(**OPTIONS).model_dump_json())) == PanaceaConfig(
        **OPTIONS
    )


def test_it_is_a_steerable_family_that_exports(adapter: Panacea) -> None:
    assert registry.family("panacea") is Panacea
    assert isinstance(adapter, Steerable)
    assert isinstance(adapter, ExportsPeft)


def test_the_preference_is_the_gate_and_nothing_else_changes(adapter: Panacea) -> None:
    (part,) = adapter.contribute({"preference": {"concise": 0.7, "formal": 0.3}}, REQUEST).parts
    assert part.gate == (1.0, 1.0, 0.7, 0.0, 0.3)
    (other,) = adapter.contribute({"preference": {"warm": 1.0}}, REQUEST).parts
    assert other.gate == (1.0, 1.0, 0.0, 1.0, 0.0)
    assert (part.factors, part.rank) == (other.factors, other.rank) == (adapter.factors_digest, 5)
    (half,) = adapter.contribute({}, AdapterRequest(origin="x/y", weight=0.5)).parts
    assert half.gate == pytest.approx((0.5, 0.5, 1 / 6, 1 / 6, 1 / 6))


@pytest.mark.parametrize(
    "state",
    [
        {"preference": {"funny": 1.0}},
        {"preference": {"warm": -1.0}},
        {"preference": {"warm": math.nan}},
        {"preference": dict.fromkeys(NAMES, 0)},
        {"preference": [0.5, 0.5, 0.0]},
        {"gate": [1.0]},
    ],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any], adapter: Panacea) -> None:
    with pytest.raises(InvalidInputError):
        adapter.contribute(state, REQUEST)


def test_steering_names_some_weights_and_keeps_the_ratio_of_the_others(adapter: Panacea) -> None:
    state = {"preference": {"concise": 0.2, "warm": 0.6, "formal": 0.2}}
    steered = adapter.steered(state, {"concise": 0.6})
    assert adapter.controls(steered) == pytest.approx({"concise": 0.6, "warm": 0.3, "formal": 0.1})
    assert state == {"preference": {"concise": 0.2, "warm": 0.6, "formal": 0.2}}


@pytest.mark.parametrize("m", [2, 3, 5, 10])
def test_any_number_of_dimensions_is_served_as_trained(m: int, tiny: LanguageModel, tmp_path: Path) -> None:
    names = tuple(f"d{i}" for i in range(m))
    options = {
        "dimensions": names,
        "rank": 2,
        "alpha": 2.0,
        "preference_rank": 2,
        "scale_per_dimension": True,
    }
    adapter = Panacea.random(tiny, options, std=0.3)
    preference = dict(
        zip(names, torch.rand(m, generator=torch.Generator().manual_seed(m)).tolist(), strict=True)
    )
    (part,) = adapter.contribute({"preference": preference}, REQUEST).parts
    assert len(part.gate) == 2 + 2 * m
    live = adapted_logits(tiny, adapter.factors, part.gate)
    vertex = adapter.contribute({"preference": {names[0]: 1.0}}, REQUEST).parts[0]
    assert (live - adapted_logits(tiny, adapter.factors, vertex.gate)).abs().max() > 1e-3
    adapter.save_pretrained(tmp_path / "a")
    again = Panacea.from_pretrained(tmp_path / "a", base=tiny)
    torch.testing.assert_close(adapted_logits(tiny, again.factors, part.gate), live, atol=0, rtol=0)


@pytest.mark.filterwarnings(PEFT_WARNINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_every_preference_leaves_as_a_peft_folder_with_the_same_logits(architecture, tmp_path: Path) -> None:
    base = tiny_language_model(architecture=architecture)
    adapter = Panacea.random(base, OPTIONS, std=0.3)
    for preference in ({"concise": 1.0}, {"concise": 0.2, "warm": 0.5, "formal": 0.3}, None):
        state = {} if preference is None else {"preference": preference}
        (part,) = adapter.contribute(state, REQUEST).parts
        live = adapted_logits(base, adapter.factors, part.gate)
        adapter.export_peft(tmp_path / "a", preference=preference)  # into the same folder: the old λ is gone
        assert (peft_logits(base, tmp_path / "a") - live).abs().max() <= 1e-4
    with pytest.raises(InvalidInputError, match="funny"):
        adapter.export_peft(tmp_path / "a", preference={"funny": 1.0})
    assert (peft_logits(base, tmp_path / "a") - live).abs().max() <= 1e-4  # untouched


def test_merged_is_live_and_unmerging_gives_the_base_back(adapter: Panacea, tiny: LanguageModel) -> None:
    from persona_sdk.adapters import lowrank, svd_lora
    from persona_sdk.tensors import low_rank_pairs

    linears, shape = tiny.linears(), adapter.config.shape
    before = {path: linears[path].weight.detach().clone() for path, _, _ in low_rank_pairs(adapter.factors)}
    try:
        for preference in ((1.0, 0.0, 0.0), (0.2, 0.5, 0.3)):
            gate = svd_lora.gate(preference, shape)
            expected = adapted_logits(tiny, adapter.factors, gate)
            updates = {path: lowrank.delta(A, B, gate) for path, A, B in low_rank_pairs(adapter.factors)}
            with torch.no_grad():
                for path, update in updates.items():
                    linears[path].weight += update
                torch.testing.assert_close(logits(tiny.module), expected, atol=1e-4, rtol=1e-4)
                for path, update in updates.items():
                    linears[path].weight -= update
            for path, weight in before.items():
                torch.testing.assert_close(linears[path].weight.detach(), weight, atol=1e-6, rtol=0)
    finally:
        with torch.no_grad():
            for path, weight in before.items():
                linears[path].weight.copy_(weight)


def test_no_preference_is_in_the_folder(adapter: Panacea, tmp_path: Path) -> None:
    adapter.contribute({"preference": {"warm": 1.0}}, REQUEST)
    adapter.save_pretrained(tmp_path / "a")
    again = Panacea.from_pretrained(tmp_path / "a")
    assert {name.rpartition(".")[2] for name in again.tensors} == {"U", "V", "sigma", "s"}
    assert again.preference({}) == pytest.approx((1 / 3,) * 3)
    card = (tmp_path / "a" / "README.md").read_text()
    assert "concise, warm, formal" in card
    assert adapter.digest in card


def test_a_folder_of_another_family_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    from persona_sdk import LoRA

    LoRA.random(tiny, {"rank": 2}).save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleAdapterError, match="'lora', not 'panacea'"):
        Panacea.from_pretrained(tmp_path / "a")


def test_what_is_served_is_made_when_it_is_taken_and_not_kept(adapter: Panacea) -> None:
    contribution = adapter.contribute({}, REQUEST)
    ((key, bundle),) = contribution.tensors.items()
    assert digest(bundle) == key
    kept = [value for name, value in vars(adapter).items() if name not in ("tensors", "config")]
    assert not any(hasattr(value, "values") for value in kept)
    assert size_bytes(adapter.tensors) > 0
