"""Random patches for a model, and the independent reference: a copy of it with the patches merged in."""

import copy

import torch
from transformers.pytorch_utils import Conv1D

from persona_sdk.engine import Request
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, LowRankPatch, PlanPart, SoftPrefix
from persona_sdk.tensors import PREFIX, TensorBundle, digest, freeze, low_rank_bundle, low_rank_pairs


def random_factors(model: LanguageModel, seed: int, rank: int = 4, scale: float = 0.3) -> TensorBundle:
    generator = torch.Generator().manual_seed(seed)
    return low_rank_bundle(
        {
            path: (
                scale * torch.randn(rank, d_in, generator=generator) / d_in**0.5,
                scale * torch.randn(d_out, rank, generator=generator),
            )
            for path, (d_in, d_out) in model.linear_shapes().items()
        }
    )


def patch(factors: TensorBundle, gate: tuple[float, ...] | None = None) -> LowRankPatch:
    rank = next(low_rank_pairs(factors))[1].shape[0]
    mark = digest(factors)
    return LowRankPatch(factors=mark, rank=rank, gate=gate or (1.0,) * rank, origin=mark[:6])


def soft_prefix(model: LanguageModel, seed: int, length: int = 3) -> tuple[SoftPrefix, TensorBundle]:
    generator = torch.Generator().manual_seed(seed)
    bundle = freeze({PREFIX: torch.randn(length, model.d_model, generator=generator)})
    return SoftPrefix(vectors=digest(bundle), length=length, origin=f"soft {seed}"), bundle


def request(
    model: LanguageModel,
    prompt: tuple[int, ...],
    parts: tuple[PlanPart, ...] = (),
    bundles: tuple[TensorBundle, ...] = (),
    **options: object,
) -> Request:
    seed = int(options.pop("seed", 0))  # type: ignore[call-overload]
    plan = CompositionPlan(
        model.fingerprint,
        parts,
        CompositionPlan("").options.model_copy(update={"max_new_tokens": 12, **options}),
    )
    return Request(prompt=prompt, plan=plan, tensors={digest(b): b for b in bundles}, seed=seed)


def merged(model: LanguageModel, patches: list[tuple[TensorBundle, tuple[float, ...]]]) -> LanguageModel:
    """A copy of the model whose dense weights are W + sum of B diag(gate) A."""
    module = copy.deepcopy(model.module)
    for submodule in module.modules():
        submodule._forward_hooks.clear()
    for factors, gate in patches:
        for path, A, B in low_rank_pairs(factors):
            linear = module.get_submodule(path)
            delta = (B.double() @ torch.diag(torch.tensor(gate).double()) @ A.double()).float()
            linear.weight.data += delta.T if isinstance(linear, Conv1D) else delta
    return LanguageModel.from_module("merged", module, model.tokenizer)
