"""The model behind the crash benchmark: silent on a sound store, and loud about every kind of damage."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from benchmarks.memory_crash import template
from benchmarks.memory_crash_model import KINDS, Model
from benchmarks.memory_crash_writer import WEIGHTS, Writer
from persona_sdk.memory import MemoryStore, VectorIndex

Line = dict[str, Any]
Opened = tuple[MemoryStore, Model, list[Line]]
SEED, STEPS = 3, 60


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Line]]:
    """A closed store after some writes, and their log."""
    folder, lines = tmp_path_factory.mktemp("crash"), list[Line]()

    def log(line: Line) -> None:
        lines.append(json.loads(json.dumps(line)))

    template(folder)
    with MemoryStore.open(folder / "store") as store:
        writer = Writer(store, log, str(folder / "template.memcube"), SEED)
        for _ in range(STEPS):
            writer.step()
    return folder, lines


@pytest.fixture
def opened(
    written: tuple[Path, list[Line]], tmp_path: Path
) -> Iterator[tuple[MemoryStore, Model, list[Line]]]:

    folder, lines = written
    shutil.copytree(folder, tmp_path / "copy")
    model = Model(template(tmp_path))
    with MemoryStore.open(tmp_path / "copy" / "store") as store:
        yield store, model, lines


def without_receipts(lines: list[Line]) -> list[Line]:
    """Receipts hold when they are written; what was erased may be imported again later."""
    return [{k: v for k, v in line.items() if k != "receipt"} for line in lines]


def test_the_writes_are_of_every_kind_and_explain_the_store(opened: Opened) -> None:
    store, model, lines = opened
    assert {line["begin"] for line in lines if "begin" in line} == set(WEIGHTS)
    model.replay(without_receipts(lines), store)
    assert model.faults(store) == {}


def test_a_write_without_an_answer_is_taken_as_the_store_has_it(opened: Opened) -> None:
    store, model, lines = opened
    lines = without_receipts(lines)
    model.replay(lines[:-1], store)  # made, but its writer was killed before it said so
    assert model.faults(store) == {}
    live = [cube.id for cube in store.cubes("alice")]
    commit = {"begin": "commit", "owner": "alice", "add": [], "retire": live[:1]}
    rollback = {"begin": "rollback", "owner": "alice", "to": 1}
    erase = {"begin": "forget", "owner": "alice", "ids": live[:1]}
    take_in = {"begin": "import", "owner": "import-of-nothing"}
    for begin in (commit, rollback, erase, take_in):  # not made
        model.replay([begin], store)
        assert model.faults(store) == {}


def run_sql(store: MemoryStore, *statements: str) -> None:
    with store.writing() as connection:
        connection.exec_driver_sql("PRAGMA defer_foreign_keys=ON")
        for statement in statements:
            connection.exec_driver_sql(statement)


LIVE = "SELECT cube_id FROM memberships WHERE owner = 'alice' AND to_revision IS NULL"


def lose_a_blob(store: MemoryStore) -> None:
    next(store.vault.folder.rglob("*.safetensors")).unlink()


DAMAGE: dict[str, tuple[str, Callable[[MemoryStore], None]]] = {
    "a revision is gone": (
        "lost",
        lambda store: run_sql(store, "UPDATE personas SET head = head - 1 WHERE owner = 'alice'"),
    ),
    "a persona is gone": ("lost", lambda store: run_sql(store, "DELETE FROM personas WHERE owner = 'bob'")),
    "a membership is gone": (
        "lost",
        lambda store: run_sql(store, f"DELETE FROM memberships WHERE cube_id = ({LIVE} LIMIT 1)"),
    ),
    "a vector is gone": (
        "lost",
        lambda store: run_sql(
            store,
            "DELETE FROM vectors WHERE seq = (SELECT v.seq FROM vectors v JOIN memberships m ON"
            " m.cube_id = v.cube_id WHERE m.to_revision IS NULL LIMIT 1)",
        ),
    ),
    "a revision nobody wrote": (
        "partial",
        lambda store: run_sql(store, "UPDATE personas SET head = head + 1 WHERE owner = 'alice'"),
    ),
    "a persona nobody made": (
        "partial",
        lambda store: run_sql(store, "INSERT INTO personas VALUES ('eve', 'user', 0, '', '2026-01-01')"),
    ),
    "another text": (
        "partial",
        lambda store: run_sql(store, "UPDATE cubes SET text = 'x' WHERE text IS NOT NULL"),
    ),
    "a blob is gone": ("blobs", lose_a_blob),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_counted_as_what_it_is(opened: Opened, name: str) -> None:
    store, model, lines = opened
    kind, damage = DAMAGE[name]
    model.replay(without_receipts(lines), store)
    damage(store)
    assert model.faults(store)[kind] > 0


def test_an_index_that_is_not_what_sql_says_is_counted(
    opened: Opened, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, model, lines = opened
    model.replay(without_receipts(lines), store)
    original = VectorIndex.search

    def short(*args: Any, **options: Any) -> list[tuple[str, float]]:
        return original(*args, **options)[1:]

    monkeypatch.setattr(VectorIndex, "search", short)
    assert set(model.faults(store)) == {"index"}


def test_a_receipt_that_is_not_true_is_counted(opened: Opened) -> None:
    store, model, lines = opened
    model.replay(without_receipts(lines), store)
    (row,) = [line["receipt"] for line in lines if "receipt" in line][:1]
    model.receipts = [json.dumps(json.loads(row) | {"sha256": "0" * 64})]
    assert set(model.faults(store)) == {"receipts"}


def test_every_kind_of_damage_is_tried() -> None:
    assert {kind for kind, _ in DAMAGE.values()} | {"index", "receipts"} == set(KINDS)


def test_a_receipt_is_logged_so_that_it_can_be_verified(opened: Opened) -> None:
    store, model, lines = opened
    model.replay(without_receipts(lines), store)
    (owner,) = [persona.id for persona in store.personas()][:1]
    model.receipts = [json.loads(json.dumps(store.forget_everything(owner).to_json()))]
    assert model.faults(store)["receipts"] == 0
