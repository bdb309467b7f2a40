"""Writing memory without a language model: what is drawn, and what an update leaves behind.

extraction    chats between two personas of five sentences (synthetic_persona_chat): how many persona
              sentences are stated by what was drawn, that is, have most of their content words in one
              statement. Words, not an encoder, so nothing is judged by a model.
updates       pairs made here ("I live in X" ... "I moved to Y"): in the five nearest to a question after
              the update, duplicates, contradictions (two values that hold at once) and stale hits (a value
              that no longer holds), against the same texts stored as they are
"""

import csv
import gzip
import itertools
import tempfile
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.harness import BenchmarkError, Row
from benchmarks.memory import Part, Run
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, VectorIndex
from persona_sdk.memory.cube import TextEncoder
from persona_sdk.memory.duplicates import content_words
from persona_sdk.memory.extraction import RuleExtractor
from persona_sdk.memory.salience import SalienceConfig, salient
from persona_sdk.memory.statement import Turn
from persona_sdk.memory.writer import MemoryWriter

AT = datetime(2024, 1, 1, tzinfo=UTC)
K = 5
COVERED = 0.6  # share of a persona sentence's content words that one statement must have
PETS = "Which pets does the user have?"  # two of them contradict nobody
UPDATES = (
    ("I live in {}.", "I moved to {}.", "Where does the user live?", "Paris Lyon Oslo Graz Porto"),
    ("I work as a {}.", "I work as a {} now.", "What is the user's job?", "nurse chef pilot teacher baker"),
    ("I like {}.", "I no longer like {}.", "What does the user like?", "coffee olives jazz chess rain"),
    ("My dog is called {}.", "My dog is called {}!", PETS, "Rex Ida Bo Kit Pip"),
    (
        "My favourite colour is {}.",
        "My favorite colour is {}.",
        "Favourite colour?",
        "red blue green pink grey",
    ),
)


def chats(path: Path) -> Iterator[tuple[list[str], list[str]]]:
    """For each speaker of each chat: the persona's sentences, and what the speaker said."""
    with gzip.open(path, "rt", encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            lines = row["Best Generated Conversation"].splitlines()
            for number in (1, 2):
                said = [
                    line.partition(":")[2].strip() for line in lines if line.startswith(f"User {number}:")
                ]
                persona = [
                    line.strip() for line in row[f"user {number} personas"].splitlines() if line.strip()
                ]
                yield persona, [text for text in said if text]


def covers(statement: str, sentence: str) -> bool:
    """Whether a statement has most of the content words of a persona sentence."""
    wanted = set(content_words(sentence))
    return bool(wanted) and len(wanted & set(content_words(statement))) >= COVERED * len(wanted)


def extraction(path: Path, limit: int | None = None) -> Row:
    """Recall of persona sentences: all, and of those that the speaker says in one utterance at all."""
    extractor, config = RuleExtractor(), SalienceConfig()
    sentences = sayable = found = drawn = apt = 0
    for persona, said in itertools.islice(chats(path), limit):
        turns = [Turn("user", text, AT) for text in said]
        texts = [s.text for s in extractor.extract(turns).statements if salient(s, config)]
        sentences += len(persona)
        sayable += sum(any(covers(text, sentence) for text in said) for sentence in persona)
        found += sum(any(covers(text, sentence) for text in texts) for sentence in persona)
        drawn += len(texts)
        apt += sum(any(covers(text, sentence) for sentence in persona) for text in texts)
    if not sentences:
        raise BenchmarkError(f"{path.name} holds no chats.")
    return {
        "persona sentences": sentences,
        "said in one utterance": sayable,
        "drawn": found,
        "recall of those said": found / max(sayable, 1),
        "statements": drawn,
        "statements about the persona": apt / max(drawn, 1),
    }


def updates(embedder: TextEncoder) -> list[Row]:
    """Duplicates, contradictions and stale hits among the nearest after an update, beside plain storing."""
    rows = []
    for name in ("slots and validity", "stored as said"):
        hits = duplicate = contradiction = stale = 0
        for first, then, question, values in UPDATES:
            for value, other in itertools.pairwise(values.split()):
                said = [
                    first.format(value),
                    first.format(value),
                    then.format(value if "longer" in then else other),
                ]
                with tempfile.TemporaryDirectory() as folder, MemoryStore.open(folder) as store:
                    passages = _told(store, embedder, said, question, plain=name == "stored as said")
                texts = [text for text, _, _ in passages]
                hits += len(texts)
                duplicate += len(texts) - len(set(texts))
                current = [text for text, _, holds in passages if holds]
                stale_now = _stale(said, texts if name == "stored as said" else current, question)
                stale += stale_now
                contradiction += stale_now > 0 and len(set(current)) > 1
        pairs = sum(len(values.split()) - 1 for *_, values in UPDATES)
        rows.append(
            {
                "store": name,
                "updates": pairs,
                "duplicates in top 5": duplicate / max(hits, 1),
                "contradictions in top 5": contradiction / pairs,
                "stale hits": stale / max(hits, 1),
            }
        )
    return rows


def _told(
    store: MemoryStore, embedder: TextEncoder, said: Sequence[str], question: str, *, plain: bool
) -> list[tuple[str, str | None, bool]]:
    """Text, slot and whether it holds at the end, of the nearest statements to a question."""
    if plain:
        vectors = embedder.encode(list(said))
        pairs = zip(said, vectors, strict=True)
        store.commit("u", add=[CubeDraft.of(t, vector=v, encoder=embedder.fingerprint) for t, v in pairs])
    else:
        writer = MemoryWriter(store, embedder)
        for number, text in enumerate(said):
            message: dict[str, Any] = {"role": "user", "content": text, "at": AT + timedelta(days=number)}
            writer.observe("u", [message])
        writer.flush("u")
    found = Retriever(store, VectorIndex(store), embedder).recall(["u"], question, k=4 * K)
    kept = [p for p in found if p.header.semantic_type != "turn"][:K]
    return [(p.text, p.header.slot, p.header.valid(AT + timedelta(days=99))) for p in kept]


def _stale(said: Sequence[str], texts: Sequence[str], question: str) -> int:
    """How many texts still state the value that was replaced."""
    if question == PETS:
        return 0
    old = content_words(said[0])
    return sum(content_words(text) == old and "longer" not in text for text in texts)


def measure(run: Run) -> Part:
    """Both tables. Nothing here is a bar."""
    from persona_sdk.models import SentenceEmbedder

    path = run.data / "synthetic_persona_chat" / "valid.csv.gz"
    if not path.exists():
        raise BenchmarkError("The data folder has no synthetic_persona_chat.")
    limit = 200 if run.quick else None
    run.tell("statements drawn from chats")
    drawn = run.cells.run(f"write-extraction-{limit}", lambda: extraction(path, limit))
    run.tell("what updates leave behind")
    left = run.cells.run("write-updates", lambda: {"rows": updates(SentenceEmbedder("minilm"))})
    note = "write_updates: of ours only statements that hold at the end are counted, as recall gives them."
    return Part(tables={"write_extraction": [drawn], "write_updates": left["rows"]}, notes=[note])
