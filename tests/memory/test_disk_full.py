"""A disk without room: nothing is committed, nothing is lost, and commits work again when there is room."""

import shutil
import subprocess
import sys
from collections import deque
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from sqlalchemy import event

from persona_sdk.errors import StoreError, StoreFullError
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.memory.core import StoreCore

SCRIPT = Path(__file__).with_name("disk_full_script.py")


def test_a_database_without_room_commits_nothing(
    store: MemoryStore, folder: Path, weights: Callable[..., CubeDraft]
) -> None:
    """SQLite itself reports the full disk here; works where nothing can be mounted."""
    limit = {"pages": 80}
    database = store._database
    assert database is not None

    @event.listens_for(database.engine, "begin")
    def limited(connection: object) -> None:
        connection.exec_driver_sql(f"PRAGMA max_page_count={limit['pages']}")  # type: ignore[attr-defined]

    def commit() -> int:
        draft = CubeDraft.of("text " * 2000)
        return store.commit("alice", add=[draft, weights(store.head("alice"))]).number

    with pytest.raises(StoreFullError) as caught:
        deque(iter(commit, 1000))
    commits = store.head("alice")
    assert caught.value.retryable
    assert commits > 0
    assert "text text" not in str(caught.value)
    cubes = store.cubes("alice")
    assert len(cubes) == 2 * commits
    named = {cube.blob for cube in cubes if cube.blob}
    assert {file.stem for file in folder.rglob("*.safetensors")} == named, (
        "the refused payload was taken back"
    )
    limit["pages"] = 10_000
    assert store.commit("alice", add=[CubeDraft.of("text " * 2000)]).number == commits + 1


@pytest.mark.parametrize(("number", "kind"), [(28, StoreFullError), (122, StoreFullError), (5, StoreError)])
def test_errors_of_the_disk_while_a_blob_is_written(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch, number: int, kind: type[StoreError]
) -> None:
    draft = CubeDraft.of(kind="parametric", payload={"w": torch.ones(2)})

    def no_room(_: int) -> None:
        raise OSError(number, "fault")

    monkeypatch.setattr("os.fsync", no_room)
    with pytest.raises(StoreError) as caught:
        store.commit("alice", add=[draft])
    assert type(caught.value) is kind
    monkeypatch.undo()
    assert not [file for file in store.folder.rglob("*") if file.suffix in (".tmp", ".safetensors")]
    assert store.commit("alice", add=[draft]).number == 1


def test_a_store_that_turns_read_only_commits_nothing_and_stays_readable(
    store: MemoryStore, folder: Path, weights: Callable[..., CubeDraft]
) -> None:
    """SQLite itself refuses here, whoever runs the test: root may write to read-only folders."""
    added = store.commit("alice", add=[CubeDraft.of("text"), weights(1)]).added
    files = sorted(file.name for file in folder.rglob("*.safetensors"))
    assert store._database is not None

    @event.listens_for(store._database.engine, "begin")
    def locked(connection: object) -> None:
        connection.exec_driver_sql("PRAGMA query_only=1")  # type: ignore[attr-defined]

    attempts: list[Callable[[], object]] = [
        lambda: store.commit("alice", add=[CubeDraft.of("more"), weights(2)]),
        lambda: store.rollback("alice", 0),
        lambda: store.forget("alice", list(added)),
        lambda: store.forget_everything("alice"),
        lambda: store.archive("alice", list(added)),
        lambda: store.snapshot("alice", "now"),
    ]
    for attempt in attempts:
        with pytest.raises(StoreError) as caught:
            attempt()
        assert type(caught.value) is StoreError
        assert not caught.value.retryable
    assert [cube.id for cube in store.cubes("alice")] == list(added)
    assert store.load_blob("alice", store.cubes("alice")[1].blob or "")
    assert not list(folder.glob("*.pending"))
    store.close()
    with MemoryStore.open(folder) as again:
        assert again.scrub()
        assert sorted(file.name for file in folder.rglob("*.safetensors")) == files
        assert again.commit("alice", add=[CubeDraft.of("more")]).number == 2


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "tmpfs", "/mnt"], capture_output=True
    ).returncode
    != 0,
    reason="this machine does not let us mount a small disk; the test above fills the database instead",
)
def test_a_small_disk_fills_up_and_turns_read_only(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    inner = 'mount -t tmpfs -o size=3m tmpfs "$1" && exec "$2" "$3" "$1"'
    command = ["unshare", "-rm", "sh", "-c", inner, "sh", str(disk), sys.executable, str(SCRIPT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "all promises kept", done.stderr


def test_a_writer_that_never_lets_go_is_a_retryable_error(open_store: Callable[..., MemoryStore]) -> None:
    with open_store() as one, open_store(busy_timeout=0.05) as two:
        assert isinstance(two, StoreCore)
        with one.writing():
            with pytest.raises(StoreError) as caught:
                two.commit("alice", add=[CubeDraft.of("text")])
            assert caught.value.retryable
            assert two.head("alice") == 0, "reads do not wait"
        assert two.commit("alice", add=[CubeDraft.of("text")]).number == 1
