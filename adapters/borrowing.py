"""A base model lent to training and taken back unchanged.

The base is borrowed, not copied: peft puts its layers into it while training. `borrowed` holds the model's
lock, takes a picture of the module tree before and restores it afterwards, whatever happened in between,
together with the caller's random state and what accelerate keeps for the whole process.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from persona_sdk.adapters.random_state import same_random_state
from persona_sdk.models import LanguageModel


@contextmanager
def borrowed(model: LanguageModel) -> Iterator[nn.Module]:
    """Lend the base module for training: locked, and put back exactly as it was.

    Restores the module tree, hooks, modes, gradient flags and configuration of the module, and the random
    state of Python, NumPy and torch. Weights are not copied: they are frozen, and nothing may write them.
    """
    with model.lock, same_random_state(), _same_accelerator():
        picture = [_picture(part.__dict__) for part in model.module.modules()]
        settings = [
            _picture(part.__dict__)
            for part in (model.module.config, getattr(model.module, "generation_config", None))
            if part is not None
        ]
        flags = [(parameter, parameter.requires_grad) for parameter in model.module.parameters()]
        try:
            yield model.module
        finally:
            for place, content, inner in [*picture, *settings]:
                place.clear()
                place.update(content)
                for mapping, values in inner:
                    mapping.clear()
                    mapping.update(values)
            for parameter, wanted in flags:
                parameter.requires_grad_(wanted)
                parameter.grad = None


def _picture(place: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    """An object's attributes, and the content of those that are dictionaries (children, hooks, ...)."""
    content = dict(place)
    return place, content, [(value, dict(value)) for value in content.values() if isinstance(value, dict)]


@contextmanager
def _same_accelerator() -> Iterator[None]:
    """Trainer keeps process-wide state in accelerate; put back what the caller had there.

    A process group that training opened under torchrun stays open: the script may go on to use it.
    """
    from accelerate.state import AcceleratorState, GradientState, PartialState

    shared = [kind._shared_state for kind in (PartialState, AcceleratorState, GradientState)]
    before = [dict(state) for state in shared]
    try:
        yield
    finally:
        for state, content in zip(shared, before, strict=True):
            state.clear()
            state.update(content)
