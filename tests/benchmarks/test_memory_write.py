"""The measurement of writing: what it counts, on chats made here."""

import csv
import gzip
from pathlib import Path

import pytest

from benchmarks.harness import BenchmarkError
from benchmarks.memory_write import covers, extraction, updates
from persona_sdk.testing import HashEmbedder

HEAD = ("user 1 personas", "user 2 personas", "Best Generated Conversation")


def write(path: Path, *rows: tuple[str, str, str]) -> Path:
    with gzip.open(path, "wt", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([HEAD, *rows])
    return path


def test_recall_counts_what_a_speaker_says_of_the_persona(tmp_path: Path) -> None:
    talk = "User 1: I love to bake cookies.\nUser 2: I am a nurse. How are you?\nUser 1: Fine!"
    row = ("I love to bake cookies.\nI have two dogs.", "I am a nurse.\nI hate rain.", talk)
    found = extraction(write(tmp_path / "chats.csv.gz", row))
    assert (found["persona sentences"], found["said in one utterance"], found["drawn"]) == (4, 2, 2)
    assert found["statements about the persona"] == 1.0


def test_no_chats_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError):
        extraction(write(tmp_path / "none.csv.gz"))


def test_most_of_the_words_are_needed() -> None:
    assert covers("The user loves baking cookies at home.", "I bake cookies at home") is True
    assert covers("The user loves cookies.", "I bake oat cookies") is False
    assert covers("The user is here.", "I am") is False


def test_updates_leave_nothing_stale_and_plain_storing_does() -> None:
    ours, plain = updates(HashEmbedder())
    assert ours["stale hits"] == ours["duplicates in top 5"] == 0
    assert float(str(plain["stale hits"])) > 0
    assert float(str(plain["duplicates in top 5"])) > 0
