"""The layers that are trained: a frozen linear map with an SVD-LoRA beside it, under a preference vector.

    y = W0 x + c U ([σ, s∘λ] ∘ (Vᵀ x))                            algebra and shapes: `svd_lora`

λ is set for a block of code (`Preference.at`), one for the batch or one a row. It is a constant: no
parameter, no buffer, in no checkpoint.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_sdk.adapters.borrowing import borrowed
from persona_sdk.adapters.random_state import seed_everything
from persona_sdk.adapters.svd_lora import SIDES, Shape, orthogonality, sides_of, singular_values
from persona_sdk.errors import UnsupportedAdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle, freeze


class Preference:
    """What all layers of one adapter read while they run: λ, and whether they take part at all.

    Not a parameter and not a buffer, so it is in no checkpoint and nothing can train it.
    """

    def __init__(self) -> None:
        self.vector: Tensor | None = None  # None: the base model, not λ = 0, where σ is still on

    @contextmanager
    def at(self, vector: Float[Tensor, "*rows m"] | None) -> Iterator[None]:
        """Run the block at a preference vector, one a row, or as the base model."""
        before, self.vector = self.vector, None if vector is None else vector.detach()
        try:
            yield
        finally:
            self.vector = before


class SVDLinear(nn.Module):
    """A frozen linear map with an SVD-LoRA beside it; U, V, σ and s are its only trainable parameters."""

    def __init__(
        self, inner: nn.Module, sides: tuple[Tensor, Tensor, Tensor, Tensor], shape: Shape, at: Preference
    ) -> None:
        super().__init__()
        self.inner = inner
        self.U, self.V, self.sigma, self.s = map(nn.Parameter, sides)
        self._shape, self._preference = shape, at

    def forward(self, x: Tensor) -> Tensor:
        """``W0 x + c U ([σ, s∘λ] ∘ (Vᵀ x))``."""
        output: Tensor = self.inner(x)
        preference = self._preference.vector
        if preference is None:
            return output
        values = singular_values(self.sigma, self.s, preference, self._shape.preference_rank)
        if values.ndim == 2:  # one a row of the batch, for all its tokens
            values = values[:, None, :] if x.ndim > 2 else _for_tokens(values, len(x))
        # In the dtype of the base, which on CPUs with bfloat16 units is what makes training fast.
        U, V, scaled = (side.to(x.dtype) for side in (self.U, self.V, self._shape.multiplier * values))
        return output + (x @ V * scaled) @ U.T


@dataclass(frozen=True)
class Layers:
    """The layers in a model: where λ is set, and what they hold now."""

    preference: Preference
    modules: Mapping[str, SVDLinear]

    def tensors(self) -> TensorBundle:
        """Copies of U, V, σ and s of every module."""
        return freeze(
            {
                f"{path}.{side}": getattr(layer, side).detach().cpu().clone()
                for path, layer in self.modules.items()
                for side in SIDES
            }
        )

    def penalty(self) -> Tensor:
        """Mean of `orthogonality` over the matrices."""
        return torch.stack([orthogonality(layer.U, layer.V) for layer in self.modules.values()]).mean()


@contextmanager
def svd_layers(
    model: LanguageModel, tensors: TensorBundle, shape: Shape, *, seed: int = 0
) -> Iterator[Layers]:
    """Put SVD-LoRA layers with these tensors into the base for the length of the block.

    The model is locked meanwhile and restored afterwards. Only U, V, σ and s ask for gradients.

    Args:
        model: the base, or a twin of it.
        tensors: U, V, σ and s of the modules to adapt.
        shape: their common sizes.
        seed: of the random numbers that are drawn inside the block.
    """
    with borrowed(model) as module:
        seed_everything(seed)
        for parameter in module.parameters():
            parameter.requires_grad_(False)
        preference, layers = Preference(), {}
        for path, sides in sides_of(tensors).items():
            owner, _, name = path.rpartition(".")
            parent: Any = module.get_submodule(owner)
            own = tuple(side.detach().to(model.device, torch.float32).clone() for side in sides)
            layers[path] = SVDLinear(getattr(parent, name), own, shape, preference)  # type: ignore[arg-type]
            setattr(parent, name, layers[path])
        yield Layers(preference, layers)


def _for_tokens(values: Float[Tensor, "rows r"], tokens: int) -> Float[Tensor, "tokens r"]:
    """One a token, for models that lay all rows of a batch end to end before a linear map."""
    if tokens % len(values):
        raise UnsupportedAdapterError(
            f"A linear map got {tokens} tokens of {len(values)} rows; which row each is of is not known.",
            hint="Leave that module out of target_modules, or use preference_sampling='batch'.",
        )
    return values.repeat_interleave(tokens // len(values), dim=0)
