"""Defects of the anchor (MemOS, section 1.6 of the specification), each attempted here or where it is named.

1 rotary phases of merged caches      tests/test_promotion.py
2 tokens that are dropped silently    tests/test_promotion.py
3 a cache handed out by reference     tests/test_promotion.py
4 no identity of the model            tests/test_promotion.py
5 pickle; damage read as emptiness    below, test_attacks.py
6 cubes cloned from anywhere          below
7 LoRA memory is a placeholder        tests/test_promotion.py
8 whoever calls says who they are     below, test_governance.py
9 an index older than its corpus      test_retrieval.py
10 the oldest is dropped at a cap     below, test_scheduler.py
11 deletion flips a flag              test_governance.py
12 writes to nowhere succeed          test_governance.py
13 success though a step failed       below, test_retrieval.py, test_writer.py
14 deletion takes minutes             below
"""

import ast
import inspect
import socket
import sqlite3
from collections.abc import Callable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from persona_sdk.errors import ArchiveError, InvalidInputError, PersonaError, StoreError
from persona_sdk.memory import BoundStore, CubeDraft, MemoryStore, Principal, Retriever, VectorIndex
from persona_sdk.memory.expiry import expire
from persona_sdk.memory.extraction import Extraction
from persona_sdk.memory.writer import MemoryWriter
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
ROOT = Path(__file__).parents[2]


# 5: any error while loading silently gives an empty memory ------------------------------------------------

DAMAGE = {
    "a vector of another length": "UPDATE vectors SET data = data || data WHERE seq = 1",
    "half a number": "UPDATE vectors SET data = substr(data, 1, 7)",
    "a header that is no JSON": "UPDATE cubes SET header = '{'",
    "a header of something else": "UPDATE cubes SET header = '[1, 2]'",
    "a table that is gone": "ALTER TABLE vectors RENAME TO elsewhere",
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_defect_5_what_is_damaged_is_an_error_and_not_an_empty_memory(
    folder: Path, note: Maker, embedder: HashEmbedder, damage: str
) -> None:
    with MemoryStore.open(folder) as store:
        store.commit("alice", add=[note("likes tea"), note("likes dogs")])
    with closing(sqlite3.connect(folder / "personas.db")) as raw:
        raw.execute(DAMAGE[damage])
        raw.commit()
    with MemoryStore.open(folder) as store:
        with pytest.raises(StoreError) as caught:
            Retriever(store, VectorIndex(store), embedder).recall(("alice",), "tea")
        assert "likes" not in str(caught.value)
        if "header" in damage:
            for read in (store.cubes, store.all_cubes):
                with pytest.raises(StoreError, match="damaged"):
                    read("alice")


def test_defect_5_a_store_that_lost_a_page_is_an_error(folder: Path, note: Maker) -> None:
    with MemoryStore.open(folder) as store:
        store.commit("alice", add=[note(f"number {n} " * 40) for n in range(50)])
    file = folder / "personas.db"
    data = bytearray(file.read_bytes())
    for page in range(4096, len(data), 4096):
        data[page : page + 4096] = bytes([7]) * 4096
    file.write_bytes(bytes(data))
    with pytest.raises(StoreError):
        MemoryStore.open(folder).close()


# 6: a cube is cloned from an address and unpickled --------------------------------------------------------

ADDRESSES = (
    "https://evil.example/cube.git",
    "git@evil.example:cube.git",
    "ssh://evil/x",
    "file:///etc",
    "s3://a/b",
)
NETWORK = {"urllib", "http", "socket", "ssl", "ftplib", "requests", "httpx", "aiohttp", "git", "subprocess"}


def test_defect_6_nothing_of_memory_can_reach_the_network() -> None:
    found = []
    for file in (ROOT / "memory").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name.partition(".")[0] for alias in node.names if isinstance(node, ast.Import)}
                names |= {(getattr(node, "module", "") or "").partition(".")[0]}
                found += [(file.name, name) for name in names & NETWORK]
    assert found == []


@pytest.mark.parametrize("address", ADDRESSES)
def test_defect_6_an_address_is_no_store_and_no_archive(
    store: MemoryStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, address: str
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    if "://" in address:  # without, it is the name of a folder
        with pytest.raises(InvalidInputError):
            MemoryStore.open(address)
    with pytest.raises(ArchiveError):
        store.import_archive(address)
    assert store.personas() == []
    assert {p.name for p in tmp_path.rglob("*") if p not in before} <= {"personas.db-wal", "personas.db-shm"}


# 8: no authentication: the caller says who it is, and texts name files that are read ----------------------


def test_defect_8_who_acts_belongs_to_the_handle_and_to_no_call(store: MemoryStore) -> None:
    bound = BoundStore(store, Principal("alice"))
    for name, method in inspect.getmembers(BoundStore, inspect.isfunction):
        named = set(inspect.signature(method).parameters)
        assert not named & {"principal", "user_id", "actor", "as_user", "on_behalf_of"} or name == "__init__"
    with pytest.raises(AttributeError):
        bound.principal = Principal("bob")  # type: ignore[misc]


def test_defect_8_a_path_in_a_message_is_not_read(
    store: MemoryStore, embedder: HashEmbedder, tmp_path: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("zqserverfile")
    writer = MemoryWriter(store, embedder)
    for said in (str(secret), f"Please read {secret}.", f"file://{secret}", f"doc_path={secret}"):
        writer.observe("alice", [{"role": role, "content": said} for role in ("user", "tool")])
    with pytest.raises(InvalidInputError):
        writer.observe("alice", [{"role": "user", "content": "hi", "doc_path": str(secret)}])
    writer.flush("alice")
    assert len(store.cubes("alice")) >= 8
    for cube in store.all_cubes("alice"):
        assert "zqserverfile" not in cube.header.model_dump_json() + (cube.text or "")


def test_defect_8_nothing_here_listens() -> None:
    servers = {"http.server", "socketserver", "fastapi", "flask", "uvicorn", "starlette", "aiohttp"}
    for folder in ("memory", "persona_sdk", "adapters"):
        for file in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Import | ast.ImportFrom):
                    names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
                    assert not names & servers, file


# 10: at a cap, the oldest is dropped ----------------------------------------------------------------------


def test_defect_10_no_number_of_memories_drops_one(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    """The anchor's caps are 20, 480 and 1,500; the first and rarest memory must be found behind 1,600."""
    (first,) = store.commit("alice", add=[note("The spare key is under the red pot.")]).added
    vectors = embedder.encode(["small talk"])[0]
    for part in range(4):
        talk = [
            CubeDraft.of(f"small talk {part} {n}", vector=vectors, encoder=embedder.fingerprint)
            for n in range(400)
        ]
        store.commit("alice", add=talk)
    expire(store, now=datetime.now(UTC) + timedelta(days=3650))
    assert len(store.cubes("alice")) == 1601
    search = Retriever(store, VectorIndex(store), embedder)
    assert search.recall(("alice",), "Where is the spare key?", 1)[0].id == first


# 13: success is reported though a step failed --------------------------------------------------------------


class Failing:
    """An extractor that raises, or gives what is no statement."""

    name = "failing"

    def __init__(self, result: object) -> None:
        self.result = result

    def extract(self, turns: Any) -> Extraction:
        if isinstance(self.result, Exception):
            raise self.result
        return self.result  # type: ignore[return-value]


@pytest.mark.parametrize("result", [RuntimeError("no model"), None, "rubbish"])
def test_defect_13_a_step_that_fails_is_reported_and_the_turn_is_found(
    store: MemoryStore, embedder: HashEmbedder, result: object
) -> None:
    writer = MemoryWriter(store, embedder, extractor=Failing(result))
    writer.observe("alice", "My neighbour grows purple carrots.")
    report = writer.flush("alice")
    assert not report.ok
    found = Retriever(store, VectorIndex(store), embedder).recall(("alice",), "purple carrots", 1)
    assert [passage.text for passage in found] == ["My neighbour grows purple carrots."]


# 14: deleting one user's 800 memories takes 142 s ----------------------------------------------------------


def test_defect_14_erasing_a_persona_is_one_transaction_whatever_it_remembers(
    store: MemoryStore, note: Maker
) -> None:
    """No time is asserted: the number of statements, which is what grew, does not follow that of memories."""
    counts = {}
    assert store._database is not None
    for owner, size in (("few", 40), ("many", 440)):
        store.commit(owner, add=[note(f"{owner} {n}") for n in range(size)])
        seen = {"statements": 0, "commits": 0}

        def statement(*_: object, seen: dict[str, int] = seen) -> None:
            seen["statements"] += 1

        def commit(*_: object, seen: dict[str, int] = seen) -> None:
            seen["commits"] += 1

        engine = store._database.engine
        event.listen(engine, "before_cursor_execute", statement)
        event.listen(engine, "commit", commit)
        receipt = store.forget_everything(owner)
        event.remove(engine, "before_cursor_execute", statement)
        event.remove(engine, "commit", commit)
        assert len(receipt.cube_ids) == size
        counts[owner] = seen
    assert counts["many"] == counts["few"]
    assert 0 < counts["few"]["commits"] <= 2
    assert store.personas() == []


def test_defect_14_a_refused_erasure_of_many_erases_none(store: MemoryStore, note: Maker) -> None:
    added = store.commit("alice", add=[note(f"number {n}") for n in range(600)]).added
    with pytest.raises(PersonaError):
        store.forget("alice", [*added, "0" * 32])
    assert len(store.cubes("alice")) == 600
