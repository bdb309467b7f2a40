"""SFT and DPO under a preference vector: the objectives that are likelihoods of given replies.

    maximise  E_λ [ g_λ(J_1(θ, λ), ..., J_m(θ, λ)) ]      g: `aggregation`, J: `objectives`

A batch holds items of one example a dimension. Examples whose weight is 0 are not run: at a vertex that saves
all but one dimension, and changes no gradient. With ``sampled_objective`` an item runs one dimension i ~ λ,
whose J is an unbiased estimate of the linear aggregation. SFT's likelihoods are divided by the mean length of
all replies: one constant, the same for all dimensions, so that the loss is about one nat a token.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from persona_sdk.adapters.aggregation import aggregate
from persona_sdk.adapters.objectives import direct_preference, log_likelihood, log_likelihoods
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preference_data import Example, items
from persona_sdk.adapters.preference_student import Student
from persona_sdk.adapters.svd_layers import Layers
from persona_sdk.adapters.training_data import IGNORED, collate
from persona_sdk.models import LanguageModel


class LikelihoodStudent(Student):
    """Learns from batches of items.

    Args:
        module: the base's module, with SVD-LoRA layers in it.
        layers: those layers.
        options: how to train.
        scale: what SFT's likelihoods are divided by.
    """

    def __init__(self, module: nn.Module, layers: Layers, options: PanaceaConfig, scale: float) -> None:
        super().__init__(module, layers, options)
        # DPO's beta belongs to sums of nats: only the likelihoods of SFT are scaled.
        self._scale = scale if options.objective == "sft" else 1.0

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor, reference: Tensor
    ) -> dict[str, Tensor]:
        """Loss of one batch; rows are ordered by item, then dimension, then chosen before rejected."""
        options = self.options
        m, sides = len(options.dimensions), 2 if options.objective == "dpo" else 1
        n = len(input_ids) // (m * sides)
        preference, draw = self.draw(n)
        counted = choose(preference, draw) if options.sampled_objective else preference > 0
        rows = counted.flatten().repeat_interleave(sides)
        width = int(attention_mask[rows].sum(1).max())
        self.tokens += int(attention_mask[rows].sum())
        if options.preference_sampling == "batch":
            at = preference[0]
        else:
            at = preference.repeat_interleave(m * sides, dim=0)[rows]
        with self.layers.preference.at(at.to(input_ids.device)):
            batch = (part[rows, :width] for part in (input_ids, attention_mask, labels))
            found = log_likelihood(self.module, *batch)
        values = objective_of(found / self._scale, reference[rows], sides, options.beta)
        J = values.new_zeros(n, m).masked_scatter(counted.to(values.device), values)
        return {"loss": self.penalty() - self._gain(J, preference).mean()}

    def _gain(self, J: Float[Tensor, "n m"], preference: Float[Tensor, "n m"]) -> Float[Tensor, " n2"]:
        """The aggregated objective of each item, or of the batch where it has one λ."""
        options, weights = self.options, preference.to(J)
        if options.sampled_objective:
            return J.sum(-1)
        if options.preference_sampling == "batch":
            J, weights = J.mean(0, keepdim=True), weights[:1]
        ideal = None if options.ideal is None else J.new_tensor(options.ideal) / self._scale
        return aggregate(J, weights, options.aggregation, ideal=ideal, smoothing=options.smoothing)


def dataset(examples: Mapping[str, Sequence[Example]], seed: int) -> list[dict[str, Any]]:
    """Items as the Trainer's sampler wants them, which groups by the length of ``input_ids``."""
    found = []
    for item in items(examples, seed):
        longest = max((row["input_ids"] for example in item for row in example.rows), key=len)
        found.append({"input_ids": longest, "examples": item})
    return found


def collate_items(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Tensor]:
    """The rows of all items, in order, with the base model's likelihood of each."""
    examples: list[Example] = [example for item in batch for example in item["examples"]]
    rows = [row for example in examples for row in example.rows]
    reference = [value for each in examples for value in each.reference or [0.0] * len(each.rows)]
    return {**collate(rows, pad_id), "reference": torch.tensor(reference)}


def objective_of(
    found: Float[Tensor, " rows"], reference: Float[Tensor, " rows"], sides: int, beta: float
) -> Float[Tensor, " examples"]:
    """J of each example from the log-likelihoods of its rows: one for SFT, chosen and rejected for DPO."""
    if sides == 1:
        return found
    # Chosen and rejected take turns.
    return direct_preference(found[::2], found[1::2], reference[::2], reference[1::2], beta)


def choose(preference: Float[Tensor, "n m"], draw: np.random.Generator) -> Bool[Tensor, "n m"]:
    """One dimension an item, drawn with the probabilities λ."""
    edges = preference.double().cumsum(1)
    chosen = (torch.from_numpy(draw.random((len(preference), 1))) * edges[:, -1:] > edges).sum(1)
    return nn.functional.one_hot(chosen, preference.shape[1]).bool()


def mean_length(examples: Mapping[str, Sequence[Example]]) -> float:
    """Mean number of reply tokens over all examples of all dimensions."""
    rows = [row for found in examples.values() for each in found for row in each.rows]
    return float(np.mean([sum(label != IGNORED for label in row["labels"]) for row in rows]))


def with_reference(
    model: LanguageModel, layers: Layers, examples: Mapping[str, Sequence[Example]], batch: int
) -> dict[str, list[Example]]:
    """The examples with the base model's log-likelihood of every row, computed once."""
    rows = [row for found in examples.values() for each in found for row in each.rows]
    with layers.preference.at(None):
        values = iter(log_likelihoods(model, rows, batch).tolist())
    return {
        name: [replace(each, reference=tuple(next(values) for _ in each.rows)) for each in found]
        for name, found in examples.items()
    }


def objectives(
    model: LanguageModel,
    layers: Layers,
    examples: Mapping[str, Sequence[Example]],
    preference: Float[Tensor, " m"] | None,
    options: PanaceaConfig,
) -> list[Tensor]:
    """J of every example under λ, a tensor a dimension; None is the base model."""
    sides = len(next(iter(examples.values()))[0].rows)
    rows = [row for found in examples.values() for each in found for row in each.rows]
    known = [value for found in examples.values() for each in found for value in each.reference]
    reference = torch.tensor(known or [0.0] * len(rows))  # SFT has none
    with layers.preference.at(None if preference is None else preference.to(model.device)):
        found = log_likelihoods(model, rows, options.per_device_eval_batch_size)
    values = objective_of(found, reference, sides, options.beta)
    return list(torch.split(values, [len(found) for found in examples.values()]))
