"""Writers killed with SIGKILL at random moments, and several processes writing to one store."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from persona_sdk.memory import MemoryStore

SCRIPT = Path(__file__).with_name("writer_process.py")
Server = subprocess.Popen[str]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    command = [sys.executable, str(SCRIPT)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as server:
        yield server
        assert server.stdin is not None
        server.stdin.close()
        assert server.wait(30) == 0


def start(server: Server, folder: Path, log: Path, owner: str, seed: int) -> int:
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write(f"{folder} {log} {owner} {seed}\n")
    server.stdin.flush()
    return int(server.stdout.readline())


def ended(server: Server) -> int:
    """Exit status of the next writer to end; minus the signal when it was killed by one."""
    assert server.stdin is not None
    assert server.stdout is not None
    server.stdin.write("wait\n")
    server.stdin.flush()
    return os.waitstatus_to_exitcode(int(server.stdout.readline()))


def acknowledged(log: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in log.read_bytes().splitlines()] if log.exists() else []


def check_whole(store: MemoryStore, owner: str, acks: list[dict[str, object]]) -> None:
    """Everything acknowledged is there, nothing is there in part, and every payload loads."""
    history = store.history(owner)
    assert len(history) - len(acks) in (0, 1), "only the commit in flight may be unacknowledged"
    for revision, ack in zip(history, acks, strict=False):
        assert [revision.number, list(revision.added)] == [ack["number"], ack["added"]]
        assert sorted(revision.retired) == sorted(ack["retired"])  # type: ignore[call-overload]
    live: set[str] = set()
    for revision in history:
        assert len(revision.added) == 2
        live = live - set(revision.retired) | set(revision.added)
    cubes = store.cubes(owner)
    assert {cube.id for cube in cubes} == live
    for cube in cubes:
        if cube.blob is not None:
            assert store.load_blob(owner, cube.blob)["w"].shape == (64, 64)
    texts = {cube.id for cube in cubes if cube.text is not None}
    assert set(store.vector_ids(owner, "e")) == texts


def test_a_killed_writer_leaves_whole_commits(tmp_path: Path, server: Server) -> None:
    dice, folder, log = random.Random(0), tmp_path / "store", tmp_path / "acks"
    for seed in range(25):
        wanted = len(acknowledged(log)) + dice.choice((0, 1, 2, 3))
        pid = start(server, folder, log, "alice", seed)
        patience = time.monotonic() + 60
        while len(acknowledged(log)) < wanted and time.monotonic() < patience:
            time.sleep(0.001)
        time.sleep(dice.uniform(0.0, 0.03))
        os.kill(pid, signal.SIGKILL)
        assert ended(server) == -signal.SIGKILL
        assert len(acknowledged(log)) >= wanted
        with MemoryStore.open(folder) as store:
            check_whole(store, "alice", acknowledged(log))
            history = store.history("alice")
        # A commit may have become durable before its acknowledgement did: acknowledge it now.
        with log.open("a") as handle:
            for revision in history[len(acknowledged(log)) :]:
                ack = {"number": revision.number, "added": revision.added, "retired": revision.retired}
                handle.write(json.dumps(ack) + "\n")
    assert len(acknowledged(log)) > 25


def test_two_processes_write_to_one_store(tmp_path: Path, server: Server) -> None:
    folder = tmp_path / "store"
    owners = ("alice", "bob")
    for seed, owner in enumerate(owners):  # both create the store
        start(server, folder, tmp_path / owner, owner, seed)
    assert [ended(server) for _ in owners] == [0, 0]
    with MemoryStore.open(folder) as store:
        for owner in owners:
            acks = acknowledged(tmp_path / owner)
            assert len(acks) == 15
            check_whole(store, owner, acks)


@pytest.mark.parametrize("step", ["encode", "write", "advance", "insert_cube", "open_cubes", "history"])
def test_an_error_at_any_step_of_a_commit_leaves_nothing(
    store: MemoryStore, folder: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    import torch

    from persona_sdk.memory import CubeDraft, revisions, rows
    from persona_sdk.memory import store as store_module

    store.commit("alice", add=[CubeDraft.of("before")])
    files = {path.name for path in folder.rglob("*")}

    def fail(*args: object, **options: object) -> None:
        raise KeyboardInterrupt

    place = {"encode": store_module, "write": store.vault, "insert_cube": rows}.get(step, revisions)
    monkeypatch.setattr(place, step, fail)
    draft = CubeDraft.of(kind="parametric", payload={"w": torch.ones(2)})
    with pytest.raises(KeyboardInterrupt):
        store.commit("alice", add=[CubeDraft.of("after"), draft])
    monkeypatch.undo()
    assert store.head("alice") == 1
    assert [cube.text for cube in store.cubes("alice")] == ["before"]
    left = {path.name for path in folder.rglob("*")} - files
    assert not [name for name in left if name.endswith((".tmp", ".safetensors"))]
    assert store.commit("alice", add=[draft]).number == 2
