"""The plain form of a clause: negation and adverbs taken out, and the wording of what is left.

I no longer like coffee      ->  I like coffee, ended       ->  The user no longer likes coffee.
I don't really like coffee   ->  I like coffee, negative    ->  The user does not like coffee.
I used to live in Oslo       ->  I live in Oslo, past       ->  The user used to live in Oslo.
"""

import re
from typing import NamedTuple

from persona_sdk.memory.statement import Polarity


class Plain(NamedTuple):
    """A clause in plain form. ``past``: it is told of a time that is over."""

    text: str
    polarity: Polarity
    past: bool = False


_I = r"(?:i|we)"
_ADVERB = re.compile(
    r"\b(?:currently|now|still|also|just|really|actually|absolutely|definitely|totally|always|recently|truly"
    r"|quite|kind of|sort of|generally|usually|already|finally|simply|mainly|mostly|completely|very"
    r"|formerly)\s+",
    re.IGNORECASE,
)
_ANYMORE = re.compile(r"\s*\b(?:anymore|any more|any longer)\b", re.IGNORECASE)
_ENDED = re.compile(
    rf"\A(?P<who>{_I})(?P<be>'m| am|'re| are)?\s+(?:no longer|(?P<used>used to))\s+", re.IGNORECASE
)
_STOPPED = re.compile(
    rf"\A(?P<who>{_I})(?:'ve| have)? (?:stopped|quit|gave up)\s+(?P<verb>\w+)ing\b", re.IGNORECASE
)
_NOT = re.compile(
    rf"\A(?P<who>{_I})(?:(?P<be>'m| am|'re| are) not|(?:'ve| have)? never|"
    rf" (?:don't|do not|dont|didn't|did not|can't|cannot)(?= (?:like|love|enjoy|eat|drink|speak|live|work"
    rf"|have|own|play"
    rf"|care|study|prefer|use|drive)\b))\s+",
    re.IGNORECASE,
)
_IS_NOT = re.compile(
    r"\A(?P<what>my [\w' ]{1,40}? (?:is|are))(?: not|n't|(?P<ended> no longer))\s+", re.IGNORECASE
)
_PAST = re.compile(rf"\A({_I}) (lived|worked|resided)\b(?= (?:in|at|for|as)\b)", re.IGNORECASE)
_GERUNDS = {
    "lik": "like",
    "lov": "love",
    "liv": "live",
    "driv": "drive",
    "us": "use",
    "danc": "dance",
    "hik": "hike",
}


def plain(text: str) -> Plain:
    """Take negation, tense and adverbs out of a clause."""
    text = _ADVERB.sub("", f"{text} ").strip()
    over = bool(_ANYMORE.search(text))
    text = _ANYMORE.sub("", text)
    if found := _ENDED.match(text):
        verb, rest = " am" if found["be"] else "", text[found.end() :]
        if found["used"]:
            rest = re.sub(r"\Abe\b", "am", rest, flags=re.IGNORECASE)
        return Plain(f"{found['who']}{verb} {rest}", "ended", past=bool(found["used"]))
    if found := _STOPPED.match(text):
        stem = found["verb"].lower()
        return Plain(f"{found['who']} {_GERUNDS.get(stem, stem)}{text[found.end() :]}", "ended")
    if found := _IS_NOT.match(text):
        return Plain(
            f"{found['what']} {text[found.end() :]}", "ended" if over or found["ended"] else "negative"
        )
    if found := _NOT.match(text):
        rest = re.sub(r"\A(like|love|enjoy|live)d\b", r"\1", text[found.end() :], flags=re.IGNORECASE)
        rest = re.sub(r"\Aenjoyed\b", "enjoy", rest, flags=re.IGNORECASE)
        return Plain(f"{found['who']}{' am' if found['be'] else ''} {rest}", "ended" if over else "negative")
    if found := _PAST.match(text):
        base = found.group(2).lower()[:-1] if found.group(2).lower() != "worked" else "work"
        return Plain(f"{found.group(1)} {base}{text[found.end() :]}", "ended", past=True)
    return Plain(text, "positive")


def wording(third: str, value: str, polarity: Polarity, *, past: bool = False, phrase: str = "") -> str:
    """A sentence about the user: `third` is the verb phrase of the third person, as "lives in"."""
    tail = f"{value} {phrase}".strip()
    subject = "The user" if third.startswith("'s ") else "The user "
    head, copula, rest = third.partition("is ") if "is " in f"{third} " else ("", "", third)
    if third == "is" or third.endswith(" is"):
        head, copula, rest = third[: -len("is")], "is ", ""
    if polarity == "positive":
        return f"{subject}{third} {tail}."
    if copula:
        if past:
            return f"{subject}{head}used to be {f'{rest} {tail}'.strip()}."
        word = "is not" if polarity == "negative" else "is no longer"
        return f"{subject}{head}{word} {f'{rest} {tail}'.strip()}."
    verb, _, rest = third.partition(" ")
    base = _base(verb)
    if past:
        return f"{subject}used to {base} {f'{rest} {tail}'.strip()}."
    if polarity == "ended":
        return f"{subject}no longer {third} {tail}."
    return f"{subject}does not {base} {f'{rest} {tail}'.strip()}."


def _base(verb: str) -> str:
    if verb == "has":
        return "have"
    return f"{verb[:-3]}y" if verb.endswith("ies") else verb[:-1] if verb.endswith("s") else verb
