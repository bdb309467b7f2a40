"""What a persona's adapters add up to, whatever is said to it: the composition without a prompt.

    persona, groups ──snapshot──► attachments ──contribute──► AdapterComposition (plan, tensors, sources)
                                        ▲
                                        └── Adjustment: strengths and a preference for one export

The parts are those that `persona_sdk.compose.Composer` puts into a plan, in the same order; a test compares
the two. Nothing here loads weights of a base model: its fingerprint is enough.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from persona_sdk.adapter_cache import PlanTensors
from persona_sdk.adapters import AdapterRequest
from persona_sdk.adapters.base import controls_of, steered
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.library import AdapterLibrary, Attachment, Loaded, Unused
from persona_sdk.memory import MemoryStore
from persona_sdk.memory.cube import utc_now
from persona_sdk.plan import CompositionPlan, PlanPart
from persona_sdk.tensors import Digest, TensorBundle

FACTORS = 10.0  # as far as `Persona.attach` goes


@dataclass(frozen=True, kw_only=True)
class Adjustment:
    """What one request changes about a persona's attachments. The default changes nothing.

    Args:
        weight: factor on the strength of every attachment.
        weights: factors by ``owner/name`` of the adapter.
        preference: new values by the names of controls, beside what the persona prefers.
    """

    weight: float = 1.0
    weights: Mapping[str, float] = field(default_factory=dict)
    preference: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, value in {"weight": self.weight, **self.weights}.items():
            if not -FACTORS <= value <= FACTORS:  # false for NaN too
                raise InvalidInputError(
                    f"The factor of {name!r} is {value!r}.",
                    hint=f"Expected a number in [-{FACTORS:g}, {FACTORS:g}].",
                )
        for name, value in self.preference.items():
            if not math.isfinite(value):
                raise InvalidInputError(f"The preference {name!r} is {value!r}.", hint="Expected a number.")


UNCHANGED = Adjustment()


@dataclass(frozen=True, kw_only=True)
class AdapterComposition:
    """What a persona's adapters add up to, whatever is said to it.

    Args:
        plan: the parts.
        tensors: the bundles they name; read from the store when they are taken, so while it is open.
        sources: digests of the stored adapters they come from.
        skipped: attachments that could not take part, and why, which `Persona.chat` skips too; and how many
            memories depend on the message.
        pinned: the texts that stand in every prompt of hers, as ``"pinned memory <id>"``.
    """

    plan: CompositionPlan
    tensors: Mapping[Digest, TensorBundle] = field(default_factory=dict)
    sources: tuple[Digest, ...] = ()
    skipped: tuple[str, ...] = ()
    pinned: tuple[str, ...] = ()


def compose_adapters(
    fingerprint: str,
    store: MemoryStore,
    library: AdapterLibrary,
    persona: str,
    *,
    groups: Sequence[str] | None = None,
    adjust: Adjustment = UNCHANGED,
) -> AdapterComposition:
    """The adapters of a persona and its groups, as chat would use them.

    Families that look at the message see an empty one.

    Args:
        fingerprint: of the base model.
        store: where the persona lives.
        library: the adapters of that store.
        persona: id of a user or a group.
        groups: only these of its groups; None takes all, as chat does.
        adjust: strengths and preference.

    Raises:
        NotFoundError: no such persona, or it is in no such group.
        InvalidInputError: a family refuses its state, or an adjustment reaches no adapter.
    """
    revisions = _revisions(store, persona, groups)
    composed = _Sum(adjust)
    for _, attachment, found in library.reachable(revisions):
        if isinstance(found, Unused):
            strange = ", not among the groups" if found is Unused.OUT_OF_REACH else ""
            composed.skip(attachment, f"{found}{strange}")
        else:
            composed.add(attachment, found)
    composed.require_all_used(persona)
    pinned, recalled = _memories(store, revisions)
    if recalled:
        composed.skipped.append(f"{recalled} memories: they depend on the message")
    return AdapterComposition(
        plan=CompositionPlan(fingerprint, tuple(composed.parts)),
        tensors=PlanTensors(composed.tensors),
        sources=tuple(sorted(set(composed.sources.values()))),
        skipped=tuple(composed.skipped),
        pinned=pinned,
    )


@dataclass
class _Sum:
    """What was contributed so far, and which adjustments found an adapter that takes them."""

    adjust: Adjustment
    parts: list[PlanPart] = field(default_factory=list)
    tensors: dict[Digest, TensorBundle] = field(default_factory=dict)
    sources: dict[str, Digest] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)
    weighted: set[str] = field(default_factory=set)
    controls: set[str] = field(default_factory=set)

    def skip(self, attachment: Attachment, reason: str) -> None:
        self.skipped.append(f"{attachment.name}: {reason}")

    def add(self, attachment: Attachment, loaded: Loaded) -> None:
        factor = self.adjust.weight * self.adjust.weights.get(attachment.name, 1.0)
        self.weighted.add(attachment.name)
        request = AdapterRequest(origin=loaded.label, weight=attachment.weight * factor)
        self.controls |= set(controls_of(loaded.adapter, attachment.state))
        state = steered(loaded.adapter, attachment.state, self.adjust.preference)
        made = loaded.adapter.contribute(state, request)
        self.parts += made.parts
        self.tensors |= made.tensors
        self.sources[attachment.adapter.cube_id] = attachment.adapter.sha256

    def require_all_used(self, persona: str) -> None:
        """An adjustment that reaches no adapter is an error: nobody asks for one to be ignored."""
        if strangers := sorted(set(self.adjust.weights) - self.weighted):
            raise InvalidInputError(
                f"{strangers[0]!r} is not attached to {persona!r} or its groups.",
                hint=f"Attached: {', '.join(sorted(self.weighted)) or 'nothing'}.",
            )
        if strangers := sorted(set(self.adjust.preference) - self.controls):
            raise InvalidInputError(
                f"No adapter of {persona!r} takes the preference {strangers[0]!r}.",
                hint=f"Known: {', '.join(sorted(self.controls)) or 'none'}.",
            )


def _revisions(store: MemoryStore, persona: str, groups: Sequence[str] | None) -> dict[str, int]:
    revisions = {persona: store.head(persona)}
    if not revisions[persona]:
        raise NotFoundError(
            f"There is no persona {persona!r} in this store.",
            hint="Ids are case-sensitive; `persona list` shows them.",
        )
    joined = store.groups(persona, revision=revisions[persona])
    for group in joined if groups is None else groups:
        if group not in joined:
            raise NotFoundError(
                f"{persona!r} is not in a group {group!r}.",
                hint=f"Its groups: {', '.join(joined) or 'none'}.",
            )
    wanted = joined if groups is None else [group for group in joined if group in groups]
    return revisions | {group: store.head(group) for group in wanted}


def _memories(store: MemoryStore, revisions: Mapping[str, int]) -> tuple[tuple[str, ...], int]:
    """The pinned memories of all owners by name, and how many others recall may find."""
    now = utc_now()
    headers = {
        f"pinned memory {owner}/{cube.id}": cube.header
        for owner, revision in revisions.items()
        for cube in store.cubes(owner, revision=revision, kind="plaintext")
        if not cube.header.expired(now)
    }
    pinned = tuple(name for name, header in headers.items() if header.pinned)
    return pinned, len(headers) - len(pinned)
