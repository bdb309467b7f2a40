"""From candidate statements to one commit: contradictions settled, duplicates folded, provenance attached.

A `Ledger` is the working set of one batch: the stored statements that the new ones may touch, and the new
ones. Nothing is written here. What is changed of a stored statement becomes a new version of it, whose
parent is the old one, which is retired.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.memory.cube import CubeDraft, CubeHeader, MemCube, Origin, Source, Trust
from persona_sdk.memory.duplicates import DuplicateConfig, more_specific, nearest
from persona_sdk.memory.slots import UNCONFIRMED, Held, may_change, settle
from persona_sdk.memory.statement import Statement, attribute_of

NOT_STATEMENTS = ("turn", "rule")  # semantic types that duplicates are not looked for among


@dataclass
class Change:
    """What a batch does to the store, and what it found there already."""

    add: list[CubeDraft] = field(default_factory=list)
    retire: list[str] = field(default_factory=list)
    repeated: list[str] = field(default_factory=list)
    unconfirmed: int = 0


def held_of(statement: Statement, sources: Sequence[MemCube], *, trust: Trust, extractor: str = "") -> Held:
    """A statement as it would be stored. The first source is the turn with its evidence."""
    turn = sources[0].header if sources else None
    kind = attribute_of(statement.attribute)
    attributes = {
        "attribute": statement.attribute,
        "value": statement.value,
        "polarity": statement.polarity,
        "evidence": statement.evidence,
        "strength": round(statement.strength, 4),
        "dated": statement.valid_from is not None,
        "ends": statement.valid_to is not None,
    }
    origin = Origin(
        kind="derived",
        reference=turn.origin.reference if turn else "",
        session=turn.origin.session if turn else "",
        model=extractor,
    )
    header = {
        "semantic_type": statement.semantic_type,
        "trust": trust,
        "origin": origin,
        "sources": tuple(Source.of(cube) for cube in sources),
        "slot": statement.slot,
        "valid_from": statement.valid_from,
        "valid_to": statement.valid_to,
        "sensitivity": kind.sensitivity if kind else "normal",
        "attributes": attributes,
    }
    if turn is not None:
        header["created_at"] = max(cube.header.created_at for cube in sources)
    return Held(statement.text, CubeHeader.parse(header))


class Ledger:
    """The statements a batch works on. ``vectors`` holds an embedding for every text that is compared."""

    def __init__(
        self,
        stored: Sequence[MemCube],
        vectors: Mapping[str, Float[Tensor, "d"]],
        config: DuplicateConfig,
    ) -> None:
        self._held = [Held.of(cube) for cube in stored if cube.header.semantic_type not in NOT_STATEMENTS]
        self._vectors = dict(vectors)
        self._config = config
        self._change = Change()

    def take(self, new: Held) -> str:
        """Take in one statement; what became of it, as in `slots.Outcome` and `duplicates.Relation`."""
        slot = new.header.slot
        if slot is None:
            return self._take_loose(new)
        line = [held for held in self._held if held.header.slot == slot]
        if not line and (known := attribute_of(slot.partition(".")[0])) and not known.single:
            return self._take_loose(new)  # likes.hiking beside likes.hiking_in_the_alps
        settled = settle(line, new)
        if settled.outcome in ("unconfirmed", "aside"):
            self._change.unconfirmed += settled.outcome == "unconfirmed"
            return self._take_loose(settled.line[-1], settled.outcome)
        if settled.outcome == "repeated" and settled.same is not None:
            self._use(settled.same)
        self._held = [held for held in self._held if held.header.slot != slot] + settled.line
        return settled.outcome

    def _take_loose(self, new: Held, otherwise: str = "added") -> str:
        """Take in a statement without rivals, unless it is a near-duplicate."""
        rivals = [held for held in self._held if held.text in self._vectors and _comparable(held, new)]
        vector = self._vectors[new.text]
        matrix = torch.stack([self._vectors[held.text] for held in rivals]) if rivals else vector[None, :][:0]
        match = nearest(new.text, vector, [held.text for held in rivals], matrix, self._config)
        old = None if match.place is None else rivals[match.place]
        if old is not None and match.relation == "repeated":
            self._use(old)
            return "repeated"
        if old is not None and match.relation == "merged" and _mergeable(old, new):
            if not more_specific(new.text, old.text):
                self._use(old)
                return "repeated"
            self._held[self._held.index(old)] = _merged(old, new)
            return "merged"
        if old is not None and old.cube is not None:
            related = {**new.header.attributes, "related": [old.cube.id]}
            new = new.with_header(attributes=related)
        self._held.append(new)
        return "linked" if old is not None and otherwise == "added" else otherwise

    def _use(self, held: Held) -> None:
        if held.cube is not None:
            self._change.repeated.append(held.cube.id)

    def change(self) -> Change:
        """All that is to be committed: new versions first, then new statements in order."""
        versions = [held for held in self._held if held.cube is not None and held.changed]
        change = self._change
        change.retire = [held.cube.id for held in versions if held.cube is not None]
        change.add = [
            CubeDraft(text=held.text, header=held.with_header(parents=(held.cube.id,)).header)
            for held in versions
            if held.cube is not None
        ]
        change.add += [
            CubeDraft(text=held.text, header=held.header) for held in self._held if held.cube is None
        ]
        change.repeated = [name for name in dict.fromkeys(change.repeated) if name not in change.retire]
        return change


def _comparable(held: Held, new: Held) -> bool:
    """Statements of different attributes, polarity or times are no duplicates, however near they are."""
    if not held.header.valid(new.start) or held.header.expired(new.header.created_at):
        return False  # what is over does not say that it is so again
    same_slot_kind = (held.header.slot is None) == (new.header.slot is None)
    alike = (held.get("attribute"), held.get("polarity")) == (new.get("attribute"), new.get("polarity"))
    written = held.get("evidence") is None  # by the application, with remember
    return written or (alike and same_slot_kind)


def _mergeable(held: Held, new: Held) -> bool:
    tagged = (UNCONFIRMED in held.header.tags) == (UNCONFIRMED in new.header.tags)
    extracted = held.get("evidence") is not None and held.header.valid_to is None
    return (
        tagged and extracted and held.header.trust == new.header.trust and may_change(held, new.header.trust)
    )


def _merged(old: Held, new: Held) -> Held:
    """The more specific statement as a new version of the other one, standing on the sources of both."""
    sources = tuple(dict.fromkeys((*old.header.sources, *new.header.sources)))
    header = new.header.model_copy(
        update={
            "sources": sources,
            "created_at": old.header.created_at,
            "valid_from": new.header.valid_from or old.header.valid_from,
            "attributes": {**new.header.attributes, "dated": bool(new.get("dated") or old.get("dated"))},
        }
    )
    return Held(new.text, header, old.cube)
