"""One atomic rule out of a user's correction: what it is about, what is to be done, how long it holds."""

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

from persona_sdk.memory.clauses import HIDDEN, hide, sentences

Scope: TypeAlias = Literal["turn", "task", "always"]
MAX_CHARS = 2000  # a longer turn is no correction


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
_LANGUAGE = (
    r"(?:english|french|german|spanish|italian|portuguese|dutch|polish|russian|turkish|chinese|japanese"
    r"|korean"
    r"|arabic|hindi)"
)
# Pattern, trigger, rule, value; {v} is what the pattern found.
_KNOWN: tuple[tuple[str, str, str, str], ...] = (
    (
        r"\b(?:(?:way |far |much |a bit |a little )?too (?:long|wordy|verbose)|shorter|(?:more|be) (?:concise"
        r"|brief)|keep it (?:short|brief)"
        r"|short answers?|less (?:text|verbose|wordy))\b",
        "length of replies",
        "Keep replies short.",
        "short",
    ),
    (
        r"\b(?:too (?:short|brief|terse)|more detail(?:s|ed)?|longer (?:answers?|replies)|elaborate more|be"
        r" more thorough)\b",
        "length of replies",
        "Give more detail in replies.",
        "detailed",
    ),
    (
        r"\b(?:use|in|prefer|want|give me)?\s*(?:metric|celsius|kilomet(?:er|re)s)(?: units?|"
        r" system)?\b(?=.*(?:please|instead|not|\Z))",
        "units of measurement",
        "Use metric units.",
        "metric",
    ),
    (
        r"\b(?:use|in|prefer|want|give me)\s+(?:imperial|fahrenheit|miles)(?: units?| system)?\b",
        "units of measurement",
        "Use imperial units.",
        "imperial",
    ),
    (
        rf"\b(?:answer|reply|respond|write|speak|talk)(?: to me| back)? in (?P<v>{_LANGUAGE})\b",
        "language of replies",
        "Reply in {v}.",
        "{v}",
    ),
    (rf"in (?P<v>{_LANGUAGE})(?:,? please)?\W*\Z", "language of replies", "Reply in {v}.", "{v}"),
    (
        r"\b(?:don't|do not|stop|never) call(?:ing)? me (?P<v>[\w'-]+)",
        "form of address",
        "Do not call the user {v}.",
        "not {v}",
    ),
    (r"\A(?:please |just )*call me (?P<v>[A-Z][\w'-]+)", "form of address", "Call the user {v}.", "{v}"),
    (
        r"\b(?:too formal|less formal|more casual|more informal|too stiff)\b",
        "tone of replies",
        "Write casually.",
        "casual",
    ),
    (
        r"\b(?:too (?:casual|informal|chatty)|more formal|more professional|less casual)\b",
        "tone of replies",
        "Write formally.",
        "formal",
    ),
    (
        r"\b(?:no|without|stop using|don't use|do not use|avoid|fewer|drop the) (?:more )?emojis?\b",
        "emojis",
        "Use no emojis.",
        "none",
    ),
    (
        r"\b(?:no|without|stop using|don't use|do not use|avoid) (?:more )?(?:bullet points?|bullets"
        r"|lists)\b",
        "layout of replies",
        "Write prose without bullet points.",
        "prose",
    ),
    (
        r"\b(?:use|with|as|in|give me) (?:a )?(?:bullet points?|bullets|bullet list)\b",
        "layout of replies",
        "Use bullet points.",
        "bullets",
    ),
    (
        r"\b(?:too (?:technical|complicated|hard)|simpler(?: words)?|plain(?:er)? (?:words|language|english)"
        r"|less jargon|no jargon)\b",
        "difficulty of replies",
        "Use simple words.",
        "simple",
    ),
)
_FREE = re.compile(
    rf"\A{_PLEASE}(?P<how>always|never|stop|don't ever|do not ever|avoid|make sure (?:to|you)|remember"
    rf" to)\s+(?P<what>\w.{{2,160}})\Z",
    re.IGNORECASE,
)
_THIS_TURN = re.compile(
    r"\b(?:this time|just this once|(?:for|in) this (?:one|answer|reply|message|case|question|email|text)"
    r"|just now"
    r"|here|this (?:answer|one|reply)|for now|only this)\b",
    re.IGNORECASE,
)
_TASK = re.compile(
    r"(?:\bwhen(?:ever)? (?:you |i |we )?(?:are |ask (?:you )?(?:about|for) |write |writing |talk about |do"
    r" |doing )?"
    r"|\b(?:in|for) (?:my |all )?(?=(?:e-?mails?|code|recipes?|letters?|reports?|summar\w+|translations?"
    r"|stories|poems|lists)\b))"
    r"(?P<task>\w[\w -]{1,40}?)(?=[,.;:!]|\s+(?:please|use|keep|make|be|don't|do not|never|always)\b|\s*\Z)",
    re.IGNORECASE,
)
# How a correction begins. "The film was too long" does not begin so, and is about the film.
_OPENING = (
    r"\A(?:(?:please|pls|just|no|ok|okay|sorry|hey|hm+|but|and|can you|could you|that's|that is|that was"
    r"|this is|it's|it is"
    r"|your (?:last )?(?:answers?|reply|replies|responses?|messages?|texts?) (?:is|are|was|were)|you're|you"
    r" are|you were|be"
    r"|make (?:it|them|that)|keep (?:it|them)|give me|i (?:prefer|want|need|said|would like)|i'd (?:like"
    r"|prefer)|from now on|this (?:once|time)"
    r"|next time|in (?:the )?future|always|still|way|far|much|use|answer|reply|respond|write|a|an|with|in"
    r"|when(?:ever)? [^,]{1,40},?|(?:in|for) [^,]{1,30},)[\s,]+)*?"
)
_KNOWN_REGEX = [
    (re.compile(rf"{_OPENING}(?:{p})", re.IGNORECASE), trigger, rule, value)
    for p, trigger, rule, value in _KNOWN
]


def correction_in(text: str, *, task: str = "") -> Correction | None:
    """The rule in a user's turn, None if it corrects nothing.

    `task` is what is being worked on, as "emails"; an unmarked correction then is about that task.
    """
    if len(text) > MAX_CHARS:
        return None
    hidden = hide(text)
    for start, end in sentences(hidden):
        sentence = hidden[start:end].strip().rstrip(".!")
        if HIDDEN in sentence or (
            sentence.endswith("?") and not re.match(r"(?i)(?:can|could|would) you\b", sentence)
        ):
            continue
        if found := _rule_in(sentence.rstrip("?")):
            trigger, rule, value = found
            scope, about = _scope(sentence, task)
            return Correction(trigger, rule, value, scope, text[start:end].strip(), about)
    return None


def _rule_in(sentence: str) -> tuple[str, str, str] | None:
    """Trigger, rule and value."""
    short = len(sentence.split()) <= 16
    for pattern, trigger, rule, value in _KNOWN_REGEX if short else ():
        if found := pattern.match(sentence):
            groups = found.groupdict()
            word = groups.get("v") or ""
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
