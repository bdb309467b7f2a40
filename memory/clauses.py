"""What a user asserts, as clauses: sentences without quotations, questions, wishes and other people's words.

Rules can only be trusted with words that somebody says about himself. So whatever is quoted, asked,
imagined, told of somebody else or given as material to work on is taken out before any pattern sees it;
the patterns then match from the beginning of a clause only.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

HIDDEN = "\x00"  # stands for characters that are not the user's own words; positions stay as they were

_QUOTED = re.compile(
    r"```.*?(?:```|\Z)|`[^`\n]*`|^[ \t]*>[^\n]*|\"[^\"\n]{0,2000}\"|“[^”]{0,2000}”|«[^»]{0,2000}»"
    r"|(?<!\w)'[^'\n]{2,2000}'(?!\w)",
    re.DOTALL | re.MULTILINE,
)
_SENTENCE = re.compile(r"[^.!?\n]+(?:[.!?](?![\s\"')\]]|\Z)[^.!?\n]*)*[.!?]*")
_ABBREVIATION = re.compile(r"(?:\b(?:dr|mr|mrs|ms|st|prof|e\.g|i\.e|vs|no|approx))\.\s*\Z", re.IGNORECASE)

_SUBJECT = r"(?:i|i'm|i've|i'd|we|we're|we've|my|our)\b"
_CLAUSE = re.compile(
    rf"\s*;\s*|\s+[-–—]+\s+|\s*—\s*"
    rf"|\s*,?\s+(?:and then|and|but|so|because|although|though|whereas|yet|or)\s+(?={_SUBJECT})"
    rf"|\s*,?\s+(?:but|so|because|although|though|whereas|since i|when i|while i|which|who|where)\s+"
    rf"|\s*,\s+(?={_SUBJECT}|(?:what|how|can|could|would|do|does|is|are|any|please|which|where|so|not|nice"
    rf" to|pleased to)\b)",
    re.IGNORECASE,
)
_LEAD = re.compile(
    r"(?:(?:well|actually|btw|by the way|oh|ah|ok|okay|and|but|also|so|yes|yeah|yep|no|nope|fyi|hi|hello|hey"
    r"|hey there|hi there|good (?:morning|evening|afternoon)|just so you know|as i said|as you know|honestly"
    r"|to be honest|tbh|anyway|first of all|for context|for the record|in fact|you know|look|sorry|thanks"
    r"|thank you|currently|nowadays|these days|now|today|sadly|unfortunately|luckily|personally|update"
    r"|correction)"
    r"[\s,:.!]+)+",
    re.IGNORECASE,
)
_UNREAL = re.compile(
    r"\b(?:wish|if only|if i|if we|suppose|supposing|imagine|imagining|pretend|let's say|let us say|as if"
    r"|as though"
    r"|hypothetical\w*|dream(?:t|ed|s)?|role-?play|would|could|might|maybe|perhaps|should|i'd|we'd|what if"
    r"|unless|whether|for example|for instance|e\.g\.|my character|in (?:the|my|this|that|a) "
    r"(?:story|novel|book|movie|film|game|play|poem|song|dream|scenario|example))(?![\w'])",
    re.IGNORECASE,
)
_REPORTED = re.compile(
    r"\b(?:(?:he|she|they|who|everyone|everybody|somebody|someone|people|friend|wife|husband|boss|mother"
    r"|mom|mum"
    r"|father|dad|brother|sister|colleague|teacher|doctor)s?\s+(?:\w+\s+)?"
    r"(?:says?|said|tells?|told|asks?|asked|thinks?|thought|claims?|claimed|wrote|writes|believes?|believed)"
    r"|(?:says?|said|wrote|quote|reads?|goes|told me|lyrics?|caption|title)\s*[:,]\s*"
    r"|\bas (?:the|an?|they|my)\b.{0,30}\b(?:goes|go|says?|puts? it)\b)(?![\w'])",
    re.IGNORECASE,
)
_MATERIAL = re.compile(
    r"^\W*(?:please |can you |could you |help me )*(?:translate|proofread|rewrite|rephrase|paraphrase"
    r"|summari[sz]e"
    r"|correct|fix|edit|improve|check|write|draft|compose|say|repeat|act|respond as|you are|here is|here's"
    r"|below is)\b",
    re.IGNORECASE,
)

_REMEMBER = re.compile(
    r"(?:please |can you |could you |you should )*(?:remember|note|keep in mind|don't forget|do not forget)"
    r"(?: that)?[\s,:]+(?=(?:i|i'm|i've|my|we|our|the|call)\b)",
    re.IGNORECASE,
)
_GREETING = re.compile(r"\b(?:hi|hello|hey|good (?:morning|evening|afternoon))\b", re.IGNORECASE)

_MET = re.compile(r"\b(?:nice|pleased|great|good) to meet you\b", re.IGNORECASE)
_OPENING = re.compile(
    r"(?:hi|hello|hey)(?: there| all| everyone)?|good (?:morning|evening|afternoon)"
    r"|(?:in|since|on|as of|last|this|next|yesterday|today|tomorrow|\w+ (?:days?|weeks?|months?|years?)"
    r" ago)\b.{0,24}",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Clause:
    """One clause of a user, without lead-in words. ``evidence`` is the whole clause as it was written.

    ``greeted`` says that it follows a greeting, ``explicit`` that the user asked for it to be remembered.
    """

    text: str
    evidence: str
    greeted: bool = False
    explicit: bool = False


def asserted(text: str, echoes: Sequence[tuple[int, int]] = ()) -> Iterator[Clause]:
    """The clauses of a turn that its writer asserts, in order."""
    hidden = hide(text, echoes)
    greeted = bool(_MET.search(hidden))
    for start, end in sentences(hidden):
        if _MATERIAL.match(hidden[start:end]):
            return  # what follows is something to work on, not something that is said
        for clause, first, last in _clauses(hidden[start:end]):
            yield replace(
                clause, evidence=text[start + first : start + last], greeted=greeted or clause.greeted
            )
        greeted = greeted or bool(_GREETING.match(hidden[start:end].strip()))


def hide(text: str, spans: Sequence[tuple[int, int]] = ()) -> str:
    """The text with quotations and `spans` blanked; as long as before."""
    masked = text.replace(HIDDEN, " ").replace("’", "'")
    masked = _QUOTED.sub(lambda found: HIDDEN * len(found.group()), masked)
    for start, end in spans:
        masked = masked[:start] + HIDDEN * (min(end, len(text)) - start) + masked[end:]
    return masked


def sentences(text: str) -> list[tuple[int, int]]:
    """Where the sentences of a text begin and end."""
    spans: list[tuple[int, int]] = []
    for found in _SENTENCE.finditer(text):
        if not found.group().strip():
            continue
        if spans and _ABBREVIATION.search(text[spans[-1][0] : spans[-1][1]]):
            spans[-1] = (spans[-1][0], found.end())
        else:
            spans.append(found.span())
    return spans


def _clauses(sentence: str) -> Iterator[tuple[Clause, int, int]]:
    """The asserted clauses of one sentence, and where they lie in it."""
    spans = _spans(sentence)
    first = sentence[spans[0][0] : spans[0][1]] if spans else ""
    lead = _LEAD.match(first)
    request = _REMEMBER.match(first[lead.end() if lead else 0 :])
    if sentence.rstrip().endswith("?") and not request:
        spans = spans[:-1]  # "I live in Paris, what is on?": only the last clause asks
    for start, end in spans:
        whole = sentence[start:end]
        lead = _LEAD.match(whole)
        rest = whole[lead.end() :] if lead else whole
        request = _REMEMBER.match(rest)
        rest = rest[request.end() :] if request else rest
        if _UNREAL.search(rest) or _REPORTED.search(rest):
            return  # and what hangs on it: "He says he is rich, I live in Rome" is too hard for rules
        if rest and HIDDEN not in rest:
            greeted = bool(lead and _GREETING.search(lead.group()))
            yield Clause(rest, whole, greeted=greeted, explicit=bool(request)), start, end


def _spans(sentence: str) -> list[tuple[int, int]]:
    """Where the clauses of a sentence lie, without blanks and stops around them."""
    cuts = [(0, 0), *(found.span() for found in _CLAUSE.finditer(sentence)), (len(sentence), len(sentence))]
    spans: list[tuple[int, int]] = []
    for (_, start), (end, _) in pairwise(cuts):
        part = sentence[start:end]
        left = len(part) - len(part.lstrip(" \t,"))
        size = len(part.rstrip(" \t.!?,;"))
        if size > left and spans and _OPENING.fullmatch(sentence[slice(*spans[-1])]):
            spans[-1] = (spans[-1][0], start + size)  # "Last year, I moved": one clause
        elif size > left:
            spans.append((start + left, start + size))
    return spans
