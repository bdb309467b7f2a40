"""The loop: one batch of requests with different plans, one forward pass a step.

    requests ──admit──► row buffers, prompt layout, token chooser ──prefill──► step, step, ... ──► tokens

Every row carries its own plan. All checks run before a tensor moves. The model is locked for the length of
one forward pass, never for a whole generation, so several streams interleave safely.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.hooks import LowRankHooks
from persona_sdk.engine.prompts import PromptBatch, lay_out, positions_of, soft_vectors
from persona_sdk.engine.rows import LowRankRows, check_patch
from persona_sdk.engine.sampling import TokenChooser
from persona_sdk.errors import (
    CompositionError,
    EngineError,
    IncompatibleAdapterError,
    InvalidInputError,
    PromptTooLongError,
)
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, DecodingRule, LowRankPatch, SoftPrefix
from persona_sdk.tensors import Digest, TensorBundle


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of a batch.

    Args:
        prompt: token ids.
        plan: what the row is composed of.
        tensors: the bundles the plan names, by digest.
        seed: of the row's sampling stream; unused by greedy rows.
        should_stop: asked after every token with all tokens so far; true ends the row.
    """

    prompt: tuple[int, ...]
    plan: CompositionPlan
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
    seed: int = 0
    should_stop: Callable[[Sequence[int]], bool] | None = None


@dataclass(frozen=True)
class Step:
    """One new token of one row; ``finish_reason`` is set on the row's last one."""

    row: int
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Completion:
    """All tokens of one row, the end token included, and why it ended: ``"stop"`` or ``"length"``."""

    tokens: tuple[int, ...]
    finish_reason: str


class Engine:
    """Executes composition plans on one base model.

    Args:
        model: the base model. Its linears get a hook each; `close` takes them off.
    """

    capabilities: ClassVar[frozenset[str]] = frozenset(
        {"low_rank", "soft_prefix", "passages", "decoding_rule"}
    )

    def __init__(self, model: LanguageModel) -> None:
        self.model = model
        self._shapes = model.linear_shapes()
        with model.lock:  # not while a training run has its own layers in the module tree
            self._hooks = LowRankHooks(model.linears())
        self._closed = False
        self._vocab = int(model.module.config.get_text_config().vocab_size)
        self._end_tokens = _end_tokens(model)
        self._pad = next(
            (int(t) for t in (model.tokenizer.pad_token_id, *sorted(self._end_tokens)) if t is not None), 0
        )

    def close(self) -> None:
        """Take the hooks off the base model. Streams that are still open fail at their next token."""
        with self.model.lock:
            self._closed = True
            self._hooks.remove()

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Run all requests as one batch and return their completions in order.

        Raises:
            CompositionError: a plan holds a part this engine cannot execute, or names missing tensors.
            IncompatibleAdapterError: a plan or its tensors belong to another base model.
            PromptTooLongError: a prompt leaves no room for the requested tokens.
        """
        tokens: list[list[int]] = [[] for _ in requests]
        reasons = ["length"] * len(requests)
        for step in self.stream(requests):
            tokens[step.row].append(step.token)
            reasons[step.row] = step.finish_reason or reasons[step.row]
        return [Completion(tuple(row), reason) for row, reason in zip(tokens, reasons, strict=True)]

    def stream(self, requests: Sequence[Request]) -> Iterator[Step]:
        """Yield every token as it is made, rows interleaved step by step. Raises like `generate`."""
        for request in requests:
            self.check(request)
        return self._run(requests) if requests else iter(())

    def logits(self, requests: Sequence[Request]) -> list[Float[Tensor, "_ vocab"]]:
        """Logits at every prompt position of each request, from one mixed batch."""
        for request in requests:
            self.check(request)
        if not requests:
            return []
        with torch.inference_mode():
            rows, batch = self._admit(requests)
            with self._forward(rows):
                out = self.model.module(**batch.inputs(), use_cache=False).logits
        return [out[i, out.shape[1] - len(request.prompt) :] for i, request in enumerate(requests)]

    def check(self, request: Request, *, room: bool = True) -> None:
        """Raise unless this engine can execute the request. Moves no tensor.

        With ``room=False`` the length of the prompt is left out, to check a plan by itself.
        """
        plan, prompt = request.plan, request.prompt
        if plan.base != self.model.fingerprint:
            raise IncompatibleAdapterError(
                f"The plan is for base model {plan.base[:12]}, this one is {self.model.fingerprint[:12]}.",
                hint="Compose the plan again with the model that is loaded.",
            )
        for part in plan.parts:
            if part.kind not in self.capabilities:
                raise CompositionError(
                    f"This engine cannot execute a {part.kind!r} part ({part.origin!r}).",
                    hint=f"It executes: {', '.join(sorted(self.capabilities))}.",
                )
            named = getattr(part, "factors", None) or getattr(part, "vectors", None)
            if named is not None and named not in request.tensors:
                raise CompositionError(
                    f"The request does not carry the tensors {named[:12]} of {part.origin!r}.",
                    hint="Pass the contributions' tensors along with the plan.",
                )
        for patch in plan.low_rank:
            check_patch(patch, request.tensors[patch.factors], self._shapes)
        soft_vectors(plan.of(SoftPrefix), request.tensors, self.model.d_model)
        if not 0 <= request.seed < 2**63:
            raise InvalidInputError(f"The seed is {request.seed}.", hint="Expected an integer in [0, 2**63).")
        vocab = self._vocab
        rules: tuple[DecodingRule, ...] = plan.of(DecodingRule)
        stray = [t for t in (*prompt, *(t for rule in rules for t, _ in rule.bias)) if not 0 <= t < vocab]
        if not prompt or stray:
            raise InvalidInputError(
                f"Token ids {stray[:3]} are outside the vocabulary."
                if stray
                else "The prompt has no tokens.",
                hint=f"Expected at least one id in [0, {vocab}).",
            )
        prefix = sum(part.length for part in plan.of(SoftPrefix))
        needed = prefix + len(prompt) + plan.options.max_new_tokens
        if room and needed > self.model.context_length:
            raise PromptTooLongError(
                f"{prefix + len(prompt)} prompt and {plan.options.max_new_tokens} new tokens do not fit the "
                f"context of {self.model.context_length}.",
                hint="Shorten the prompt, drop old turns or ask for fewer new tokens.",
                needed=needed,
            )

    def _admit(self, requests: Sequence[Request]) -> tuple[LowRankRows | None, PromptBatch]:
        device = self.model.device
        embed = self.model.module.get_input_embeddings()
        soft = [soft_vectors(r.plan.of(SoftPrefix), r.tensors, self.model.d_model) for r in requests]
        batch = lay_out([r.prompt for r in requests], soft, embed=embed, pad=self._pad, device=device)
        patches: list[tuple[LowRankPatch, ...]] = [r.plan.low_rank for r in requests]
        rank = max(sum(patch.rank for patch in row) for row in patches)
        if rank == 0:
            return None, batch
        # On CPUs the branch stays in float32: batched bfloat16 products are slower there, not faster.
        dtype = torch.float32 if device.type == "cpu" else self.model.module.dtype
        rows = LowRankRows(self._shapes, len(requests), rank, device=device, dtype=dtype)
        for index, request in enumerate(requests):
            rows.admit(index, patches[index], request.tensors)
        return rows, batch

    @contextmanager
    def _forward(self, rows: LowRankRows | None) -> Iterator[None]:
        with self.model.lock, self._hooks.bound(rows):
            if self._closed:
                raise EngineError("The engine was closed.", hint="Open the model again.")
            yield

    def _run(self, requests: Sequence[Request]) -> Iterator[Step]:
        with torch.inference_mode():
            rows, batch = self._admit(requests)
            chooser = TokenChooser(
                [r.plan.options for r in requests],
                [r.plan.of(DecodingRule) for r in requests],
                [r.seed for r in requests],
                [r.prompt for r in requests],
                vocab=self._vocab,
                device=self.model.device,
            )
        live = set(range(len(requests)))
        emitted: list[list[int]] = [[] for _ in requests]
        inputs, mask, cache = batch.inputs(), batch.mask, None
        step = 0
        while live:
            # Entered anew each step: a generator must not leave inference mode on while it is suspended.
            with torch.inference_mode():
                with self._forward(rows):
                    out = self.model.module(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
                chosen = chooser.choose(out.logits[:, -1], step)
                cache = out.past_key_values
                mask = torch.cat([mask, mask.new_ones(len(requests), 1)], dim=1)
                inputs = {
                    "input_ids": chosen[:, None],
                    "attention_mask": mask,
                    "position_ids": positions_of(mask)[:, -1:],
                }
            for row, token in enumerate(chosen.tolist()):
                if row in live:
                    emitted[row].append(token)
                    reason = self._finish_reason(requests[row], emitted[row])
                    if reason:
                        live.discard(row)
                    yield Step(row, token, reason)
            step += 1

    def _finish_reason(self, request: Request, tokens: list[int]) -> str | None:
        options = request.plan.options
        ended = tokens[-1] in self._end_tokens and not options.ignore_eos
        if ended or (request.should_stop is not None and request.should_stop(tokens)):
            return "stop"
        return "length" if len(tokens) >= options.max_new_tokens else None


def _end_tokens(model: LanguageModel) -> frozenset[int]:
    """Every id that ends a reply, by the generation config, else by config and tokenizer."""
    generation = getattr(model.module, "generation_config", None)
    for owner in (generation, model.module.config, model.tokenizer):
        ids = getattr(owner, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list | tuple) else [ids])
    return frozenset()
