"""Evaluation on held-out data while training: which weights are the best, and when to stop.

    s_1, s_2, ...    scores, higher is better
    s_i is an improvement when it is the first, or s_i > s_b + min_delta for the last improvement b
    the weights of the last improvement are put back at the end
    training stops early once `patience` evaluations have passed since it

Where the run stands follows from the scores alone (`standing`), so a resumed run needs no more than those and
the best weights.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from persona_sdk.adapters.random_state import same_random_state
from persona_sdk.errors import AdapterError, InvalidInputError


@dataclass(frozen=True)
class Evaluation:
    """How to evaluate while training.

    Args:
        score: higher is better; called in eval mode, without gradients, on every process. It may draw random
            numbers: training does not notice.
        every: optimizer steps between two evaluations; there is one after the last step too.
        patience: evaluations without an improvement after which training stops; None never stops.
        min_delta: what a score must exceed the best one by to be an improvement.

    Raises:
        InvalidInputError: a number out of its range.
    """

    score: Callable[[], float]
    every: int
    patience: int | None = None
    min_delta: float = 0.0

    def __post_init__(self) -> None:
        patient = self.patience is None or self.patience >= 1
        if self.every < 1 or not patient or not 0 <= self.min_delta < math.inf:
            raise InvalidInputError(
                f"every={self.every}, patience={self.patience}, min_delta={self.min_delta} cannot be used.",
                hint="Expected every >= 1, patience >= 1 or None, and a finite min_delta >= 0.",
            )


def standing(scores: Sequence[float], min_delta: float = 0.0) -> tuple[int | None, int]:
    """Position of the best score (None: there are none), and how many scores came after it."""
    best: int | None = None
    for position, score in enumerate(scores):
        if best is None or score > scores[best] + min_delta:
            best = position
    return best, 0 if best is None else len(scores) - 1 - best


class HeldOut:
    """The evaluations of one run.

    Args:
        evaluation: what to do.
        trainable: the module in training.
        learned: gives its tensors that training changes, by name.
    """

    def __init__(
        self, evaluation: Evaluation, trainable: nn.Module, learned: Callable[[], Mapping[str, Tensor]]
    ) -> None:
        self.evaluation = evaluation
        self.scores: list[tuple[int, float]] = []
        self.best: dict[str, Tensor] = {}
        self._trainable, self._learned = trainable, learned

    @property
    def best_step(self) -> int | None:
        """The step with the best score."""
        position, _ = self._standing()
        return None if position is None else self.scores[position][0]

    @property
    def exhausted(self) -> bool:
        """Patience has come to its end."""
        patience = self.evaluation.patience
        return patience is not None and self._standing()[1] >= patience

    def run(self, step: int) -> None:
        """Evaluate after `step`, and keep the weights if they are the best so far.

        Raises:
            AdapterError: the score is no finite number.
        """
        modes = [(part, part.training) for part in self._trainable.modules()]
        self._trainable.eval()
        try:
            with torch.no_grad(), same_random_state():
                score = _of_first_process(float(self.evaluation.score()))
        finally:
            for part, mode in modes:
                part.training = mode
        if not math.isfinite(score):
            raise AdapterError(
                f"The score of the evaluation after step {step} is {score}.",
                hint="Expected a finite number. Lower learning_rate if the weights diverged.",
            )
        self.scores.append((step, score))
        if self.best_step == step:
            self.best = {name: tensor.detach().cpu().clone() for name, tensor in self._learned().items()}

    def is_due(self, step: int, last: bool) -> bool:
        """An evaluation belongs after this step."""
        return last or step % self.evaluation.every == 0

    def put_back(self) -> None:
        """Write the best weights into the module; without an evaluation, nothing."""
        copy_into(self._learned(), self.best)

    def _standing(self) -> tuple[int | None, int]:
        return standing([score for _, score in self.scores], self.evaluation.min_delta)


def copy_into(places: Mapping[str, Tensor], content: Mapping[str, Tensor]) -> None:
    """Copy tensors into those of the same names."""
    with torch.no_grad():
        for name, tensor in content.items():
            places[name].copy_(tensor)


def _of_first_process(score: float) -> float:
    """What the first process found: all must take the same decision, and rounding may differ."""
    from accelerate import PartialState
    from accelerate.utils import broadcast

    state = PartialState()
    if state.num_processes == 1:
        return score
    return float(broadcast(torch.tensor([score], dtype=torch.float64, device=state.device))[0])
