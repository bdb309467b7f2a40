"""Corrections distilled to rules: "too long", "metric units please", "don't call me sir".

    turn          ->  trigger             rule                          value      scope
    "too long"        length of replies   Keep replies short.           short      always
    "shorter here"    -                   -                             -          this turn: never stored
    "in emails, ..."  length of replies   Keep replies short.           short      task: emails

A rule is a plaintext cube of semantic type "rule". The same correction again is a new version of it with more
confidence, 1 - 2^-n after n times; another rule on the same trigger (cosine above 0.85) supersedes it, and the
old one stays in history. A rule of one task that was confirmed three times holds always. Rules come from the
user's own turns, never from text that `screening` denies, and are data: a caller decides what to do with them.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.memory.clauses import hide, sentences
from persona_sdk.memory.cube import CubeDraft, CubeHeader, MemCube, Origin, Source, TextEncoder
from persona_sdk.memory.enrichment import Change
from persona_sdk.memory.screening import Screen
from persona_sdk.memory.store import MemoryStore

Scope: TypeAlias = Literal["turn", "task", "always"]
RULE = "rule"  # the semantic type
MAX_CHARS = 2000  # a longer turn is no correction


class CorrectionConfig(FrozenConfig):
    """When two triggers are the same, and when a rule of one task becomes a rule of all."""

    same_trigger: float = Field(0.85, ge=-1, le=1)
    confirmations: int = Field(3, ge=1)


@dataclass(frozen=True)
class Correction:
    """One atomic rule: when `trigger` comes up, `rule`. ``evidence`` are the user's words."""

    trigger: str
    rule: str
    value: str
    scope: Scope
    evidence: str
    task: str = ""


_PLEASE = (
    r"(?:please |pls |can you |could you |just |next time,? |from now on,? |in future,? |in the future,? )*"
)
_LANGUAGE = r"(?P<v>english|french|german|spanish|italian|portuguese|dutch|polish|russian|turkish|chinese|japanese|korean|arabic|hindi)"
_KNOWN: tuple[tuple[str, str, str, str], ...] = (  # pattern, trigger, rule, value; {v} is what the pattern found
    (r"\b(?:(?:way |far |much |a bit |a little )?too (?:long|wordy|verbose)|shorter|(?:more|be) (?:concise|brief)|keep it (?:short|brief)"
     r"|short answers?|less (?:text|verbose|wordy))\b", "length of replies", "Keep replies short.", "short"),
    (r"\b(?:too (?:short|brief|terse)|more detail(?:s|ed)?|longer (?:answers?|replies)|elaborate more|be more thorough)\b",
     "length of replies", "Give more detail in replies.", "detailed"),
    (r"\b(?:use|in|prefer|want|give me)?\s*(?:metric|celsius|kilomet(?:er|re)s)(?: units?| system)?\b(?=.*(?:please|instead|not|\Z))",
     "units of measurement", "Use metric units.", "metric"),
    (r"\b(?:use|in|prefer|want|give me)\s+(?:imperial|fahrenheit|miles)(?: units?| system)?\b", "units of measurement",
     "Use imperial units.", "imperial"),
    (rf"\b(?:answer|reply|respond|write|speak|talk)(?: to me| back)? in {_LANGUAGE}\b|\Ain {_LANGUAGE.replace('?P<v>', '?P<w>')}(?:,? please)?\W*\Z",
     "language of replies", "Reply in {v}.", "{v}"),
    (r"\b(?:don't|do not|stop|never) call(?:ing)? me (?P<v>[\w'-]+)", "form of address", "Do not call the user {v}.", "not {v}"),
    (r"\A(?:please |just )*call me (?P<v>[A-Z][\w'-]+)", "form of address", "Call the user {v}.", "{v}"),
    (r"\b(?:too formal|less formal|more casual|more informal|too stiff)\b", "tone of replies", "Write casually.", "casual"),
    (r"\b(?:too (?:casual|informal|chatty)|more formal|more professional|less casual)\b", "tone of replies",
     "Write formally.", "formal"),
    (r"\b(?:no|without|stop using|don't use|do not use|avoid|fewer|drop the) (?:more )?emojis?\b", "emojis", "Use no emojis.", "none"),
    (r"\b(?:no|without|stop using|don't use|do not use|avoid) (?:more )?(?:bullet points?|bullets|lists)\b", "layout of replies",
     "Write prose without bullet points.", "prose"),
    (r"\b(?:use|with|as|in|give me) (?:a )?(?:bullet points?|bullets|bullet list)\b", "layout of replies", "Use bullet points.", "bullets"),
    (r"\b(?:too (?:technical|complicated|hard)|simpler(?: words)?|plain(?:er)? (?:words|language|english)|less jargon|no jargon)\b",
     "difficulty of replies", "Use simple words.", "simple"),
)  # fmt: skip
_FREE = re.compile(
    rf"\A{_PLEASE}(?P<how>always|never|stop|don't ever|do not ever|avoid|make sure (?:to|you)|remember to)\s+(?P<what>\w.{{2,160}})\Z",
    re.IGNORECASE,
)
_THIS_TURN = re.compile(
    r"\b(?:this time|just this once|(?:for|in) this (?:one|answer|reply|message|case|question|email|text)|just now"
    r"|here|this (?:answer|one|reply)|for now|only this)\b",
    re.IGNORECASE,
)
_TASK = re.compile(
    r"(?:\bwhen(?:ever)? (?:you |i |we )?(?:are |ask (?:you )?(?:about|for) |write |writing |talk about |do |doing )?"
    r"|\b(?:in|for) (?:my |all )?(?=(?:e-?mails?|code|recipes?|letters?|reports?|summar\w+|translations?|stories|poems|lists)\b))"
    r"(?P<task>\w[\w -]{1,40}?)(?=[,.;:!]|\s+(?:please|use|keep|make|be|don't|do not|never|always)\b|\s*\Z)",
    re.IGNORECASE,
)
# How a correction begins. "The film was too long" does not begin so, and is about the film.
_OPENING = (
    r"\A(?:(?:please|pls|just|no|ok|okay|sorry|hey|hm+|but|and|can you|could you|that's|that is|that was|this is|it's|it is"
    r"|your (?:last )?(?:answers?|reply|replies|responses?|messages?|texts?) (?:is|are|was|were)|you're|you are|you were|be"
    r"|make (?:it|them|that)|keep (?:it|them)|give me|i (?:prefer|want|need|said|would like)|i'd (?:like|prefer)|from now on|this (?:once|time)"
    r"|next time|in (?:the )?future|always|still|way|far|much|use|answer|reply|respond|write|a|an|with|in"
    r"|when(?:ever)? [^,]{1,40},?|(?:in|for) [^,]{1,30},)[\s,]+)*?"
)
_KNOWN_REGEX = [
    (re.compile(rf"{_OPENING}(?:{p})", re.IGNORECASE), trigger, rule, value)
    for p, trigger, rule, value in _KNOWN
]


def distil(text: str, *, task: str = "") -> Correction | None:
    """The rule in a user's turn, None if it corrects nothing.

    `task` is what is being worked on, as "emails"; an unmarked correction then is about that task.
    """
    if len(text) > MAX_CHARS:
        return None
    hidden = hide(text)
    for start, end in sentences(hidden):
        sentence = hidden[start:end].strip().rstrip(".!")
        if (
            "\x00" in sentence
            or sentence.endswith("?")
            and not re.match(r"(?i)(?:can|could|would) you\b", sentence)
        ):
            continue
        if found := _rule_in(sentence.rstrip("?")):
            trigger, rule, value = found
            scope, about = _scope(sentence, task)
            return Correction(trigger, rule, value, scope, text[start:end].strip(), about)
    return None


def _rule_in(sentence: str) -> tuple[str, str, str] | None:
    """Trigger, rule and value."""
    for pattern, trigger, rule, value in _KNOWN_REGEX:
        if len(sentence.split()) <= 16 and (found := pattern.match(sentence)):
            groups = found.groupdict()
            word = groups.get("v") or groups.get("w") or ""
            word = word.capitalize() if trigger == "language of replies" else word
            return trigger, rule.format(v=word), value.format(v=word)
    if found := _FREE.match(sentence):
        what = _TASK.sub("", found["what"]).strip(" ,")
        how = found["how"].lower()
        negative = how.startswith(("never", "stop", "don't", "do not", "avoid"))
        return what, f"{'Never' if negative else 'Always'}: {what}.", "never" if negative else "always"
    return None


def _scope(sentence: str, task: str) -> tuple[Scope, str]:
    if _THIS_TURN.search(sentence):
        return "turn", ""
    if re.search(r"\b(?:always|never|from now on|every time|in (?:the )?future)\b", sentence, re.IGNORECASE):
        task = ""
    if found := _TASK.search(sentence):
        return "task", found["task"].strip().lower()
    return ("task", task) if task else ("always", "")


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

    def rules(self, owner: str) -> list[MemCube]:
        """The owner's rules, oldest first."""
        return [cube for cube in self._store.cubes(owner) if cube.header.semantic_type == RULE]

    def learn(self, owner: str, text: str, *, task: str = "", turn: MemCube | None = None) -> MemCube | None:
        """Store what a correction says; the rule's cube, or None if there is nothing to keep.

        Raises:
            NotFoundError: the turn was forgotten meanwhile.
        """
        found = None if self._screen.suspicious(text) else distil(text, task=task)
        if found is None or found.scope == "turn":
            return None
        head = self._store.head(owner)
        change = self.change(self.rules(owner) if head else [], found, [turn] if turn else [])
        revision = self._store.commit(
            owner, add=change.add, retire=change.retire, message="correction", parent=head
        )
        return self._store.get(owner, revision.added[0])

    def change(self, rules: Sequence[MemCube], found: Correction, turns: Sequence[MemCube] = ()) -> Change:
        """What a correction, made in each of `turns`, does to the rules that are there. Nothing is written."""
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
        vector = self._embedder.encode([text])[0]
        draft = CubeDraft(
            text=text, header=CubeHeader.parse(header), vector=vector, encoder=self._embedder.fingerprint
        )
        return Change(add=[draft], retire=[old.id] if old is not None else [])

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
