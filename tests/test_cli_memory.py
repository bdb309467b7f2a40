"""Commands about memory and its audit log, through typer's runner."""

import sqlite3
from contextlib import closing
from datetime import UTC, datetime, timedelta

import pytest

from persona_sdk import PersonaModel, memory_system
from persona_sdk.errors import NotFoundError
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.testing import HashEmbedder

from .test_cli import run


@pytest.fixture
def store(tmp_path, tiny):
    folder = tmp_path / "store"
    with PersonaModel.from_pretrained(tiny, store=folder, embedder=HashEmbedder()) as model:
        alice = model.persona("alice")
        alice.learn("I live in Paris.")
        alice.learn("I moved to Lyon in May 2024.")
        alice.remember("Likes [bold]green[/bold] tea.")
    return str(folder)


def test_memories_are_what_is_believed_and_on_request_more(store):
    listed = run("memory", "list", "alice", "--store", store)
    assert "Lyon since May 2024" in listed
    assert "[bold]green[/bold]" in listed
    assert "Paris" not in listed
    assert "I moved to Lyon in May 2024." in run("memory", "list", "alice", "--turns", "--store", store)
    past = run("memory", "list", "alice", "--history", "--store", store)
    assert "The user lives in Paris." in past
    assert "2024-05-01" in past


def test_a_search_explains_its_scores(store, monkeypatch):
    monkeypatch.setattr(memory_system, "load_embedder", lambda _: HashEmbedder())
    found = run("memory", "search", "alice", "green tea", "-k", "1", "--store", store)
    assert "green" in found
    assert "Lyon" not in found


def test_a_snapshot_can_be_rolled_back_to(store):
    assert "before is revision" in run("memory", "snapshot", "alice", "before", "--store", store)
    with MemoryStore.open(store) as opened:
        opened.commit("alice", add=[CubeDraft.of("Has a cat.")])
    assert "the content of before" in run("personas", "rollback", "alice", "before", "--store", store)
    assert "Has a cat." not in run("memory", "list", "alice", "--store", store)


def test_what_has_expired_is_erased(store):
    with MemoryStore.open(store) as opened:
        past = datetime.now(UTC) - timedelta(days=1)
        opened.commit("alice", add=[CubeDraft.of("Gone by now.", expires_at=past)])
    assert "erased 1 cubes" in run("memory", "expire", "--store", store)
    assert "Gone by now." not in run("memory", "list", "alice", "--history", "--store", store)


def test_the_audit_log_tells_no_texts_and_shows_what_was_changed(store):
    shown = run("audit", "show", "alice", "--store", store)
    assert "user:alice" in shown
    assert "Lyon" not in shown
    assert "ok  alice" in run("audit", "verify", "--store", store)
    number, mark = run("audit", "head", "alice", "--store", store).split()
    assert int(number) > 3
    assert len(mark) == 64
    with closing(sqlite3.connect(f"{store}/personas.db")) as raw:
        raw.execute("DROP TRIGGER IF EXISTS events_are_not_changed")
        for (name,) in raw.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall():
            raw.execute(f"DROP TRIGGER {name}")
        raw.execute("UPDATE events SET actor = 'user:mallory' WHERE owner = 'alice' AND number = 2")
        raw.commit()
    assert "no  alice" in run("audit", "verify", "alice", "--store", store, code=1)


@pytest.mark.parametrize(
    "command", [("memory", "list"), ("memory", "snapshot"), ("audit", "show"), ("audit", "head")]
)
def test_an_unknown_persona_is_an_error(store, command):
    name = ("name",) if command[1] == "snapshot" else ()
    with pytest.raises(NotFoundError):
        run(*command, "nobody", *name, "--store", store)


def test_the_help_of_promote_says_that_it_erases_and_archives():
    told = " ".join(run("memory", "promote", "--help").split())
    assert "erases what has expired" in told
    assert "archives texts" in told
