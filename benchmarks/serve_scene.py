"""The batch of the serving benchmark, and the same batch as each peer can express it.

A persona is a user adapter (rank 8), its group's adapter (rank 8) under a gate of its own, and a soft prefix
of 8 vectors. Peers take one adapter a row, so theirs is the concatenation, equal in every logit:

    B_u A_u + B_g diag(g) A_g = [B_u  B_g] [A_u; diag(g) A_g]            rank 16

| symbol   | field            | shape                                 |
|----------|------------------|---------------------------------------|
| A_u, B_u | `users[p]`       | per module [8, d_in], [d_out, 8]      |
| A_g, B_g | `groups[p % 4]`  | likewise                              |
| g        | `gates[p]`       | [8]                                   |
|          | `prefixes[p]`    | [8, d_model]                          |

Contenders without soft prefixes (the base model, and vLLM, whose adapters go with token ids here) get 8
more prompt tokens instead, so that all compute and attend over equally many entries.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from benchmarks.contenders import random_factors
from benchmarks.subjects import prompts
from persona_sdk.config import GenerationOptions
from persona_sdk.engine import Request
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, LowRankPatch, PlanPart, SoftPrefix
from persona_sdk.tensors import PREFIX, TensorBundle, digest, freeze, low_rank_bundle, low_rank_pairs

RANK = 8
GROUPS = 4
SOFT = 8
SCALE = 0.05  # of B: adapters that change the greedy tokens of most rows, so that agreement says something
_ENDLESS = 160  # tokens a row may generate; more than any cell asks for


@dataclass(frozen=True)
class Scene:
    """Rows of personas. Row i belongs to persona ``i % personas``."""

    model: LanguageModel
    tokens: Int[Tensor, "rows width"]
    users: tuple[TensorBundle, ...]
    groups: tuple[TensorBundle, ...]
    gates: Float[Tensor, "personas rank"]
    prefixes: tuple[TensorBundle, ...]
    digests: tuple[str, ...]

    @classmethod
    def draw(cls, model: LanguageModel, *, rows: int, personas: int, width: int, seed: int = 0) -> "Scene":
        """A random scene; its prompts have `width` tokens after the soft prefix."""
        shapes = model.linear_shapes()
        draw = torch.Generator().manual_seed(seed)
        seeds = range(1000 * seed, 1000 * seed + personas + GROUPS)
        drawn = [random_factors(shapes, rank=RANK, seed=one, scale=SCALE) for one in seeds]
        users, groups = tuple(drawn[:personas]), tuple(drawn[personas:])
        gates = 0.5 + torch.rand(personas, RANK, generator=draw)
        size = float(model.module.get_input_embeddings().weight.float().std())
        prefixes = tuple(
            freeze({PREFIX: torch.randn(SOFT, model.d_model, generator=draw) * size}) for _ in range(personas)
        )
        tokens = prompts(model, rows=rows, width=SOFT + width, seed=seed)
        digests = tuple(digest(bundle) for bundle in (*users, *groups, *prefixes))
        return cls(model, tokens, users, groups, gates, prefixes, digests)

    @property
    def personas(self) -> list[int]:
        """The persona of each row."""
        return [row % len(self.users) for row in range(len(self.tokens))]

    def with_personas(self, count: int) -> "Scene":
        """The same rows shared by the first `count` personas."""
        kept, groups = slice(0, count), slice(len(self.users), len(self.users) + GROUPS)
        prefixes = slice(groups.stop, groups.stop + count)
        return Scene(
            self.model,
            self.tokens,
            self.users[kept],
            self.groups,
            self.gates[kept],
            self.prefixes[kept],
            (*self.digests[kept], *self.digests[groups], *self.digests[prefixes]),
        )

    def with_rows(self, rows: int) -> "Scene":
        """The first `rows` rows of the same personas."""
        return Scene(
            self.model, self.tokens[:rows], self.users, self.groups, self.gates, self.prefixes, self.digests
        )

    @property
    def vectors(self) -> Float[Tensor, "rows length d_model"]:
        """The soft prefix of each row."""
        return torch.stack([self.prefixes[persona][PREFIX] for persona in self.personas]).to(self.model.dtype)

    @property
    def after_prefix(self) -> Int[Tensor, "rows width"]:
        """The prompts of contenders that put the soft prefix in front of them."""
        return self.tokens[:, SOFT:]

    def requests(self, *, prefix: bool = True) -> list[Request]:
        """The batch for our engine; without `prefix`, all prompt tokens instead of it."""
        tokens = self.after_prefix if prefix else self.tokens
        return [
            self._request(row, self._parts(persona, prefix=prefix), persona)
            for row, persona in zip(tokens.tolist(), self.personas, strict=True)
        ]

    def base_requests(self) -> list[Request]:
        """The batch without anything but its tokens."""
        return [self._request(row, (), 0) for row in self.tokens.tolist()]

    def _request(self, prompt: Sequence[int], parts: tuple[PlanPart, ...], persona: int) -> Request:
        options = GenerationOptions(max_new_tokens=_ENDLESS, ignore_eos=True)
        plan = CompositionPlan(self.model.fingerprint, parts, options)
        group = persona % GROUPS
        used = (self.users[persona], self.groups[group], self.prefixes[persona])
        tensors = dict(zip(self._named(persona), used, strict=True))
        return Request(prompt=tuple(prompt), plan=plan, tensors=tensors, keep_prefix=False)

    def _named(self, persona: int) -> tuple[str, str, str]:
        count, group = len(self.users), persona % GROUPS
        return self.digests[persona], self.digests[count + group], self.digests[count + GROUPS + persona]

    def _parts(self, persona: int, *, prefix: bool) -> tuple[PlanPart, ...]:
        user, group, vectors = self._named(persona)
        gate = tuple(self.gates[persona].tolist())
        parts: list[PlanPart] = [
            LowRankPatch(factors=user, rank=RANK, gate=(1.0,) * RANK, origin=f"user {persona}"),
            LowRankPatch(factors=group, rank=RANK, gate=gate, origin=f"group {persona % GROUPS}"),
        ]
        if prefix:
            parts.append(SoftPrefix(vectors=vectors, length=SOFT, origin=f"user {persona}"))
        return tuple(parts)

    def concatenated(self) -> list[TensorBundle]:
        """Each persona as one adapter of rank 16."""
        return [
            concatenate(user, self.groups[persona % GROUPS], self.gates[persona])
            for persona, user in enumerate(self.users)
        ]


def concatenate(user: TensorBundle, group: TensorBundle, gate: Float[Tensor, " rank"]) -> TensorBundle:
    """A user's adapter and a gated group's as one; both patch the same modules."""
    pairs = zip(low_rank_pairs(user), low_rank_pairs(group), strict=True)
    return low_rank_bundle(
        {
            path: (torch.cat([A_u, gate[:, None] * A_g]), torch.cat([B_u, B_g], dim=1))
            for (path, A_u, B_u), (_, A_g, B_g) in pairs
        }
    )
