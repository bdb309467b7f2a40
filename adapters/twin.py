"""A second module tree over the same frozen weights, so that work on a model need not stop those who use it.

Training puts layers into the module tree and hooks on it, and whoever runs the module waits for its lock
meanwhile. A twin has modules, hooks, configuration and lock of its own; its parameters and buffers are the
very tensors of the original, so it takes no memory and must not write them.
"""

import copy
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from persona_sdk.adapters import lowrank
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle, low_rank_pairs


def twin(model: LanguageModel) -> LanguageModel:
    """A model of the same weights whose module tree and lock are its own, without anybody's hooks."""
    with model.lock:  # a training run has layers of its own in the tree meanwhile
        module = _copy(model.module, {})
    return replace(model, module=module, lock=threading.RLock())


def _copy(part: nn.Module, known: dict[int, nn.Module]) -> nn.Module:
    if id(part) in known:
        return known[id(part)]
    made = known[id(part)] = part.__class__.__new__(part.__class__)
    for name, value in vars(part).items():
        if name == "_modules":
            value = {key: child and _copy(child, known) for key, child in value.items()}
        elif name.endswith("_hooks") or "_hooks_" in name:
            value = type(value)() if isinstance(value, dict) else value
        elif name in ("config", "generation_config"):
            value = copy.deepcopy(value)
        elif isinstance(value, dict | set):  # _parameters and _buffers: other dictionaries, the same tensors
            value = value.copy()
        made.__dict__[name] = value
    return made


@contextmanager
def applied(model: LanguageModel, bundle: TensorBundle | None) -> Iterator[Any]:
    """The module, with a low-rank update beside its linear maps for the length of the block.

    Meant for a twin: hooks on a model that others use would change their results.
    """
    linears, handles = model.linears(), []
    try:
        for path, A, B in low_rank_pairs(bundle or {}):
            A, B = A.to(model.device), B.to(model.device)

            def add(_: nn.Module, inputs: Any, output: Tensor, A: Tensor = A, B: Tensor = B) -> Tensor:
                return output + lowrank.apply(inputs[0].to(A.dtype), A, B).to(output.dtype)

            handles.append(linears[path].register_forward_hook(add))
        yield model.module
    finally:
        for handle in handles:
            handle.remove()
