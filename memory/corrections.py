"""Corrections distilled to rules: "too long", "metric units please", "don't call me sir".

    turn          ->  trigger             rule                          value      scope
    "too long"        length of replies   Keep replies short.           short      always
    "shorter here"    -                   -                             -          this turn: never stored
    "in emails, ..."  length of replies   Keep replies short.           short      task: emails

A rule is a plaintext cube of type "rule". The same correction again is a new version of it with more
confidence, 1 - 2^-n after n times; another rule on the same trigger (cosine above 0.85) supersedes it, and
the old one stays in history. A rule of one task that was confirmed three times holds always. Rules come
from the user's own turns, never from text that `screening` denies, and are data: a caller decides what
becomes of them.
"""

from collections.abc import Sequence

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory import rows
from persona_sdk.memory.correction_grammar import Correction, correction_in
from persona_sdk.memory.cube import CubeDraft, CubeHeader, MemCube, Origin, Source, TextEncoder
from persona_sdk.memory.embedding import embedded
from persona_sdk.memory.enrichment import Change
from persona_sdk.memory.followed import Followed
from persona_sdk.memory.screening import Screen
from persona_sdk.memory.store import MemoryStore

RULE = "rule"  # the semantic type


class CorrectionConfig(FrozenConfig):
    """When two triggers are the same, and when a rule of one task becomes a rule of all."""

    same_trigger: float = Field(0.85, ge=-1, le=1)
    confirmations: int = Field(3, ge=1)


class Corrections:
    """Learns rules from corrections and finds them again, for one store."""

    def __init__(
        self,
        store: MemoryStore,
        embedder: TextEncoder,
        *,
        config: CorrectionConfig | None = None,
        screen: Screen | None = None,
    ) -> None:
        self._store = store
        self._embedder = embedder
        self._config = config or CorrectionConfig()
        self._screen = screen or Screen()
        self._rules = Followed(store, lambda cube: True if cube.header.semantic_type == RULE else None)

    def rules(self, owner: str) -> list[MemCube]:
        """The owner's rules, oldest first."""
        _, ids = self._rules.get(owner)
        with self._store.reading() as connection:
            return list(rows.live(connection, owner, list(ids)).values())

    def learn(self, owner: str, text: str, *, task: str = "", turn: MemCube | None = None) -> MemCube | None:
        """Store what a correction says; the rule's cube, or None if there is nothing to keep.

        Raises:
            NotFoundError: the turn was forgotten meanwhile.
        """
        found = None if self._screen.suspicious(text) else correction_in(text, task=task)
        if found is None or found.scope == "turn":
            return None
        head = self._store.head(owner)
        change = self.change(self.rules(owner) if head else [], found, [turn] if turn else [])
        kind = None if head else "user"
        revision = self._store.commit(
            owner, kind=kind, add=change.add, retire=change.retire, message="correction", parent=head
        )
        return self._store.get(owner, revision.added[0])

    def change(self, rules: Sequence[MemCube], found: Correction, turns: Sequence[MemCube] = ()) -> Change:
        """What a correction, made in each of `turns`, does to the rules. Nothing is written."""
        old = self._rival(rules, found)
        same = old is not None and str(old.header.attributes.get("rule")) == found.rule
        times = max(len(turns), 1) + (_times(old) if old is not None and same else 0)
        lasting = found.scope == "always" or times >= self._config.confirmations
        attributes = {
            "trigger": found.trigger,
            "rule": found.rule,
            "value": found.value,
            "scope": "always" if lasting else "task",
            "task": "" if lasting else found.task,
            "evidence": found.evidence,
            "times": times,
            "confidence": 1 - 0.5**times,
            "supersedes": old.id if old is not None and not same else None,
        }
        sources = tuple(Source.of(turn) for turn in turns)
        kept = old.header.sources if old is not None and same else ()
        header = {
            "semantic_type": RULE,
            "title": found.trigger,
            "origin": Origin(kind="derived", session=turns[-1].header.origin.session if turns else ""),
            "sources": tuple(dict.fromkeys((*kept, *sources))),
            "parents": (old.id,) if old is not None and same else (),
            "attributes": attributes,
        }
        where = f" ({attributes['task']})" if attributes["task"] else ""
        text = f"{found.trigger[:1].upper()}{found.trigger[1:]}{where}: {found.rule}"
        add = embedded([CubeDraft(text=text, header=CubeHeader.parse(header))], self._embedder)
        return Change(add=add, retire=[old.id] if old is not None else [])

    def _rival(self, rules: Sequence[MemCube], found: Correction) -> MemCube | None:
        """The newest rule on the same trigger and task that may be replaced."""
        near = [
            r
            for r in rules
            if r.state != "frozen" and r.header.attributes.get("task", "") in ("", found.task)
        ]
        if not near:
            return None
        triggers = [str(rule.header.attributes.get("trigger", "")) for rule in near]
        if found.trigger in triggers:
            return near[len(triggers) - 1 - triggers[::-1].index(found.trigger)]
        vectors = self._embedder.encode([found.trigger, *triggers])
        cosines = (vectors[1:] @ vectors[0]).tolist()
        best = max(range(len(near)), key=lambda place: cosines[place])
        return near[best] if cosines[best] > self._config.same_trigger else None

    def rules_for(self, owner: str, query: str, k: int = 3, *, task: str = "") -> list[MemCube]:
        """The `k` rules that concern a query most, best first: those of all tasks and of `task`.

        Raises:
            InvalidInputError: `k` is below 1.
        """
        if k < 1:
            raise InvalidInputError(f"k is {k}.", hint="Expected at least 1.")
        inside = [
            rule
            for rule in self.rules(owner)
            if rule.header.attributes.get("scope") == "always" or rule.header.attributes.get("task") == task
        ]
        if not inside:
            return []
        vectors = self._embedder.encode([query, *(rule.text or "" for rule in inside)])
        cosines = (vectors[1:] @ vectors[0]).tolist()
        weight = [float(str(rule.header.attributes.get("confidence", 0.5))) for rule in inside]
        order = sorted(range(len(inside)), key=lambda i: (-(cosines[i] + 0.1 * weight[i]), i))
        return [inside[place] for place in order[:k]]


def _times(rule: MemCube) -> int:
    found = rule.header.attributes.get("times", 1)
    return found if isinstance(found, int) else 1
