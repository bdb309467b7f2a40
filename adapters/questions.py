"""From the words before a value to the question they leave open, and to the kind of value that answers it.

"I live in"               Where do I live?             place
"My sister is called"     What is my sister called?    name
"I no longer like"        What do I no longer like?    do
"""

import re

PLACED = r"(?:in|at|near|on|from)"
_BE = r"(?P<be>is|are|was|were)(?P<no> not| no longer)?(?P<called> called| named)?"
OWN = rf"(?:my|our) (?P<what>.+?) {_BE}"
HAVE_CALLED = r"i have (?:an?|one) (?P<what>[\w -]{1,40}?) (?:called|named)"
AM = r"(?:i am|i'm|i was)(?: not| no longer)?"

# Questions about what the writer calls an attribute, where its wording alone would give a vague one.
ASKED = {
    "job": "What is my job?",
    "nationality": "What is my nationality?",
    "marital_status": "What is my marital status?",
    "diet": "What is my diet?",
    "speaks": "Which languages do I speak?",
    "units": "Which units do I prefer?",
    "family": "Which relatives do I have?",
    "has_pet": "Which pets do I have?",
}


def question_of(stem: str) -> str:
    """The question that the words before a value leave open."""
    if found := re.fullmatch(OWN, stem, re.IGNORECASE):
        no, called = found["no"] or "", found["called"] or ""
        word = "When" if found["what"].lower().endswith("birthday") and not no else "What"
        return f"{word} {found['be'].lower()}{no} my {_mine(found['what'])}{called}?"
    if found := re.fullmatch(HAVE_CALLED, stem, re.IGNORECASE):
        return f"What is my {found['what']} called?"
    if found := re.fullmatch(r"(?:i (?P<be>am|was)|i'm)(?P<rest> .+)?", stem, re.IGNORECASE):
        be, rest = (found["be"] or "am").lower(), (found["rest"] or "").strip()
        known = {"": "Who {} I?", "aged": "How old {} I?", "from": "Where {} I from?"}
        known |= {"born on": "When {} I born?", "born in": "Where {} I born?"}
        return known.get(rest, f"What {{}} I {rest}?").format(be)
    rest = re.sub(r"\Ai ", "", stem, flags=re.IGNORECASE)
    rest, past = re.subn(r"\Aused to ", "", rest, flags=re.IGNORECASE)
    rest = re.sub(r"\A(?:do not|don't) ", "not ", rest, flags=re.IGNORECASE)
    before = "did I use to" if past else "do I"
    if found := re.fullmatch(rf"(?P<verb>(?:.+ )?(?:live|work|come|study|stay)) (?P<where>{PLACED})", rest):
        return f"Where {before} {found['verb']}{' from' if found['where'] == 'from' else ''}?"
    if rest.endswith(("work for", "work with")):
        return f"Who {before} {rest}?"
    return f"What {before} {re.sub(r' an?$', '', rest)}?"


def form_of(question: str, stem: str) -> str:
    """The kind of value that answers a question."""
    if question.startswith("When"):
        return "date"
    if question.startswith("How old"):
        return "number"
    if question.startswith("Where"):
        return "place"
    if question.startswith("Who") and " work " in question:
        return "work"
    if question == ASKED["job"]:
        return "job"
    if question.startswith("What is my"):
        return "name" if re.search(r"\bname\b|\bcalled\b", question) else "is"
    if question.endswith("want to be called?"):
        return "name"
    if re.match(r"(?:my|our)\b", stem, re.IGNORECASE):
        return "is"
    return "are" if re.match(AM, stem, re.IGNORECASE) else "do"


def _mine(what: str) -> str:
    return re.sub(r"\bthe user's\b", "my", what, flags=re.IGNORECASE)
