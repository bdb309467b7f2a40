"""PEFT folders: what loads does the same as in peft, what could not is refused, what is written is whole."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from persona_sdk.adapters import LoRA, folders, lowrank, peft_format
from persona_sdk.errors import (
    AdapterError,
    IncompatibleAdapterError,
    InvalidInputError,
    NotFoundError,
    UnsupportedAdapterError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import digest, low_rank_bundle
from persona_sdk.testing import tiny_language_model

from .support import PEFT_WARNINGS, adapted_logits, edit_config, logits, peft_folder, peft_logits

pytestmark = pytest.mark.filterwarnings(PEFT_WARNINGS)

Q = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def model(request: pytest.FixtureRequest) -> LanguageModel:
    return tiny_language_model(architecture=request.param)


@pytest.fixture
def folder(tiny: LanguageModel, tmp_path: Path) -> Path:
    """A good folder as another tool writes it: no header of ours."""
    peft_folder(tiny, tmp_path / "foreign", r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"])
    return tmp_path / "foreign"


def rewrite(folder: Path, change: Any) -> None:
    tensors = load_file(folder / folders.TENSOR_FILE)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors)
    save_file(tensors, folder / folders.TENSOR_FILE, metadata={"format": "pt"})


VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 10},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "rank_pattern": {"r": 2, "lora_alpha": 4, "rank_pattern": {"PROJ": 5}},
    "alpha_pattern": {"r": 4, "lora_alpha": 4, "alpha_pattern": {r"0\..*PROJ": 1, "PROJ": 9}},
    "all": {
        "r": 3,
        "lora_alpha": 4,
        "use_rslora": True,
        "rank_pattern": {"0.*PROJ": 2},
        "alpha_pattern": {"PROJ": 7},
    },
}
PROJ = {"llama": "q_proj", "gpt2": "c_attn"}
TARGETS = {"llama": ["q_proj", "v_proj", "down_proj"], "gpt2": ["c_attn", "mlp.c_proj"]}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_peft_folder_does_here_what_it_does_in_peft(
    variant: str, model: LanguageModel, tmp_path: Path
) -> None:
    kind = model.module.config.model_type
    options = {
        name: {key.replace("PROJ", PROJ[kind]): v for key, v in value.items()}
        if isinstance(value, dict)
        else value
        for name, value in VARIANTS[variant].items()
    }
    reference = peft_folder(
        model, tmp_path / "a", target_modules=TARGETS[kind], fan_in_fan_out=kind == "gpt2", **options
    )
    found = peft_format.read(tmp_path / "a", base=model)
    assert (adapted_logits(model, found.tensors) - reference).abs().max() <= 1e-5
    assert (logits(model.module) - reference).abs().max() > 1e-2
    assert found.base == model.fingerprint
    assert found.fan_in_fan_out == (kind == "gpt2")

    # and written again, it does in peft what it did before
    LoRA.from_pretrained(tmp_path / "a", base=model).export_peft(tmp_path / "b")
    assert (peft_logits(model, tmp_path / "b") - reference).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "targets",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r".*layers\.1\..*(q|k)_proj"},
        {"target_modules": ["q_proj", "k_proj"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": [Q]},
        {"target_modules": [Q]},
    ],
    ids=["all-linear", "expression", "layers", "exclusion", "path"],
)
def test_every_form_of_target_modules(targets: dict[str, Any], tiny: LanguageModel, tmp_path: Path) -> None:
    reference = peft_folder(tiny, tmp_path / "a", r=2, **targets)
    adapter = LoRA.from_pretrained(tmp_path / "a", base=tiny)
    assert (adapted_logits(tiny, adapter.tensors) - reference).abs().max() <= 1e-5
    adapter.export_peft(tmp_path / "b")
    assert (peft_logits(tiny, tmp_path / "b") - reference).abs().max() <= 1e-5


def test_half_precision_factors_are_read_as_float32(tiny: LanguageModel, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    found = peft_format.read(folder, base=tiny)
    assert {tensor.dtype for tensor in found.tensors.values()} == {torch.float32}


def test_missing_layers_are_read_and_logged(
    tiny: LanguageModel, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rewrite(folder, lambda t: [t.pop(k) for k in list(t) if "layers.1" in k])
    with caplog.at_level("WARNING", logger="persona_sdk"):
        found = peft_format.read(folder, base=tiny)
    assert lowrank.modules_of(found.tensors) == (Q, Q.replace("q_", "v_"))
    assert "2 targeted modules have no weights" in caplog.text


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"lora_bias": True}, "lora_bias"),
        ({"bias": "all"}, "bias='all'"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
        ({"alora_invocation_tokens": [5]}, "alora_invocation_tokens"),
        ({"megatron_config": {"x": 1}}, "megatron_config"),
        ({"target_parameters": ["experts.w"]}, "target_parameters"),
        ({"use_qalora": True}, "use_qalora"),
        ({"kasa_config": {"beta": 1}}, "kasa_config"),
        ({"a_variant_of_next_year": {"x": 1}}, "a_variant_of_next_year"),
        ({"peft_type": "LOHA"}, "LOHA"),
        ({"peft_type": None}, "None"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4"),
        ({"init_lora_weights": "olora"}, "olora"),
        ({"init_lora_weights": "corda"}, "corda"),
        ({"init_lora_weights": "loftq"}, "loftq"),
        ({"init_lora_weights": "lora_ga"}, "lora_ga"),
    ],
)
def test_variants_are_refused_by_name(
    changes: dict[str, Any], named: str, tiny: LanguageModel, folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(UnsupportedAdapterError, match=named) as caught:
        peft_format.read(folder, base=tiny)
    assert caught.value.hint


@pytest.mark.parametrize(
    "key",
    [
        f"base_model.model.{Q}.lora_magnitude_vector",
        f"base_model.model.{Q}.lora_B.bias",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.modules_to_save.weight",
        f"{Q}.lora_A.weight",
    ],
)
def test_tensors_of_variants_are_refused(key: str, tiny: LanguageModel, folder: Path) -> None:
    rewrite(folder, lambda t: t.update({key: torch.ones(4)}))
    with pytest.raises(UnsupportedAdapterError, match=key.replace(".", r"\.")):
        peft_format.read(folder, base=tiny)


A_KEY, B_KEY = (f"base_model.model.{Q}.lora_{side}.weight" for side in "AB")


def poison(tensors: dict[str, Tensor], value: float) -> None:
    tensors[A_KEY][0, 0] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(B_KEY), "has {'A'"),
        (lambda t: poison(t, float("nan")), "NaN"),
        (lambda t: poison(t, float("inf")), "NaN or infinity"),
        (lambda t: t.update({A_KEY: torch.ones(4, 33)}), "maps 33 to 32"),
        (lambda t: t.update({B_KEY: torch.ones(31, 4)}), "maps 32 to 31"),
        (lambda t: t.update({A_KEY: torch.ones(5, 32)}), "A \\[rank, d_in\\]"),
        (lambda t: t.update({A_KEY: torch.ones(5, 32), B_KEY: torch.ones(32, 5)}), "says 4"),
        (lambda t: t.update({A_KEY: torch.ones(0, 32), B_KEY: torch.ones(32, 0)}), "rank >= 1"),
        (lambda t: t.update({A_KEY: torch.ones(4)}), "A \\[rank, d_in\\]"),
        (lambda t: t.update({A_KEY: torch.ones(4, 32, dtype=torch.int8)}), "int8"),
        (
            lambda t: t.update({k.replace("layers.0", "layers.9"): t[k].clone() for k in (A_KEY, B_KEY)}),
            "no linear map 'model.layers.9",
        ),
        (
            lambda t: t.update({k.replace("q_proj", "k_proj"): t[k][:16].clone() for k in (A_KEY, B_KEY)}),
            "target_modules do not name",
        ),
        (lambda t: t.clear(), "holds no tensors"),
    ],
)
def test_damaged_weights_are_refused(change: Any, message: str, tiny: LanguageModel, folder: Path) -> None:
    rewrite(folder, change)
    with pytest.raises(IncompatibleAdapterError, match=message):
        peft_format.read(folder, base=tiny)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"r": 8}, "says 8"),
        ({"r": 0}, "says 0"),
        ({"r": None}, "r of module"),
        ({"lora_alpha": float("nan")}, "lora_alpha"),
        ({"lora_alpha": "much"}, "lora_alpha"),
        ({"rank_pattern": ["q_proj"]}, "rank_pattern"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern"),
        ({"target_modules": "("}, "target_modules"),
        ({"target_modules": ["k_proj"]}, "target_modules do not name"),
    ],
)
def test_damaged_configuration_is_refused(
    changes: dict[str, Any], message: str, tiny: LanguageModel, folder: Path
) -> None:
    edit_config(folder, **changes)
    with pytest.raises(IncompatibleAdapterError, match=message):
        peft_format.read(folder, base=tiny)


@pytest.mark.parametrize("text", ["{", "[]", "", "\xff"])
def test_a_configuration_that_is_no_object_is_refused(text: str, tiny: LanguageModel, folder: Path) -> None:
    (folder / folders.CONFIG_FILE).write_bytes(text.encode("latin-1"))
    with pytest.raises(IncompatibleAdapterError, match=r"adapter_config\.json"):
        peft_format.read(folder, base=tiny)


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, -1])
def test_a_truncated_weight_file_is_refused(keep: float, tiny: LanguageModel, folder: Path) -> None:
    file = folder / folders.TENSOR_FILE
    data = file.read_bytes()
    file.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else int(keep)])
    with pytest.raises(IncompatibleAdapterError, match="damaged"):
        peft_format.read(folder, base=tiny)


def test_a_flipped_bit_in_an_own_folder_is_noticed(tiny: LanguageModel, tmp_path: Path) -> None:
    LoRA.random(tiny, {"rank": 2}).save_pretrained(tmp_path / "a")
    file = tmp_path / "a" / folders.TENSOR_FILE
    data = bytearray(file.read_bytes())
    data[-2] ^= 1
    file.write_bytes(bytes(data))
    with pytest.raises(IncompatibleAdapterError, match="digest differs"):
        peft_format.read(tmp_path / "a", base=tiny)


def test_a_pickle_is_never_opened(tiny: LanguageModel, folder: Path, tmp_path: Path) -> None:
    (folder / folders.TENSOR_FILE).unlink()
    # protocol 0: calls os.mkdir(<trap>) when it is unpickled
    trap = tmp_path / "opened"
    (folder / "adapter_model.bin").write_bytes(f"cos\nmkdir\n(S'{trap}'\ntR.".encode())
    with pytest.raises(UnsupportedAdapterError, match="pickle") as caught:
        peft_format.read(folder, base=tiny)
    assert "safetensors" in caught.value.hint
    assert not trap.exists()


def test_missing_folders_and_files_say_what_was_expected(tiny: LanguageModel, folder: Path) -> None:
    with pytest.raises(NotFoundError, match="no adapter folder"):
        peft_format.read(folder / "nowhere", base=tiny)
    (folder / folders.CONFIG_FILE).unlink()
    with pytest.raises(IncompatibleAdapterError, match=r"no adapter_config\.json"):
        peft_format.read(folder, base=tiny)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(IncompatibleAdapterError):
        peft_format.read(folder, base=tiny)


def test_a_foreign_folder_needs_a_base_and_an_own_one_knows_it(
    tiny: LanguageModel, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(IncompatibleAdapterError, match="does not say which base"):
        peft_format.read(folder)
    LoRA.from_pretrained(folder, base=tiny).save_pretrained(tmp_path / "own")
    assert peft_format.read(tmp_path / "own").base == tiny.fingerprint
    with pytest.raises(IncompatibleAdapterError, match="was made for base model"):
        peft_format.read(tmp_path / "own", base=tiny_language_model(seed=1))


def test_mixed_ranks_are_written_as_one_rank(tiny: LanguageModel, tmp_path: Path) -> None:
    shapes = tiny.linear_shapes()
    modules = {Q: 1, Q.replace("q_proj", "o_proj"): 3}
    bundle = low_rank_bundle(
        {m: (torch.randn(r, shapes[m][0]), torch.randn(shapes[m][1], r)) for m, r in modules.items()}
    )
    peft_format.write(tmp_path / "a", bundle, base=tiny.fingerprint, base_name="served-name")
    config = json.loads((tmp_path / "a" / folders.CONFIG_FILE).read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 3, "served-name")
    assert config["target_modules"] == sorted(modules)
    assert digest(peft_format.read(tmp_path / "a", base=tiny).tensors) == digest(lowrank.pad_rank(bundle))
    assert (peft_logits(tiny, tmp_path / "a") - adapted_logits(tiny, bundle)).abs().max() <= 1e-5
    card = (tmp_path / "a" / folders.CARD_FILE).read_text()
    assert all(part in card for part in ("served-name", digest(lowrank.pad_rank(bundle)), "q_proj"))


def test_writing_the_same_adapter_twice_gives_the_same_configuration(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    adapter = LoRA.random(tiny, {"rank": 2})
    texts = {(adapter.save_pretrained(tmp_path / n) / folders.CONFIG_FILE).read_text() for n in "ab"}
    assert len(texts) == 1


def test_an_adapter_folder_is_replaced_and_any_other_is_left_alone(
    tiny: LanguageModel, tmp_path: Path
) -> None:
    first, second = LoRA.random(tiny, {"rank": 2, "seed": 1}), LoRA.random(tiny, {"rank": 2, "seed": 2})
    first.save_pretrained(tmp_path / "a")
    second.save_pretrained(tmp_path / "a")
    assert peft_format.read(tmp_path / "a").header[folders.DIGEST] == second.digest

    (tmp_path / "a" / "notes.txt").write_text("mine")
    with pytest.raises(InvalidInputError, match=r"notes\.txt"):
        first.save_pretrained(tmp_path / "a")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "README.md").write_text("mine")
    with pytest.raises(InvalidInputError, match="not an adapter folder"):
        first.save_pretrained(tmp_path / "b")
    with pytest.raises(InvalidInputError, match="is a file"):
        first.save_pretrained(tmp_path / "b" / "README.md")
    (tmp_path / "c").mkdir()
    first.save_pretrained(tmp_path / "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "c"]
    assert (tmp_path / "b" / "README.md").read_text() == "mine"
    assert peft_format.read(tmp_path / "c").header[folders.DIGEST] == first.digest


@pytest.mark.parametrize("fault", ["tensors", "card", "rename", "interrupt"])
@pytest.mark.parametrize("existing", [True, False])
def test_a_failed_save_changes_nothing(
    fault: str, existing: bool, tiny: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = LoRA.random(tiny, {"rank": 2, "seed": 1}), LoRA.random(tiny, {"rank": 2, "seed": 2})
    target = tmp_path / "a"
    if existing:
        old.save_pretrained(target)

    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt if fault == "interrupt" else OSError(28, "No space left on device")

    if fault == "card":
        monkeypatch.setattr(Path, "write_text", fail)
    elif fault == "rename":
        real = os.rename
        monkeypatch.setattr(os, "rename", lambda a, b: fail() if str(a).endswith(".new") else real(a, b))
    else:
        monkeypatch.setattr(folders, "write_tensors", fail)
    with pytest.raises(KeyboardInterrupt if fault == "interrupt" else AdapterError):
        new.save_pretrained(target)
    monkeypatch.undo()
    assert [path.name for path in tmp_path.iterdir()] == (["a"] if existing else [])
    if existing:
        assert LoRA.from_pretrained(target, base=tiny).digest == old.digest


def test_a_bad_bundle_is_not_written(tiny: LanguageModel, tmp_path: Path) -> None:
    nan = low_rank_bundle({Q: (torch.full((1, 32), float("nan")), torch.ones(32, 1))})
    for bundle in (nan, {}, {f"{Q}.A": torch.ones(1, 32)}):
        with pytest.raises(IncompatibleAdapterError):
            peft_format.write(tmp_path / "a", bundle, base=tiny.fingerprint)
    assert not list(tmp_path.iterdir())
