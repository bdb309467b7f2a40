"""Every byte of every file: what was forgotten is nowhere, whatever happened before it or in the middle."""

import random
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import insert

from persona_sdk.errors import StoreError
from persona_sdk.memory import CubeDraft, MemoryStore, checkpoint, schema
from persona_sdk.memory.residue import changed_pages, gap

Maker = Callable[..., CubeDraft]
SCRIPT = Path(__file__).with_name("erased_process.py")
PAGE = 4096


def left_in(folder: Path, needles: list[str | bytes]) -> list[tuple[str, bytes]]:
    """The files that hold a needle, as UTF-8 or UTF-16 where it is a text."""
    wanted: list[bytes] = []
    for needle in needles:
        if isinstance(needle, bytes):
            wanted.append(needle)
        else:
            wanted += [needle.encode(code) for code in ("utf-8", "utf-16-le", "utf-16-be")]
    files = [file for file in folder.rglob("*") if file.is_file()]
    return [(file.name, needle) for file in files for needle in wanted if needle in file.read_bytes()]


def dirty_gaps(file: Path) -> list[int]:
    """Pages of a database whose unused bytes are not zero: an independent walk over the whole file."""
    data = file.read_bytes()
    assert data[52:56] != bytes(4), "new stores have pointer maps"
    maps = {2 + k * (PAGE // 5 + 1) for k in range(len(data) // PAGE)}
    found = []
    for number in range(1, len(data) // PAGE + 1):
        unused = None if number in maps else gap(data[(number - 1) * PAGE : number * PAGE], number)
        if unused and any(data[(number - 1) * PAGE + unused[0] : (number - 1) * PAGE + unused[1]]):
            found.append(number)
    return found


FIELDS = ("text", "title", "tag", "key", "value", "reference", "session", "licence", "message", "reason")
TENSOR = torch.tensor([3.14159274101257324, -271828.1875, 1.6180340051651, 9.8765432e-12])


def write_canaries(store: MemoryStore, owner: str, note: Maker) -> tuple[list[str], list[str | bytes]]:
    """Cubes with a canary in every place that takes one; their ids, and what to look for."""
    canary = {field: f"zq{field}canary" for field in FIELDS}
    header: dict[str, Any] = {
        "title": canary["title"],
        "tags": (canary["tag"],),
        "attributes": {canary["key"]: [canary["value"]]},
        "origin": {"reference": canary["reference"], "session": canary["session"]},
        "licence": canary["licence"],
    }
    # Some long enough for overflow pages, and enough of them to split, merge and free pages.
    drafts = [note(f"{canary['text']} {n} " * (900 if n % 5 == 0 else 3), **header) for n in range(40)]
    tensors = [
        CubeDraft.of(kind=kind, payload={"zqtensorcanary": TENSOR + n}, **header)  # type: ignore[arg-type]
        for n, kind in enumerate(("parametric", "activation"))
    ]
    ids = list(store.commit(owner, add=[*drafts, *tensors], message=canary["message"]).added)
    store.commit(owner, retire=ids[:9], message=canary["message"])
    store.rollback(owner, 1)
    with store.writing() as connection:
        for name in ids:
            row = {"owner": owner, "cube_id": name, "before": "generated", "state": "activated"}
            row |= {"since": "2026-01-01", "reason": canary["reason"]}
            connection.execute(insert(schema.states).values(**row))
    vectors = [draft.vector.numpy().tobytes() for draft in drafts[:3] if draft.vector is not None]
    return ids, [*canary.values(), "zqtensorcanary", TENSOR.numpy().tobytes(), *vectors]


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("noise", [0, 1])
def test_no_canary_is_left_in_any_file(
    store: MemoryStore, folder: Path, note: Maker, everything: bool, noise: int
) -> None:
    dice = random.Random(noise)
    for step in range(12):  # others, whose rows lie between and whose pages are split and merged
        owner = dice.choice("abc")
        added = store.commit(owner, add=[note(f"{owner}{step} " * dice.choice((1, 40, 700)))] * 5).added
        store.forget(owner, dice.sample(added, 2))
    ids, wanted = write_canaries(store, "zqownercanary", note)
    with pytest.raises(StoreError):  # rolled back, after its rows were written
        store.commit("zqownercanary", add=[note("zqfailedcanary " * 500)], retire=["0" * 32])
    with store.writing() as connection:
        row = {"owner": "zqownercanary", "name": "zqsnapshotcanary", "revision": 1, "at": "2026-01-01"}
        connection.execute(insert(schema.snapshots).values(**row))
    (folder / "personas.db.before-0001.bak").write_bytes(b"zqtextcanary")
    assert {needle for _, needle in left_in(folder, wanted)} >= {b"zqtextcanary", TENSOR.numpy().tobytes()}
    if everything:
        receipt = store.forget_everything("zqownercanary")
        wanted += ["zqsnapshotcanary", "zqownercanary"]
    else:
        receipt = store.forget("zqownercanary", ids)
    wanted.append("zqfailedcanary")
    assert receipt.scrubbed
    assert left_in(folder, wanted) == []
    assert receipt.verify(store)
    assert dirty_gaps(folder / "personas.db") == []
    store.close()
    assert left_in(folder, wanted) == []


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 10**6))
def test_no_page_ever_keeps_what_was_moved_away(tmp_path_factory: pytest.TempPathFactory, seed: int) -> None:
    """SQLite leaves copies of moved rows in its pages; see `persona_sdk.memory.residue`."""
    dice, folder = random.Random(seed), tmp_path_factory.mktemp("bytes") / "store"
    with MemoryStore.open(folder) as store:
        live: dict[str, tuple[str, str]] = {}
        for step in range(8):
            owner = dice.choice("abc")
            names = [f"zq{seed}x{step}x{n}canary" for n in range(dice.randrange(1, 25))]
            texts = [f"{name} " * dice.choice((1, 3, 20, 60, 200)) for name in names]
            added = store.commit(owner, add=[CubeDraft.of(text) for text in texts]).added
            live |= {i: (owner, name) for i, name in zip(added, names, strict=True)}
            gone = []
            for cube_id in dice.sample(sorted(live), min(len(live), dice.randrange(1, 12))):
                owner, name = live.pop(cube_id)
                gone.append(name)
                assert store.forget(owner, [cube_id]).scrubbed
            assert left_in(folder, [*gone]) == []
        assert dirty_gaps(folder / "personas.db") == []
        kept = {i for owner in "abc" for i in (cube.id for cube in store.all_cubes(owner))}
        assert kept == set(live), "only unused bytes were overwritten"
    with closing(sqlite3.connect(folder / "personas.db")) as raw:
        assert raw.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


STEPS = (
    "after the transaction",
    "before blobs are deleted",
    "before the scrub",
    "before pages are cleaned",
    "before the WAL is wiped",
    "after the scrub",
)


@pytest.mark.parametrize("step", STEPS)
def test_the_next_open_finishes_what_was_killed(folder: Path, note: Maker, step: str) -> None:
    with MemoryStore.open(folder) as store:
        store.commit("bob", add=[note("bob stays")])
        _, wanted = write_canaries(store, "alice", note)
    done = subprocess.run([sys.executable, str(SCRIPT), str(folder), step], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    with MemoryStore.open(folder) as store:
        assert store.all_cubes("alice") == []
        assert left_in(folder, wanted) == []
        assert not list(folder.glob("*.pending"))
        assert [cube.text for cube in store.cubes("bob")] == ["bob stays"]
        assert dirty_gaps(folder / "personas.db") == []


def test_another_process_goes_on_after_a_kill(folder: Path) -> None:
    """Its next commit begins a new WAL over the old one, so only the note tells what was not cleaned."""
    with MemoryStore.open(folder) as store:
        dice = random.Random(0)
        for n in range(60):  # rows of both lie in the same pages
            for owner in ("alice", "bob"):
                text = f"zq{owner}{n}canary " * dice.choice((3, 20, 60))
                store.commit(owner, add=[CubeDraft.of(text) for _ in range(dice.randrange(1, 6))])
        command = [sys.executable, str(SCRIPT), str(folder), "before pages are cleaned"]
        assert subprocess.run(command, capture_output=True).returncode == -signal.SIGKILL
        assert dirty_gaps(folder / "personas.db"), "there must be something to clean"
        store.commit("bob", add=[CubeDraft.of("overwrites the old log " * 200_000)])
        assert store.scrub()
        assert left_in(folder, ["zqalice"]) == []
        assert dirty_gaps(folder / "personas.db") == []


def test_what_another_connection_has_cached_does_not_come_back(folder: Path) -> None:
    with MemoryStore.open(folder) as one, MemoryStore.open(folder) as two:
        texts = [f"zqcached{n}canary " * 20 for n in range(200)]
        added = one.commit("alice", add=[CubeDraft.of(text) for text in texts]).added
        two.all_cubes("alice")  # its pages are cached now, gaps and all
        one.forget("alice", added[::2])
        two.commit("alice", add=[CubeDraft.of("written by the other one")], retire=added[1::2])
        two.forget("alice", added[1::2])
        assert left_in(folder, ["canary"]) == []


def test_a_store_of_unknown_history_is_cleaned_from_end_to_end(folder: Path) -> None:
    """Written by something that makes SQLite's own checkpoints, as older versions of this package did."""
    with MemoryStore.open(folder) as store:
        texts = [f"zqold{n}canary " * 20 for n in range(400)]
        added = store.commit("alice", add=[CubeDraft.of(text) for text in texts]).added
    file = folder / "personas.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as raw:
        raw.execute("PRAGMA secure_delete=ON")
        raw.execute("PRAGMA foreign_keys=OFF")
        dice = random.Random(0)
        for cube_id in dice.sample(added, 300):
            raw.execute("DELETE FROM memberships WHERE cube_id = ?", (cube_id,))
            raw.execute("DELETE FROM cubes WHERE id = ?", (cube_id,))
        raw.execute("PRAGMA user_version=0")
        raw.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    assert dirty_gaps(file), "there must be something to clean"
    with MemoryStore.open(folder) as store:
        left = [cube.id for cube in store.all_cubes("alice")]
        assert store.forget("alice", left).scrubbed
        assert left_in(folder, ["canary"]) == []
        assert dirty_gaps(file) == []


def test_the_file_shrinks(store: MemoryStore, folder: Path) -> None:
    store.commit("alice", add=[CubeDraft.of("long " * 4000) for _ in range(50)])
    store.scrub()
    before = (folder / "personas.db").stat().st_size
    assert store.forget_everything("alice").scrubbed
    assert (folder / "personas.db").stat().st_size < before / 4


def test_a_store_without_pointer_maps_is_rewritten_when_much_of_it_is_free(folder: Path) -> None:
    folder.mkdir()
    with closing(sqlite3.connect(folder / "personas.db", isolation_level=None)) as raw:
        raw.execute("PRAGMA auto_vacuum=NONE")
        raw.execute("PRAGMA user_version=0")
        raw.execute("CREATE TABLE t (x)")
        raw.execute("DROP TABLE t")
    with MemoryStore.open(folder) as store:
        store.commit("alice", add=[CubeDraft.of("zqcanary " * 4000) for _ in range(50)])
        store.commit("bob", add=[CubeDraft.of("bob stays")])
        assert store.forget_everything("alice").scrubbed
        assert left_in(folder, ["zqcanary"]) == []
        assert [cube.text for cube in store.cubes("bob")] == ["bob stays"]
        with store.reading() as connection:
            assert connection.exec_driver_sql("PRAGMA freelist_count").scalar() == 0
            assert connection.exec_driver_sql("PRAGMA auto_vacuum").scalar() == 2


def test_a_long_log_is_moved_and_cleaned_along_the_way(
    store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "WAL_LIMIT", 1 << 18)
    wal = folder / "personas.db-wal"
    sizes = []
    for n in range(60):
        store.commit("alice", add=[CubeDraft.of(f"{n} " * 4000)])
        sizes.append(wal.stat().st_size)
    assert max(sizes) < 4 << 18
    assert dirty_gaps(folder / "personas.db") == []


def test_closing_one_store_keeps_the_locks_of_another_one(folder: Path) -> None:
    """POSIX drops all locks of a process on a file with any of its descriptors."""
    one, two = MemoryStore.open(folder), MemoryStore.open(folder)
    two.commit("alice", add=[CubeDraft.of("text")])
    one.close()
    program = (
        "import sqlite3, sys; c = sqlite3.connect(sys.argv[1]); c.execute('SELECT 1 FROM cubes'); c.close()"
    )
    subprocess.run([sys.executable, "-c", program, str(folder / "personas.db")], check=True)
    assert (folder / "personas.db-wal").exists(), "the other process took itself for the last one"
    two.close()


def test_a_program_that_never_closes_its_store_leaves_nothing_unclean(folder: Path) -> None:
    program = """if True:
        import gc, random, sys
        from persona_sdk.memory import CubeDraft, MemoryStore
        store = MemoryStore.open(sys.argv[1])
        added = store.commit("alice", add=[CubeDraft.of(f"zq{n}canary " * 20) for n in range(300)]).added
        with store.writing() as connection:
            for name in random.Random(0).sample(added, 200):
                for table in ("memberships", "cubes"):
                    column = "id" if table == "cubes" else "cube_id"
                    connection.exec_driver_sql(f"DELETE FROM {table} WHERE {column} = ?", (name,))
        del connection, store
        gc.collect()  # closes the connections, and with the last one SQLite makes a checkpoint of its own
    """
    subprocess.run([sys.executable, "-c", program, str(folder)], check=True)
    assert dirty_gaps(folder / "personas.db") == []
    with MemoryStore.open(folder) as store:
        assert store.forget_everything("alice").scrubbed
        assert left_in(folder, ["canary"]) == []
        assert dirty_gaps(folder / "personas.db") == []


@pytest.fixture
def wal(tmp_path: Path) -> Iterator[Path]:
    file = tmp_path / "x.db"
    with closing(sqlite3.connect(file, isolation_level=None)) as raw:
        raw.execute("PRAGMA journal_mode=WAL")
        raw.execute("PRAGMA wal_autocheckpoint=0")
        raw.execute("CREATE TABLE t (x)")
        raw.execute("INSERT INTO t VALUES (zeroblob(20000))")
        yield file.with_name("x.db-wal")


def test_the_pages_in_a_log_are_those_that_changed(wal: Path, tmp_path: Path) -> None:
    pages, end = changed_pages(wal)
    assert set(pages) == {1, 2, 3, 4, 5, 6}  # the schema, the root, and four pages and a bit of zeros
    assert end == wal.stat().st_size
    for size in (0, 10, 32, 33, 56):
        (tmp_path / "cut").write_bytes(wal.read_bytes()[:size])
        assert changed_pages(tmp_path / "cut")[0] == []
    assert changed_pages(tmp_path / "missing") == ([], 0)


def test_gaps_are_those_of_btree_pages_only() -> None:
    leaf = bytes([13, 0, 0, 0, 2, 15, 0, 0]) + bytes(PAGE - 8)
    assert gap(leaf, 7) == (12, 15 << 8)
    assert gap(bytes(100) + leaf[:-100], 1) == (112, 15 << 8)
    assert gap(bytes(PAGE), 7) is None, "a free page"
    assert gap(bytes([0, 0, 0, 9]) + b"\xff" * (PAGE - 4), 7) is None, "an overflow page"
    assert gap(bytes([13, 0, 0, 255, 255, 0, 1, 0]) + bytes(PAGE - 8), 7) is None, "damaged"
