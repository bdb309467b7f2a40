"""PEFT LoRA folders, read and written as plain files.

    adapter_config.json         what peft's LoraConfig needs
    adapter_model.safetensors   "base_model.model.<module path>.lora_A.weight"  [r, d_in]
                                "base_model.model.<module path>.lora_B.weight"  [d_out, r]
    README.md                   a short card

Reading folds the scale into B (`persona_sdk.adapters.peft_config`) and pads all modules to one rank with
zeros, the form plan parts need (`persona_sdk.tensors`). GPT-2's ``Conv1D`` stores its weight transposed,
its LoRA factors are not. Whatever cannot be written as ``y += B (g ∘ (A x))`` on a linear map of the
unchanged base model is refused by name: an adapter that loads does the same here as in peft.

Writing gives the subset that peft, vLLM and LoRAX all accept: scale 1 (``lora_alpha = r``), one rank,
explicit target modules. The base model's fingerprint travels in the safetensors header
(`persona_sdk.adapters.folders`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn

from persona_sdk.adapters import folders, lowrank, peft_config
from persona_sdk.adapters.base import language_model
from persona_sdk.errors import IncompatibleAdapterError, UnsupportedAdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle, digest, low_rank_bundle, low_rank_pairs

_PREFIX = "base_model.model."
_KEY = re.compile(re.escape(_PREFIX) + r"(?P<module>.+)\.lora_(?P<side>[AB])\.weight")


@dataclass(frozen=True)
class PeftLora:
    """What a PEFT LoRA folder holds, reduced to the convention of `persona_sdk.tensors`.

    Args:
        base: fingerprint of the base model it is bound to.
        tensors: the low-rank bundle, float32, one rank, scale folded into B.
        target_modules: names that select exactly the modules it updates.
        base_name: ``base_model_name_or_path`` of the folder.
        fan_in_fan_out: the base stores its weights as ``Conv1D`` does.
        header: the safetensors header; other tools leave it empty.
    """

    base: str
    tensors: TensorBundle
    target_modules: tuple[str, ...]
    base_name: str
    fan_in_fan_out: bool
    header: Mapping[str, str]


def read(folder: str | Path, *, base: Any = None) -> PeftLora:
    """Read a PEFT LoRA folder.

    Args:
        folder: holds ``adapter_config.json`` and ``adapter_model.safetensors``.
        base: the model to bind it to, and to check fingerprint and shapes against. Not needed for a folder
            written by this SDK, which knows its base.

    Raises:
        NotFoundError: there is no such folder.
        UnsupportedAdapterError: a variant that is more than a low-rank update of linear maps.
        IncompatibleAdapterError: damaged, incomplete, or made for another base model.
    """
    path = folders.existing_folder(folder)
    config = folders.read_json(_present(path, folders.CONFIG_FILE))
    peft_config.refuse_variants(config)
    raw, header = folders.read_tensors(_present(path, folders.TENSOR_FILE))
    pairs = parse_keys(raw)
    model = None if base is None else language_model(base)
    fingerprint = _bind(path, header, model)
    if model is not None:
        check_shapes(pairs, model.linear_shapes())
    peft_config.check_targets(config, sorted(pairs), model.linear_shapes() if model else ())
    tensors = lowrank.pad_rank(low_rank_bundle({m: peft_config.folded(config, m, *pairs[m]) for m in pairs}))
    folders.check_digest(tensors, header, path.name)
    return PeftLora(
        base=fingerprint,
        tensors=tensors,
        target_modules=_recorded_targets(config, sorted(pairs), model),
        base_name=str(config.get("base_model_name_or_path") or ""),
        fan_in_fan_out=is_transposed(model, pairs) if model else bool(config.get("fan_in_fan_out")),
        header=MappingProxyType(header),
    )


def write(
    folder: str | Path,
    tensors: TensorBundle,
    *,
    base: str,
    base_name: str = "",
    target_modules: Sequence[str] = (),
    fan_in_fan_out: bool = False,
    header: Mapping[str, str] = MappingProxyType({}),
) -> Path:
    """Write a PEFT LoRA folder that peft and vLLM load unchanged; whole or not at all.

    Args:
        folder: new, empty, or an adapter folder to replace.
        tensors: a low-rank bundle; scale is taken to be folded into B.
        base: fingerprint of the base model.
        base_name: name under which the base model is served.
        target_modules: names that select the modules; the full paths if empty.
        fan_in_fan_out: the base stores its weights as ``Conv1D`` does.
        header: further strings to keep beside the tensors.

    Raises:
        InvalidInputError: the folder holds something else.
        IncompatibleAdapterError: not a low-rank bundle, or NaN in it.
        AdapterError: the disk refused; nothing was changed.
    """
    from peft import LoraConfig

    bundle = lowrank.pad_rank(tensors)
    rank, modules = lowrank.rank_of(bundle), lowrank.modules_of(bundle)
    folders.require_finite(bundle)
    config = LoraConfig(
        r=rank,
        lora_alpha=rank,
        target_modules=list(target_modules or modules),
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        fan_in_fan_out=fan_in_fan_out,
        inference_mode=True,
    )
    config.target_modules = sorted(config.target_modules)  # peft keeps a set, whose order is random
    weights = {
        f"{_PREFIX}{module}.lora_{side}.weight": factor
        for module, A, B in low_rank_pairs(bundle)
        for side, factor in (("A", A), ("B", B))
    }
    content = digest(bundle)
    with folders.replace_folder(folder) as fresh:
        config.save_pretrained(str(fresh))
        own = {folders.BASE: base, folders.DIGEST: content}
        folders.write_tensors(fresh / folders.TENSOR_FILE, weights, {**header, **own})
        (fresh / folders.CARD_FILE).write_text(_card(base_name, base, rank, modules, content), "utf-8")
    return Path(folder)


def parse_keys(raw: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """``{module: (A, B)}`` from a peft state dict.

    Raises:
        UnsupportedAdapterError: a tensor that is no weight of A or B.
        IncompatibleAdapterError: nothing there, a factor without its partner, or ranks that differ.
    """
    sides: dict[str, dict[str, Tensor]] = {}
    for name, tensor in raw.items():
        match = _KEY.fullmatch(name)
        if match is None:
            raise UnsupportedAdapterError(
                f"Tensor {name!r} is not a factor of a plain LoRA.",
                hint=f"Expected only '{_PREFIX}<module>.lora_[AB].weight'. {peft_config.RESAVE}",
            )
        sides.setdefault(match["module"], {})[match["side"]] = tensor
    if not sides:
        raise IncompatibleAdapterError("The adapter holds no tensors.", hint="Save it again after training.")
    for module, found in sides.items():
        shapes = {side: tuple(tensor.shape) for side, tensor in sorted(found.items())}
        whole = len(found) == 2 and all(len(shape) == 2 for shape in shapes.values())
        if not whole or shapes["A"][0] != shapes["B"][1] or 0 in shapes["A"] + shapes["B"]:
            raise IncompatibleAdapterError(
                f"Module {module!r} has {shapes}.",
                hint="Expected A [rank, d_in] and B [d_out, rank], rank >= 1.",
            )
    return {module: (found["A"], found["B"]) for module, found in sorted(sides.items())}


def check_shapes(pairs: Mapping[str, tuple[Tensor, Tensor]], shapes: Mapping[str, tuple[int, int]]) -> None:
    """Raise `IncompatibleAdapterError` unless every pair fits a linear map of the base model."""
    for module, (A, B) in pairs.items():
        if module not in shapes:
            raise IncompatibleAdapterError(
                f"The base model has no linear map {module!r} that can be adapted.",
                hint=f"It has {len(shapes)} such maps, for example {min(shapes, default='none')!r}; "
                "embeddings and the output head are not among them.",
            )
        if (A.shape[1], B.shape[0]) != shapes[module]:
            d_in, d_out = shapes[module]
            raise IncompatibleAdapterError(
                f"Module {module!r} of the adapter maps {A.shape[1]} to {B.shape[0]} numbers, "
                f"the base model's maps {d_in} to {d_out}.",
                hint="Load the base model the adapter was made for.",
            )


def is_transposed(model: LanguageModel, modules: Collection[str]) -> bool:
    """Whether any of the modules stores its weight as ``Conv1D`` does."""
    linears = model.linears()
    return any(not isinstance(linears[module], nn.Linear) for module in modules)


def short_names(modules: Collection[str], available: Collection[str] | None = None) -> tuple[str, ...]:
    """Last names of the modules where those select exactly `modules` among `available`, else full paths."""
    leaves = {module.rpartition(".")[2] for module in modules}
    selected = {path for path in available or modules if path.rpartition(".")[2] in leaves}
    return tuple(sorted(leaves if selected == set(modules) else modules))


def _present(path: Path, name: str) -> Path:
    if (path / name).is_file():
        return path / name
    pickled = sorted(file.name for file in path.glob("adapter_model*.bin"))
    if name == folders.TENSOR_FILE and pickled:
        raise UnsupportedAdapterError(
            f"{path.name} keeps its weights in {pickled[0]}, a pickle, which can run code when it is opened.",
            hint="Re-save it as safetensors where you trust it: peft_model.save_pretrained(folder).",
        )
    raise IncompatibleAdapterError(
        f"{path.name} has no {name}.", hint=f"Expected {folders.CONFIG_FILE} and {folders.TENSOR_FILE}."
    )


def _bind(path: Path, header: Mapping[str, str], model: LanguageModel | None) -> str:
    own = header.get(folders.BASE)
    if model is None and own is None:
        raise IncompatibleAdapterError(
            f"{path.name} does not say which base model it was made for.",
            hint="It was written by another tool: pass base=, and it is bound to that model.",
        )
    if model is not None and own is not None and own != model.fingerprint:
        raise IncompatibleAdapterError(
            f"{path.name} was made for base model {own[:12]} but this one is {model.fingerprint[:12]}.",
            hint="Load the matching base model, or train the adapter again on this one.",
        )
    return own if own is not None else model.fingerprint  # type: ignore[union-attr]


def _recorded_targets(
    config: Mapping[str, Any], modules: Sequence[str], model: LanguageModel | None
) -> tuple[str, ...]:
    if model is not None:
        return short_names(modules, model.linear_shapes())
    targets = config.get("target_modules")
    return tuple(sorted(map(str, targets))) if isinstance(targets, list) else tuple(modules)


def _card(base_name: str, base: str, rank: int, modules: Sequence[str], content: str) -> str:
    leaves = ", ".join(f"`{name}`" for name in short_names(modules))
    return (
        f"---\nlibrary_name: peft\nbase_model: {base_name or 'unknown'}\ntags: [lora, persona-sdk]\n---\n"
        f"# LoRA adapter\n\n| | |\n|---|---|\n| base model | `{base_name or 'unknown'}` |\n"
        f"| base fingerprint | `{base}` |\n| rank | {rank}, scale folded into B |\n"
        f"| modules | {len(modules)}: {leaves} |\n| sha256 of the tensors | `{content}` |\n"
    )
