"""References for adapter tests: a plain forward hook, and peft itself."""

import copy
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from persona_sdk.adapters import lowrank
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle, low_rank_pairs

# peft asks transformers for a property that transformers is about to rename
PEFT_WARNINGS = "ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"

IDS = torch.tensor([[1, 40, 77, 130, 200, 9, 31], [301, 2, 55, 56, 57, 120, 90]])


@contextmanager
def patched(
    model: LanguageModel, bundle: TensorBundle, gate: Sequence[float] | None = None
) -> Iterator[None]:
    """Add a low-rank update to the base by forward hooks, one per module."""
    linears = model.linears()
    handles = [
        linears[module].register_forward_hook(
            lambda _, inputs, output, A=A, B=B: output + lowrank.apply(inputs[0], A, B, gate)
        )
        for module, A, B in low_rank_pairs(bundle)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits(module: Any, ids: Tensor = IDS) -> Tensor:
    with torch.inference_mode():
        return module(input_ids=ids, use_cache=False).logits


def adapted_logits(model: LanguageModel, bundle: TensorBundle, gate: Sequence[float] | None = None) -> Tensor:
    with patched(model, bundle, gate):
        return logits(model.module)


def peft_folder(model: LanguageModel, folder: Path, **options: Any) -> Tensor:
    """Save a random peft LoRA of this base in `folder`; returns the logits peft computes with it."""
    with torch.random.fork_rng():
        torch.manual_seed(7)
        config = LoraConfig(**{"init_lora_weights": False, "task_type": "CAUSAL_LM", **options})
        wrapped = get_peft_model(copy.deepcopy(model.module), config).eval()
    with torch.no_grad():  # peft's random start is a large change for so small a model
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.mul_(0.5)
    wrapped.save_pretrained(str(folder), save_embedding_layers=False)
    return logits(wrapped)


def peft_logits(model: LanguageModel, folder: Path) -> Tensor:
    """Logits of the base with an adapter folder loaded by peft."""
    return logits(PeftModel.from_pretrained(copy.deepcopy(model.module), str(folder)).eval())


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
