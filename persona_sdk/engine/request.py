"""What goes into the engine and what comes out: pure data."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from persona_sdk.errors import PersonaError
from persona_sdk.plan import CompositionPlan
from persona_sdk.tensors import Digest, TensorBundle


@dataclass(frozen=True, kw_only=True)
class Request:
    """One row of a batch.

    Args:
        prompt: token ids.
        plan: what the row is composed of.
        tensors: the bundles the plan names, by digest. The mapping may be lazy: a low-rank bundle that is
            in a device slot already is not asked for.
        seed: of the row's sampling stream; unused by greedy rows.
        should_stop: asked after every token with all tokens so far; true ends the row.
        scope: opaque label of whom the request is for. Admission is fair between scopes, and `forget`
            drops what was kept for one. It is no part of any key.
        keep_prefix: look the prompt up among the kept prefixes, and keep its keys and values.
        mark: of `Engine.mark`, taken before anything was read that the prompt or the plan was made from. If
            something is forgotten after it, nothing computed from this request is kept.
        blocks: which of the prompt's tokens are memories that other prompts hold too, elsewhere: ascending
            spans ``(start, stop)``, the last one followed by at least one token. Used only with
            `EngineOptions.block_reuse` and `keep_prefix`, and not with `export`, which is exact.
        export: hand out the prompt's keys and values with the completion.
    """

    prompt: tuple[int, ...]
    plan: CompositionPlan
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
    seed: int = 0
    should_stop: Callable[[Sequence[int]], bool] | None = None
    scope: tuple[str, ...] = ()
    keep_prefix: bool = True
    mark: int | None = None
    blocks: tuple[tuple[int, int], ...] = ()
    export: bool = False


@dataclass(frozen=True)
class Step:
    """One new token of one row; ``finish_reason`` is set on the row's last one."""

    row: int
    token: int
    finish_reason: str | None


@dataclass(frozen=True)
class Steer:
    """Gates that were changed while a row was generating: they hold from token number `token` on."""

    token: int
    gates: Mapping[int, tuple[float, ...]]


@dataclass(frozen=True)
class Completion:
    """All tokens of one row, the end token included, and why it ended.

    ``finish_reason`` is ``"stop"``, ``"length"``, ``"cancelled"`` or ``"error"`` (then `error` says which).
    ``cached_tokens`` of the prompt were taken from kept keys and values. ``reused_tokens`` have
    keys and values that lack the blocks before them: with any, the tokens are those of an approximation
    (`EngineOptions.block_reuse`). ``exported`` holds those of the
    whole prompt, soft prefix first, if the request asked: ``{"keys", "values"}``, each
    ``[layers, entries, kv_heads, dim]``.
    """

    tokens: tuple[int, ...]
    finish_reason: str
    cached_tokens: int = 0
    steers: tuple[Steer, ...] = ()
    error: PersonaError | None = None
    exported: TensorBundle | None = field(default=None, repr=False)
    reused_tokens: int = 0
