"""The narrow waist: what one request uses, as pure, hashable, JSON-able data.

Every adapter family and every kind of memory reduces to the plan parts below. The engine knows only
them; it knows no users, no text and no store. Tensors appear as content digests (`persona_sdk.tensors`).

    part           what the engine does with it                                        tensors
    LowRankPatch   y += B (gate * (A x)) on every module the factors name              A, B per module
    SoftPrefix     puts vectors in front of the prompt's token embeddings              [length, d_model]
    KVPrefix       puts precomputed keys and values in front of the row's cache        keys, values
    Passages       nothing: the text is already in the prompt; kept to explain         none
    DecodingRule   adds to the logits of single tokens before sampling                 none
    Scorer         ranks several candidates of one request                             family's own

`COMBINATIONS` is the table of what may stand together. It is checked when a plan is built, before any
tensor moves. ``plan_id`` is the SHA-256 of the canonical JSON, so equal plans have equal ids.
"""

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Any, ClassVar, TypeAlias

from persona_sdk.config import GenerationOptions
from persona_sdk.errors import CompositionError
from persona_sdk.tensors import Digest, TensorBundle


def _require(condition: bool, message: str, hint: str = "") -> None:
    if not condition:
        raise CompositionError(message, hint=hint)


def _require_digest(value: str, what: str) -> None:
    _require(
        len(value) == 64 and set(value) <= set("0123456789abcdef"),
        f"{what} is {value!r}.",
        "Expected the 64 hex digits of a content digest (persona_sdk.tensors.digest).",
    )


@dataclass(frozen=True, kw_only=True)
class LowRankPatch:
    """A low-rank update of the modules its factors name, gated per rank direction.

    The gate is the place of everything that changes per request without touching a weight: strength,
    on/off, a preference vector. It is shared by all modules; ``len(gate) == rank``.
    """

    kind: ClassVar[str] = "low_rank"
    factors: Digest
    rank: int
    gate: tuple[float, ...]
    origin: str

    def __post_init__(self) -> None:
        _require_digest(self.factors, f"Factors of {self.origin!r}")
        # One form for equal gates: floats, no negative zero. Equal plans must have equal ids.
        object.__setattr__(self, "gate", tuple(float(value) + 0.0 for value in self.gate))
        _require(
            self.rank >= 1 and len(self.gate) == self.rank,
            f"{self.origin!r} has rank {self.rank} and a gate of length {len(self.gate)}.",
            "The gate holds one number per rank direction.",
        )
        _require(all(map(math.isfinite, self.gate)), f"The gate of {self.origin!r} holds NaN or infinity.")


@dataclass(frozen=True, kw_only=True)
class SoftPrefix:
    """Learned vectors in front of the prompt, in the base model's embedding space."""

    kind: ClassVar[str] = "soft_prefix"
    vectors: Digest
    length: int
    origin: str

    def __post_init__(self) -> None:
        _require_digest(self.vectors, f"Vectors of {self.origin!r}")
        _require(
            self.length >= 1, f"Soft prefix {self.origin!r} has length {self.length}; expected at least 1."
        )


@dataclass(frozen=True, kw_only=True)
class KVPrefix:
    """Precomputed keys and values of `length` tokens; valid only under the patches they were computed with.

    ``cache`` names a bundle of two tensors, ``"keys"`` and ``"values"``, each ``[layers, length, kv_heads,
    head_dim]``, keys after their rotary embedding at positions 0 to length - 1. ``composition`` is the
    `composition_key` of the plan they were computed under; it must be that of the rest of this plan.
    """

    kind: ClassVar[str] = "kv_prefix"
    cache: Digest
    length: int
    composition: Digest
    origin: str

    def __post_init__(self) -> None:
        _require_digest(self.cache, f"Cache of {self.origin!r}")
        _require_digest(self.composition, f"Composition of {self.origin!r}")
        _require(
            self.length >= 1, f"KV prefix {self.origin!r} has length {self.length}; expected at least 1."
        )


@dataclass(frozen=True, kw_only=True)
class PassageRef:
    """One retrieved text: which cube, whose, how near, and the hash of what it said."""

    cube_id: str
    owner: str
    score: float
    text_sha256: str


@dataclass(frozen=True, kw_only=True)
class Passages:
    """The retrieved texts that were written into the prompt, in that order."""

    kind: ClassVar[str] = "passages"
    items: tuple[PassageRef, ...]
    origin: str = "recall"


@dataclass(frozen=True, kw_only=True)
class DecodingRule:
    """Additive logit bias on single tokens; ``-inf`` bans a token."""

    kind: ClassVar[str] = "decoding_rule"
    bias: tuple[tuple[int, float], ...]
    origin: str

    def __post_init__(self) -> None:
        bad = [
            (token, value)
            for token, value in self.bias
            if token < 0 or math.isnan(value) or value == math.inf
        ]
        _require(
            not bad,
            f"Decoding rule {self.origin!r} has {bad[:3]}.",
            "Expected token ids and finite biases or -inf.",
        )


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """Ranks ``candidates`` completions of one request; `module` names the family's scoring weights."""

    kind: ClassVar[str] = "scorer"
    module: Digest
    candidates: int
    origin: str

    def __post_init__(self) -> None:
        _require_digest(self.module, f"Module of {self.origin!r}")
        _require(
            self.candidates >= 2,
            f"Scorer {self.origin!r} ranks {self.candidates} candidates; expected at least 2.",
        )


PlanPart: TypeAlias = LowRankPatch | SoftPrefix | KVPrefix | Passages | DecodingRule | Scorer

PART_TYPES: Mapping[str, type] = MappingProxyType(
    {cls.kind: cls for cls in (LowRankPatch, SoftPrefix, KVPrefix, Passages, DecodingRule, Scorer)}
)


@dataclass(frozen=True)
class Rule:
    """How often a kind may occur in one plan, and which kinds it excludes, with the reason."""

    at_most: int
    excludes: Mapping[str, str] = field(default_factory=dict)


COMBINATIONS: Mapping[str, Rule] = MappingProxyType(
    {
        "low_rank": Rule(at_most=16),
        "soft_prefix": Rule(at_most=8),
        "kv_prefix": Rule(
            at_most=1,
            excludes={"soft_prefix": "a KV prefix was computed without the soft vectors in front of it"},
        ),
        "passages": Rule(at_most=1),
        "decoding_rule": Rule(at_most=8),
        "scorer": Rule(at_most=1),
    }
)


def check_combination(parts: tuple[PlanPart, ...]) -> None:
    """Raise `CompositionError` unless `COMBINATIONS` allows these parts together."""
    counts = Counter(part.kind for part in parts)
    for kind, count in counts.items():
        rule = COMBINATIONS[kind]
        _require(
            count <= rule.at_most,
            f"The plan has {count} parts of kind {kind!r}; at most {rule.at_most} are allowed.",
            "Merge some first (persona_sdk.adapters.lowrank.concatenate) or detach them.",
        )
        for other, reason in rule.excludes.items():
            _require(
                other not in counts, f"{kind!r} cannot stand beside {other!r}: {reason}.", "Use one of them."
            )


def composition_key(base: str, parts: Iterable[PlanPart]) -> Digest:
    """SHA-256 (hex) of all that decides a token's keys and values besides the tokens up to it.

    That is the base model, every low-rank patch with its gate, in order, and what stands in front of the
    prompt. Parts that only choose among tokens, and options, do not enter.
    """
    used = [
        [part.kind, part.factors, [value.hex() for value in part.gate]]
        if isinstance(part, LowRankPatch)
        else [part.kind, part.vectors, part.length]
        if isinstance(part, SoftPrefix)
        else [part.kind, part.cache, part.length]
        for part in parts
        if isinstance(part, LowRankPatch | SoftPrefix | KVPrefix)
    ]
    return hashlib.sha256(json.dumps([1, base, used]).encode()).hexdigest()


def _check_kv_prefix(base: str, parts: tuple[PlanPart, ...]) -> None:
    """Raise `CompositionError` for keys and values that were computed under something else."""
    rest = [part for part in parts if not isinstance(part, KVPrefix)]
    for part in parts:
        if isinstance(part, KVPrefix):
            expected = composition_key(base, rest)
            _require(
                part.composition == expected,
                f"KV prefix {part.origin!r} was computed under other patches: its composition is "
                f"{part.composition[:12]}, that of the plan {expected[:12]}.",
                "Compute it again with the adapters and gates in use now, or leave it out.",
            )


@dataclass(frozen=True)
class CompositionPlan:
    """Everything one request uses. Order of parts matters: prefixes are laid out in that order.

    Args:
        base: fingerprint of the base model the parts were made for.
        parts: the plan parts.
        options: how tokens are chosen. The seed is not part of the plan.
    """

    base: str
    parts: tuple[PlanPart, ...] = ()
    options: GenerationOptions = field(default_factory=GenerationOptions)

    def __post_init__(self) -> None:
        object.__setattr__(self, "parts", tuple(self.parts))
        _require(isinstance(self.base, str), f"The base is {self.base!r}.", "Expected a fingerprint.")
        check_combination(self.parts)
        _check_kv_prefix(self.base, self.parts)

    def of(self, part_type: type) -> tuple[Any, ...]:
        """The parts of one type, in order."""
        return tuple(part for part in self.parts if isinstance(part, part_type))

    @property
    def low_rank(self) -> tuple[LowRankPatch, ...]:
        """The low-rank patches, in order."""
        return self.of(LowRankPatch)

    def to_json(self) -> str:
        """Canonical JSON: sorted keys, no blanks. `from_json` is its inverse."""
        parts = [{"kind": part.kind, **asdict(part)} for part in self.parts]
        for part in parts:  # JSON has no infinity
            if "bias" in part:
                part["bias"] = [
                    (token, "-inf" if value == -math.inf else value) for token, value in part["bias"]
                ]
        data = {"base": self.base, "parts": parts, "options": self.options.model_dump()}
        return json.dumps(data, sort_keys=True, separators=(",", ":"), allow_nan=False)

    @classmethod
    def from_json(cls, text: str) -> "CompositionPlan":
        """Rebuild a plan; raises `CompositionError` on anything that is not one."""
        try:
            data = json.loads(text)
            parts = tuple(_part_from_json(part) for part in data["parts"])
            options = GenerationOptions.parse(
                {**data["options"], "stop_strings": tuple(data["options"].get("stop_strings", ()))}
            )
            return cls(base=data["base"], parts=parts, options=options)
        except (KeyError, TypeError, ValueError, ArithmeticError, AttributeError) as error:
            if isinstance(error, CompositionError):
                raise
            raise CompositionError(
                f"Not a plan: {error}.", hint="Expected the output of to_json()."
            ) from error

    @cached_property
    def plan_id(self) -> str:
        """SHA-256 (hex) of the canonical JSON."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


def _part_from_json(data: dict[str, Any]) -> PlanPart:
    fields = dict(data)
    part_type = PART_TYPES[fields.pop("kind")]
    if "gate" in fields:
        fields["gate"] = tuple(fields["gate"])
    if "bias" in fields:
        fields["bias"] = tuple((int(token), float(value)) for token, value in fields["bias"])
    if "items" in fields:
        fields["items"] = tuple(PassageRef(**item) for item in fields["items"])
    for name in ("length", "rank", "candidates"):
        if not isinstance(fields.get(name, 0), int):
            raise TypeError(f"{name} is {fields[name]!r}")
    if not isinstance(fields.get("origin", ""), str):
        raise TypeError(f"origin is {fields['origin']!r}")
    part: PlanPart = part_type(**fields)
    return part


@dataclass(frozen=True)
class Contribution:
    """What one adapter adds to a plan: its parts and the tensors they name by digest."""

    parts: tuple[PlanPart, ...] = ()
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
