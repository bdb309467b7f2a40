"""Pools of texts and questions about them: LoCoMo, REALTALK, and needles made of persona sentences.

A pool is searched alone. ``evidence`` are the rows of its texts that answer a question.
"""

import csv
import gzip
import hashlib
import json
import random
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.harness import BenchmarkError
from persona_sdk.memory.lexical import tokens

CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "open-domain", 4: "single-hop", 5: "adversarial"}
REALTALK_CATEGORIES = {1: "multi-hop", 2: "temporal", 3: "commonsense"}
LOCOMO_SHA256 = "79fa87e90f04081343b8c8debecb80a9a6842b76a7aa537dc9fdf651ea698ff4"
DISTRACTORS = 600


@dataclass(frozen=True)
class Question:
    """One question and the rows that answer it."""

    text: str
    category: str
    evidence: frozenset[int]


@dataclass(frozen=True)
class Pool:
    """Texts that are searched together, the session and the time of each, and questions."""

    name: str
    texts: tuple[str, ...]
    sessions: tuple[str, ...]
    times: tuple[datetime, ...]
    questions: tuple[Question, ...]


def locomo(folder: Path) -> list[Pool]:
    """The ten conversations; a turn is its speaker, its text and the caption of its picture."""
    file = folder / "locomo" / "locomo10.json"
    data = _bytes(file)
    if hashlib.sha256(data).hexdigest() != LOCOMO_SHA256:
        raise BenchmarkError(f"{file.name} is not the published file.")
    return [_conversation(entry) for entry in json.loads(data)]


def _conversation(entry: dict) -> Pool:
    talk = entry["conversation"]
    turns = []
    for session in _sessions(talk):
        time = datetime.strptime(talk[f"{session}_date_time"], "%I:%M %p on %d %B, %Y").replace(tzinfo=UTC)
        for turn in talk[session]:
            caption = f" [shares {turn['blip_caption']}]" if turn.get("blip_caption") else ""
            turns.append((turn["dia_id"], f"{turn['speaker']}: {turn['text']}{caption}", session, time))
    return _pool(entry["sample_id"], turns, entry["qa"], CATEGORIES, whole=False)


def realtalk(folder: Path) -> list[Pool]:
    """The chats of real people; questions that cite a turn that is not in the file are dropped."""
    pools = []
    for file in sorted((folder / "realtalk").glob("Chat_*.json")):
        talk = json.loads(_bytes(file))
        turns = [
            (turn["dia_id"], f"{turn['speaker']}: {turn['clean_text']}", session, _moment(turn["date_time"]))
            for session in _sessions(talk)
            for turn in talk[session]
        ]
        pools.append(_pool(file.stem, turns, talk["qa"], REALTALK_CATEGORIES, whole=True))
    if not pools:
        raise BenchmarkError("There is no realtalk folder among the data.")
    return pools


def _sessions(talk: dict) -> list[str]:
    numbered = sorted(int(match[1]) for key in talk if (match := re.fullmatch(r"session_(\d+)", key)))
    return [f"session_{number}" for number in numbered]


def _moment(text: str) -> datetime:
    return datetime.strptime(text, "%d.%m.%Y, %H:%M:%S").replace(tzinfo=UTC)


def _pool(
    name: str, turns: list[tuple], asked: list[dict], categories: dict[int, str], *, whole: bool
) -> Pool:
    rows = {turn_id: row for row, (turn_id, *_) in enumerate(turns)}
    questions = []
    for entry in asked:
        cited = {part for text in entry.get("evidence", ()) for part in re.split(r"[;,\s]+", text) if part}
        found = frozenset(rows[part] for part in cited if part in rows)
        if found and not (whole and len(found) < len(cited)):
            questions.append(Question(entry["question"], categories[entry["category"]], found))
    _, texts, sessions, times = zip(*turns, strict=True)
    return Pool(name, texts, sessions, times, tuple(questions))


# One preference among hundreds of messages about other things --------------------------------------------

TOPICS: dict[str, tuple[str, tuple[str, ...]]] = {
    "food": (
        r"\b(food|eat|pizza|vegan|vegetarian|meat|cheese|chocolate|sushi|pasta|spaghetti|burger|fruit|chicken"
        r"|steak|salad|taco|shellfish|bread|ice cream|candy|cook\w*|restaurant|meal|dinner|lunch"
        r"|breakfast|recipe)",
        ("Which restaurant would suit me tonight?", "Suggest a recipe for dinner."),
    ),
    "music": (
        r"\b(music|band|song|rap|rock|jazz|guitar|piano|sing\w*|concert|playlist|album)\b",
        ("Which concert should I attend?", "Recommend an artist or an album."),
    ),
    "screen": (
        r"\b(movies?|films?|horror|comed\w+|tv|shows?|anime|disney|netflix|stream\w*)\b",
        ("What should I put on at home on Netflix?", "Pick something for a night at the cinema."),
    ),
    "books": (
        r"\b(read\w*|books?|novels?|poe\w+|librar\w+|author)\b",
        ("What should I borrow from the library?", "Recommend an author or a publisher."),
    ),
    "sport": (
        r"\b(sports?|football|soccer|basketball|hockey|baseball|gym|run\w*|hik\w+|yoga|swim\w*|tennis|bik\w+"
        r"|frisbee|exercis\w+|fit\w*|workout)\b",
        ("Suggest a workout to stay fit.", "Which athletic club should I join?"),
    ),
    "animals": (
        r"\b(dogs?|cats?|pets?|horses?|animals?|pupp\w+|kitten|shelter)\b",
        ("Should I adopt a kitten or a puppy?", "Which companion would suit my flat?"),
    ),
    "holidays": (
        r"\b(travel\w*|beach\w*|mountains?|vacations?|ocean|abroad|holiday|trip)\b",
        ("Suggest a holiday destination.", "Where should our next trip go?"),
    ),
    "colours": (
        r"\b(colou?rs?|blue|red|green|purple|pink|orange|yellow|grey|paint\w*)\b",
        ("How should I decorate and paint my bedroom walls?", "Which shade of scarf would suit me?"),
    ),
}
_PREFERENCE = re.compile(
    r"\b(favou?rite|love|like|enjoy|hate|prefer|allergic|vegan|vegetarian|dislike|afraid)\b", re.IGNORECASE
)


@dataclass(frozen=True)
class Needles:
    """Preferences of one topic, questions that need them, and messages about anything else."""

    topic: str
    distractors: tuple[str, ...]
    preferences: tuple[str, ...]
    questions: tuple[str, ...]

    def pairs(self) -> list[tuple[str, str]]:
        """The pairs of a preference and a question that share no word."""
        return [
            (preference, question)
            for preference in self.preferences
            for question in self.questions
            if not set(tokens(preference)) & set(tokens(question))
        ]


def needles(folder: Path, seed: int = 0) -> list[Needles]:
    """Preferences from persona sentences, in the style of PrefEval; every topic draws its own distractors."""
    sentences: dict[str, None] = {}
    chatter: dict[str, None] = {}
    for name in ("test", "valid"):
        content = gzip.decompress(_bytes(folder / "synthetic_persona_chat" / f"{name}.csv.gz")).decode()
        for *personas, chat in list(csv.reader(content.splitlines(keepends=True)))[1:]:
            sentences |= dict.fromkeys(_lines("\n".join(personas)))
            chatter |= dict.fromkeys(line.partition(": ")[2] for line in _lines(chat))
    tasks = folder / "self_instruct_user_oriented" / "user_oriented_instructions.jsonl"
    messages = [
        json.loads(line)["instruction"] for line in _bytes(tasks).decode().splitlines() if line.strip()
    ]
    return [
        _topic(name, list(sentences), [*messages, *chatter], random.Random(f"{seed} {name}"))
        for name in TOPICS
    ]


def _topic(name: str, sentences: list[str], messages: list[str], dice: random.Random) -> Needles:
    about, questions = re.compile(TOPICS[name][0], re.IGNORECASE), TOPICS[name][1]
    preferences = [s for s in sentences if about.search(s) and _PREFERENCE.search(s)]
    others = [m for m in messages if len(m) > 20 and not about.search(m)]
    return Needles(name, tuple(dice.sample(others, DISTRACTORS)), tuple(preferences), questions)


def _lines(text: str) -> Iterable[str]:
    return (line.strip() for line in text.splitlines() if line.strip())


def _bytes(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise BenchmarkError(f"{file.name} is missing: give its folder with --data.") from error
