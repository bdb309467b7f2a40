"""The LoRA family: its equation, its configuration, its folder and its plan parts."""

from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk.adapters import AdapterRequest, ExportsPeft, LoRA, LoRAConfig, lowrank
from persona_sdk.adapters.base import language_model
from persona_sdk.adapters.lora import select_modules
from persona_sdk.errors import (
    CompositionError,
    IncompatibleAdapterError,
    InvalidInputError,
    UnsupportedAdapterError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import low_rank_bundle, low_rank_pairs
from persona_sdk.testing import tiny_language_model

from .support import PEFT_WARNINGS, adapted_logits, edit_config, logits, peft_logits

PAIRS = [("How are you?", "Very well."), ("Name?", "Alice")]
REQUEST = AdapterRequest(origin="nurses/tone")


@pytest.mark.filterwarnings(PEFT_WARNINGS)
@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_a_trained_adapter_does_in_peft_what_its_equation_says(
    architecture: Any, alpha: float | None, tmp_path: Path
) -> None:
    base = tiny_language_model(architecture=architecture)
    adapter = LoRA.train(base, PAIRS, LoRAConfig(rank=2, alpha=alpha, max_steps=4, learning_rate=2e-2))
    ours = adapted_logits(base, adapter.tensors)
    assert (ours - logits(base.module)).abs().max() > 1e-3
    adapter.export_peft(tmp_path / "a")
    assert (peft_logits(base, tmp_path / "a") - ours).abs().max() <= 1e-5


def test_the_loss_after_training_is_that_of_the_adapted_base(tiny: LanguageModel) -> None:
    """The scale is folded right: served by our algebra, the adapter has the loss training ended with."""
    from persona_sdk.adapters.training_data import collate, encode_rows

    adapter = LoRA.train(tiny, PAIRS, {"rank": 4, "max_steps": 30, "learning_rate": 1e-2, "alpha": 12})
    batch = collate(encode_rows(tiny.tokenizer, PAIRS, 512), 0)
    from .support import patched

    with patched(tiny, adapter.tensors), torch.no_grad():
        served = float(tiny.module(**batch).loss)
    assert adapter.report is not None
    assert served == pytest.approx(adapter.report.last_loss, rel=0.1)
    assert served < 0.5 * adapter.report.first_loss


@pytest.mark.parametrize(
    ("targets", "count"), [("all", 14), (("q_proj",), 2), (("self_attn.q_proj", "down_proj"), 4)]
)
def test_target_modules_are_all_or_ends_of_paths(targets: Any, count: int, tiny: LanguageModel) -> None:
    chosen = select_modules(tiny, targets)
    assert len(chosen) == count
    assert lowrank.modules_of(LoRA.random(tiny, {"target_modules": targets}).tensors) == tuple(sorted(chosen))


@pytest.mark.parametrize("targets", [("proj",), ("q_proj", "nothing"), (), ("lm_head",)])
def test_targets_that_select_nothing_are_refused(targets: tuple[str, ...], tiny: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="select nothing") as caught:
        LoRA.train(tiny, PAIRS, {"target_modules": targets})
    assert "q_proj" in caught.value.hint


@pytest.mark.parametrize(
    "options",
    [
        {"rank": 0},
        {"alpha": 0},
        {"alpha": float("inf")},
        {"dropout": 1.0},
        {"learning_rate": -1},
        {"max_steps": 0},
        {"num_train_epochs": 0},
        {"max_length": 1},
        {"lora_alpha": 3},
    ],
)
def test_bad_options_are_named(options: dict[str, Any], tiny: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(options))) as caught:
        LoRA.train(tiny, PAIRS, options)
    assert "rank" in caught.value.hint


def test_a_configuration_of_another_kind_and_a_base_that_is_none_are_refused(tiny: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="cannot use a int"):
        LoRA.configure(3)
    with pytest.raises(InvalidInputError, match="no base model"):
        LoRA.train("tiny", PAIRS)

    class Owner:
        base = tiny

    assert language_model(Owner()) is tiny


def test_configurations_survive_json() -> None:
    config = LoRAConfig(rank=3, target_modules=("q_proj",), seed=5)
    assert LoRAConfig.parse(config.model_dump(mode="json")) == config
    assert (config.scale, LoRAConfig(rank=4, alpha=2).scale) == (2.0, 0.5)


def test_weight_and_state_make_the_gate(tiny: LanguageModel) -> None:
    adapter = LoRA.random(tiny, {"rank": 3})
    (part,) = adapter.contribute({}, AdapterRequest(origin="x/y", weight=0.5)).parts
    assert (part.gate, part.rank, part.factors, part.origin) == ((0.5,) * 3, 3, adapter.digest, "x/y")
    (part,) = adapter.contribute({"gate": [1, 0, -2.0]}, AdapterRequest(origin="x/y", weight=2)).parts
    assert part.gate == (2.0, 0.0, -4.0)
    for nothing in (
        adapter.contribute({}, AdapterRequest(origin="x/y", weight=0.0)),
        adapter.contribute({"gate": [0, 0, 0]}, REQUEST),
    ):
        assert (nothing.parts, nothing.tensors) == ((), {})


@pytest.mark.parametrize(
    "state",
    [{"gate": [1.0]}, {"gate": []}, {"gate": "abc"}, {"gate": 1.0}, {"gate": [1, 2, True]}, {"gates": []}],
)
def test_a_state_that_does_not_fit_is_refused(state: dict[str, Any], tiny: LanguageModel) -> None:
    with pytest.raises(InvalidInputError, match="does not fit a LoRA of rank 3"):
        LoRA.random(tiny, {"rank": 3}).contribute(state, REQUEST)


def test_a_gate_that_is_not_finite_is_refused(tiny: LanguageModel) -> None:
    with pytest.raises(CompositionError, match="NaN or infinity"):
        LoRA.random(tiny, {"rank": 3}).contribute({"gate": [1, 2, float("nan")]}, REQUEST)


def test_rebuilding_checks_the_tensors(tiny: LanguageModel) -> None:
    adapter = LoRA.random(tiny, {"rank": 3})
    again = LoRA.from_tensors(adapter.base, adapter.tensors, adapter.config.model_dump(mode="json"))
    assert (again.digest, again.config) == (adapter.digest, adapter.config)
    assert LoRA.from_tensors(adapter.base, adapter.tensors).config.rank == 3
    with pytest.raises(IncompatibleAdapterError, match="rank 3 and the configuration says 8"):
        LoRA.from_tensors(adapter.base, adapter.tensors, {})
    nan = {name: tensor * float("nan") for name, tensor in adapter.tensors.items()}
    with pytest.raises(IncompatibleAdapterError, match="NaN"):
        LoRA.from_tensors(adapter.base, nan)
    with pytest.raises(IncompatibleAdapterError, match="no low-rank pair"):
        LoRA.from_tensors(adapter.base, {})


def test_merged_adapters_are_an_adapter(tiny: LanguageModel) -> None:
    one, two = LoRA.random(tiny, {"rank": 2, "seed": 1}), LoRA.random(tiny, {"rank": 3, "seed": 2})
    merged = LoRA.from_tensors(one.base, lowrank.concatenate([(one.tensors, None), (two.tensors, [0.5] * 3)]))
    assert merged.config.rank == 5
    for module, A, B in low_rank_pairs(merged.tensors):
        dense = one.tensors[f"{module}.B"] @ one.tensors[f"{module}.A"]
        dense = dense + 0.5 * two.tensors[f"{module}.B"] @ two.tensors[f"{module}.A"]
        torch.testing.assert_close(B @ A, dense)


def test_only_a_plain_export_exists(tiny: LanguageModel, tmp_path: Path) -> None:
    adapter = LoRA.random(tiny, {"rank": 2})
    assert isinstance(adapter, ExportsPeft)
    with pytest.raises(UnsupportedAdapterError, match="no preference"):
        adapter.export_peft(tmp_path / "a", preference=[0.5, 0.5])
    assert not list(tmp_path.iterdir())


def test_an_export_says_nothing_about_training_and_loads_again(tiny: LanguageModel, tmp_path: Path) -> None:
    adapter = LoRA.random(tiny, {"rank": 2, "seed": 4321})
    adapter.export_peft(tmp_path / "a")
    assert b"4321" not in b"".join(path.read_bytes()[:4096] for path in (tmp_path / "a").iterdir())
    again = LoRA.from_pretrained(tmp_path / "a")
    assert again.digest == adapter.digest
    assert (again.config.rank, again.config.scale) == (2, 1.0)


def test_another_familys_folder_is_refused(tiny: LanguageModel, tmp_path: Path) -> None:
    from persona_sdk.adapters import folders, peft_format

    adapter = LoRA.random(tiny, {"rank": 2})
    peft_format.write(tmp_path / "a", adapter.tensors, base=adapter.base, header={folders.FAMILY: "other"})
    with pytest.raises(IncompatibleAdapterError, match="family 'other'"):
        LoRA.from_pretrained(tmp_path / "a")
    peft_format.write(tmp_path / "b", adapter.tensors, base=adapter.base, header={folders.CONFIG: "{]"})
    with pytest.raises(IncompatibleAdapterError, match="configuration is damaged"):
        LoRA.from_pretrained(tmp_path / "b")


def test_a_changed_scale_in_an_own_folder_is_noticed(tiny: LanguageModel, tmp_path: Path) -> None:
    LoRA.random(tiny, {"rank": 2}).save_pretrained(tmp_path / "a")
    edit_config(tmp_path / "a", lora_alpha=200)
    with pytest.raises(IncompatibleAdapterError, match="digest differs"):
        LoRA.from_pretrained(tmp_path / "a")


def test_adapters_cannot_be_changed(tiny: LanguageModel) -> None:
    adapter = LoRA.random(tiny, {"rank": 1})
    with pytest.raises(AttributeError):
        adapter.base = "other"  # type: ignore[misc]
    with pytest.raises(TypeError):
        adapter.tensors["x"] = torch.zeros(1)  # type: ignore[index]


def test_untrained_adapters(tiny: LanguageModel) -> None:
    assert LoRA.random(tiny).digest == LoRA.random(tiny).digest
    assert LoRA.random(tiny).digest != LoRA.random(tiny, {"seed": 1}).digest
    zero = LoRA.random(tiny, {"rank": 2}, std=0.0)
    assert torch.equal(adapted_logits(tiny, zero.tensors), logits(tiny.module))
    assert low_rank_bundle({}) == {}
