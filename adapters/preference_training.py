"""Training one adapter for all preference vectors: draw λ, weigh the objectives by it, step; again.

    maximise  E_λ [ g_λ(J_1(θ, λ), ..., J_m(θ, λ)) ] - w · orthogonality(U, V)

`aggregation` has g, `objectives` the J_i, `preferences` the law of λ. Every optimizer step has one λ, as in
the paper, or every item its own. The one of a step depends on seed and step alone, so all devices of a launch
draw the same and a resumed run goes on with the one that was due.

Examples whose weight is 0 are not run: at a vertex that saves all but one dimension, and changes no gradient.
The likelihood of replies is divided by the mean length of all replies, one constant for all dimensions.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from persona_sdk.adapters.aggregation import aggregate
from persona_sdk.adapters.checkpoints import Checkpoints
from persona_sdk.adapters.objectives import direct_preference, log_likelihood
from persona_sdk.adapters.preference_data import Example, Reward, encode_examples, items
from persona_sdk.adapters.preferences import sample
from persona_sdk.adapters.svd_lora import Layers, svd_layers
from persona_sdk.adapters.training import TrainingReport, fit
from persona_sdk.adapters.training_data import IGNORED, Row, collate, pad_token
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import TensorBundle

if TYPE_CHECKING:
    from persona_sdk.adapters.panacea import PanaceaConfig

_BATCH = 32


def train(
    model: LanguageModel,
    data: Any,
    options: "PanaceaConfig",
    *,
    start: TensorBundle,
    rewards: Mapping[str, Reward] | None = None,
    held_out: Any = None,
    checkpoints: Checkpoints | None = None,
    progress: bool | None = None,
) -> tuple[TensorBundle, TrainingReport]:
    """Train U, V, σ and s from `start`; arguments and errors as for `Panacea.train`."""
    longest = min(options.max_length, model.context_length)
    examples = encode_examples(model.tokenizer, data, options.dimensions, options.objective, longest)
    with svd_layers(model, start, options.shape, seed=options.seed) as layers:
        if not options.train_scale:
            for layer in layers.modules.values():
                layer.s.requires_grad_(False)
        if options.objective == "dpo":
            examples = with_reference(model, layers, examples)
        student = Student(model.module, layers, options, mean_length(examples))
        evaluation = None  # held_out
        report = fit(
            model,
            student,
            [_dataset_item(item) for item in items(examples, options.seed)],
            options,
            progress=progress,
            collator=_collate,
            checkpoints=checkpoints,
            evaluation=evaluation,
            callbacks=[_step_announcer(student)],
        )
        return layers.tensors(), replace(report, tokens=student.tokens)


class Student(nn.Module):
    """The base with its layers, as the Trainer wants it: a batch of items in, a loss out."""

    def __init__(self, module: nn.Module, layers: Layers, options: "PanaceaConfig", scale: float) -> None:
        super().__init__()
        self.module = module
        self.tokens = 0
        self._layers, self._options = layers, options
        # DPO's beta belongs to sums of nats: only the likelihoods of SFT are scaled.
        self._scale = scale if options.objective == "sft" else 1.0
        self._step, self._part = 0, 0

    def begin(self, step: int) -> None:
        """An optimizer step begins; steps count from 0, also over an interruption."""
        self._step, self._part = step, 0

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, reference: Tensor
    ) -> dict[str, Tensor]:
        """Loss of one batch; rows are ordered by item, then dimension, then chosen before rejected."""
        options = self._options
        m, sides = len(options.dimensions), 2 if options.objective == "dpo" else 1
        n = len(input_ids) // (m * sides)
        preference, draw = self._draw(n)
        counted = _choose(preference, draw) if options.sampled_objective else preference > 0
        rows = counted.flatten().repeat_interleave(sides)
        width = int(attention_mask[rows].sum(1).max())
        self.tokens += int(attention_mask[rows].sum())
        of_row = preference.repeat_interleave(m * sides, dim=0)[rows]
        with self._layers.preference.at(of_row.to(input_ids.device)):
            batch = (part[rows, :width] for part in (input_ids, attention_mask, labels))
            found = log_likelihood(self.module, *batch)
        values = objective_of(found / self._scale, reference[rows] / self._scale, sides, options.beta)
        gain = self._gain(
            values.new_zeros(n, m).masked_scatter(counted.to(values.device), values), preference
        )
        loss = -gain.mean()
        if options.orthogonality_weight:
            loss = loss + options.orthogonality_weight * self._layers.penalty()
        return {"loss": loss}

    def _draw(self, n: int) -> tuple[Float[Tensor, "n m"], np.random.Generator]:
        """λ of each item of this batch, and the generator for what else is drawn."""
        options, m = self._options, len(self._options.dimensions)
        law = {"concentration": options.concentration, "vertex": options.vertex_probability}
        own = np.random.default_rng([options.seed, self._step, self._part, int(os.environ.get("RANK", 0))])
        self._part += 1
        if options.fixed_preference is not None:
            return torch.tensor(options.fixed_preference).expand(n, m), own
        if options.preference_sampling == "example":
            return sample(n, m, own, **law), own
        shared = np.random.default_rng([options.seed, self._step])
        return sample(1, m, shared, **law).expand(n, m), own

    def _gain(self, J: Float[Tensor, "n m"], preference: Float[Tensor, "n m"]) -> Float[Tensor, " n2"]:
        """The aggregated objective of each item, or of the batch where it has one λ."""
        options, weights = self._options, preference.to(J)
        if options.sampled_objective:
            return J.sum(-1)
        if options.preference_sampling == "batch":
            J, weights = J.mean(0, keepdim=True), weights[:1]
        ideal = None if options.ideal is None else J.new_tensor(options.ideal)
        return aggregate(J, weights, options.aggregation, ideal=ideal, smoothing=options.smoothing)


def _step_announcer(student: Student) -> Any:
    from transformers import TrainerCallback

    class Announcer(TrainerCallback):  # type: ignore[misc]  # transformers is loaded when first needed
        def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            student.begin(state.global_step)

    return Announcer()


def objective_of(
    found: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], sides: int, beta: float
) -> Float[Tensor, " examples"]:
    """J of each example from the log-likelihoods of its rows: one for SFT, chosen and rejected for DPO."""
    if sides == 1:
        return found
    # Chosen and rejected take turns.
    return direct_preference(found[::2], found[1::2], reference[::2], reference[1::2], beta)


def mean_length(examples: Mapping[str, Sequence[Example]]) -> float:
    """Mean number of reply tokens over all examples of all dimensions."""
    counts = [_reply_tokens(row) for found in examples.values() for each in found for row in each.rows]
    return float(np.mean(counts))


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel,
    layers: Layers,
    rows: Sequence[Row],
    preference: Float[Tensor, " m"] | None,
    *,
    batch: int = _BATCH,
) -> Float[Tensor, " rows"]:
    """Log-likelihood of the reply of each row under λ; None is the base model."""
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    found = torch.empty(len(rows))
    with layers.preference.at(None if preference is None else preference.to(model.device)):
        for first in range(0, len(order), batch):
            places = order[first : first + batch]
            encoded = collate([rows[place] for place in places], pad_token(model.tokenizer))
            parts = (encoded[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
            found[places] = log_likelihood(model.module, *parts).float().cpu()
    return found


def with_reference(
    model: LanguageModel, layers: Layers, examples: Mapping[str, Sequence[Example]]
) -> dict[str, list[Example]]:
    """The examples with the base model's log-likelihood of every row, computed once."""
    rows = [row for found in examples.values() for each in found for row in each.rows]
    values = iter(log_likelihoods(model, layers, rows, None).tolist())
    return {
        name: [replace(each, reference=tuple(next(values) for _ in each.rows)) for each in found]
        for name, found in examples.items()
    }


def _dataset_item(item: tuple[Example, ...]) -> dict[str, Any]:
    """An item as the Trainer's sampler wants it, which groups by the length of ``input_ids``."""
    longest = max((row["input_ids"] for example in item for row in example.rows), key=len)
    return {"input_ids": longest, "examples": item}


def _collate(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    examples: list[Example] = [example for item in batch for example in item["examples"]]
    rows = [row for example in examples for row in example.rows]
    reference = [value for each in examples for value in each.reference or [0.0] * len(each.rows)]
    return {**collate(rows, pad_id), "reference": torch.tensor(reference)}


def _choose(preference: Float[Tensor, "n m"], draw: np.random.Generator) -> Bool[Tensor, "n m"]:
    """One dimension an item, drawn with the probabilities λ."""
    edges = preference.double().cumsum(1)
    chosen = (torch.from_numpy(draw.random((len(preference), 1))) * edges[:, -1:] > edges).sum(1)
    return nn.functional.one_hot(chosen, preference.shape[1]).bool()


def _reply_tokens(row: Row) -> int:
    return sum(label != IGNORED for label in row["labels"])
