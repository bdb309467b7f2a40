"""Training one adapter for all preference vectors: draw λ, weigh the objectives by it, step; again.

    SFT, DPO   `preference_likelihood`        reward   `preference_rewards`

Steps, checkpoints, evaluations and the launch on several devices are those of `training.fit`. With held-out
data the weights with the largest hypervolume over a small grid are kept, and training ends when it stops
growing.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.dominance import hypervolume
from persona_sdk.adapters.evaluation import Evaluation
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.pareto import held_out_objectives, means, measure, reference_point
from persona_sdk.adapters.preference_data import Reward, encode_examples
from persona_sdk.adapters.preference_likelihood import (
    LikelihoodStudent,
    collate_items,
    dataset,
    mean_length,
    with_reference,
)
from persona_sdk.adapters.preference_rewards import (
    RewardStudent,
    check_rewards,
    collate_prompts,
    encode_prompts,
)
from persona_sdk.adapters.preference_student import Student
from persona_sdk.adapters.preferences import grid
from persona_sdk.adapters.svd_layers import Layers, svd_layers
from persona_sdk.adapters.training import TrainingReport, fit
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle

_DIVISIONS = {2: 4, 3: 2}  # 5 and 6 points for early stopping; vertices and centre with more dimensions


def train(
    model: LanguageModel,
    data: Any,
    options: PanaceaConfig,
    *,
    start: TensorBundle,
    rewards: Mapping[str, Reward] | None = None,
    held_out: Any = None,
    checkpoints: Checkpoints | None = None,
    progress: bool | None = None,
    callbacks: Sequence[Any] = (),
) -> tuple[TensorBundle, TrainingReport]:
    """Train U, V, σ and s from `start`; arguments and errors as for `Panacea.train`."""
    with svd_layers(model, start, options.shape, seed=options.seed) as layers:
        for layer in layers.modules.values():
            layer.s.requires_grad_(options.train_scale)
        student, rows = _student(model, layers, options, data, rewards)
        evaluation = None
        if held_out is not None:
            score = _hypervolume(model, layers, options, held_out, rewards)
            evaluation = Evaluation(score, options.eval_steps, options.early_stopping_patience)
        report = fit(
            model,
            student,
            rows,
            options,
            progress=progress,
            collator=collate_prompts if options.objective == "reward" else collate_items,
            checkpoints=checkpoints,
            evaluation=evaluation,
            callbacks=[student.announcer(), *callbacks],
        )
        return layers.tensors(), replace(report, tokens=_of_all_processes(student.tokens, model.device))


def _of_all_processes(count: int, device: torch.device) -> int:
    if not torch.distributed.is_initialized():
        return count
    total = torch.tensor(count, device=device)
    torch.distributed.all_reduce(total)
    return int(total)


def _student(
    model: LanguageModel,
    layers: Layers,
    options: PanaceaConfig,
    data: Any,
    rewards: Mapping[str, Reward] | None,
) -> tuple[Student, list[Any]]:
    """What is trained, and the rows it is trained on."""
    longest = min(options.max_length, model.context_length)
    if options.objective == "reward":
        prompts = encode_prompts(model, data, longest - options.max_new_tokens)
        student = RewardStudent(model, layers, options, check_rewards(rewards, options.dimensions))
        return student, [prompt.as_row() for prompt in prompts]
    if rewards is not None:
        raise InvalidInputError(
            f"There are rewards, and the objective is {options.objective!r}.",
            hint="Pass objective='reward', or no rewards.",
        )
    examples = encode_examples(model.tokenizer, data, options.dimensions, options.objective, longest)
    if options.objective == "dpo":
        examples = with_reference(model, layers, examples, options.per_device_eval_batch_size)
    scale = mean_length(examples)
    return LikelihoodStudent(model.module, layers, options, scale), dataset(examples, options.seed)


def _hypervolume(
    model: LanguageModel,
    layers: Layers,
    options: PanaceaConfig,
    held_out: Any,
    rewards: Mapping[str, Reward] | None,
) -> Callable[[], float]:
    """The score of early stopping; the reference point is fixed before the first step."""
    of, m = held_out_objectives(model, layers, options, held_out, rewards), len(options.dimensions)
    points = grid(m, _DIVISIONS.get(m, 1))
    if m not in _DIVISIONS:
        points = torch.cat([points, torch.full((1, m), 1 / m)])
    z = reference_point(means(of(None)), options.objective)
    hypervolume(z[None], z)  # the library that computes it may be missing: better now than later

    def score() -> float:
        return hypervolume(means(measure(of, points)), z)

    return score
