"""What trains under a preference vector, whatever the objective: which λ is due, and what all losses share.

Every optimizer step has one λ, as in the paper, or every example its own. The λ of a step depends on seed and
step alone, so all devices of a launch draw the same and a resumed run goes on with the one that was due.
"""

import os
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preferences import sample
from persona_sdk.adapters.svd_layers import Layers


class Student(nn.Module):
    """The base with its layers, as the Trainer wants it: a batch in, a loss out.

    Args:
        module: the base's module, with SVD-LoRA layers in it.
        layers: those layers.
        options: how to train.
    """

    def __init__(self, module: nn.Module, layers: Layers, options: PanaceaConfig) -> None:
        super().__init__()
        self.module = module
        self.layers, self.options = layers, options
        # Tokens read by this process, padding not counted; a buffer, so that a resumed run goes on counting.
        self.read = nn.Buffer(torch.zeros((), dtype=torch.int64))
        self._step, self._part = 0, 0

    @property
    def tokens(self) -> int:
        """Tokens read by this process, padding not counted."""
        return int(self.read)

    def count(self, tokens: int) -> None:
        """Tokens were read."""
        self.read.add_(tokens)

    def train(self, mode: bool = True) -> Self:
        """Training mode for nothing but the layers: dropout of the base would make it another policy."""
        super().train(mode)
        self.module.eval()
        return self

    def begin(self, step: int) -> None:
        """An optimizer step begins; steps count from 0, also over an interruption."""
        self._step, self._part = step, 0

    def announcer(self) -> Any:
        """A callback for the Trainer that calls `begin`."""
        from transformers import TrainerCallback

        student = self

        class Announcer(TrainerCallback):  # type: ignore[misc]  # transformers is loaded when first needed
            def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
                student.begin(state.global_step)

        return Announcer()

    def draw(self, n: int) -> tuple[Float[Tensor, "n m"], np.random.Generator]:
        """λ of each example of the next batch, and a generator for what else is drawn with it."""
        options, m = self.options, len(self.options.dimensions)
        law = {"concentration": options.concentration, "vertex": options.vertex_probability}
        # Keys of one length and their own first number: numpy pads with zeros, and equal keys are one stream.
        own = np.random.default_rng([1, options.seed, self._step, self._part, _rank()])
        self._part += 1
        if options.fixed_preference is not None:
            return torch.tensor(options.fixed_preference).expand(n, m), own
        if options.preference_sampling == "example":
            return sample(n, m, own, **law), own
        return sample(1, m, np.random.default_rng([0, options.seed, self._step, 0, 0]), **law).expand(
            n, m
        ), own

    def penalty(self) -> Tensor | float:
        """What U and V are charged for not being orthonormal."""
        weight = self.options.orthogonality_weight
        return weight * self.layers.penalty() if weight else 0.0


def _rank() -> int:
    """Number of this process in a launch on several devices."""
    return int(os.environ.get("RANK", 0))
