"""Fills a small disk that the caller has mounted at ``sys.argv[1]``; any broken promise is an exception."""

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from persona_sdk.errors import StoreError, StoreFullError
from persona_sdk.memory import CubeDraft, MemoryStore

torch.set_num_threads(1)


def commit_until_full(store: MemoryStore, payload: bool) -> int:
    """Number of commits that went through before the disk was full."""
    for count in range(10_000):
        try:
            if payload:
                tensors = {"w": torch.full((64, 256), float(store.head("alice")))}
                store.commit("alice", add=[CubeDraft.of(kind="parametric", payload=tensors)])
            else:
                store.commit("alice", add=[CubeDraft.of("text " * 2000)])
        except StoreFullError:
            return count
    raise AssertionError("the disk never became full")


def check(store: MemoryStore, commits: int) -> None:
    """The store holds exactly the commits that were acknowledged, all readable."""
    assert store.head("alice") == commits, (store.head("alice"), commits)
    cubes = store.cubes("alice")
    assert len(cubes) == commits
    for cube in cubes:
        assert cube.blob is None or store.load_blob("alice", cube.blob)
    assert not list(store.folder.rglob("*.tmp"))
    named = {cube.blob for cube in cubes if cube.blob}
    assert {path.stem for path in store.folder.rglob("*.safetensors")} == named


def main(disk: Path) -> None:
    filler = disk / "filler"
    for payload in (False, True):
        folder = disk / f"store-{payload}"
        filler.write_bytes(bytes(1 << 20))
        with MemoryStore.open(folder) as store:
            commits = commit_until_full(store, payload)
            assert commits > 0
            check(store, commits)
            filler.unlink()  # room again
            store.commit("alice", add=[CubeDraft.of("fits now")])
            check(store, commits + 1)
        with MemoryStore.open(folder) as store:
            check(store, commits + 1)
            if payload:
                filler.write_bytes(bytes(shutil.disk_usage(disk).free - (128 << 10)))
                before = sorted(disk.iterdir())
                try:
                    store.export("alice", disk / "too-large.memcube")
                except StoreFullError:
                    assert sorted(disk.iterdir()) == before
                else:
                    raise AssertionError("the export fitted")
                filler.unlink()
            receipt = store.forget_everything("alice")
            assert receipt.scrubbed
            assert receipt.verify(store)
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    for folder in (disk / "store-True", disk / "new"):
        try:
            MemoryStore.open(folder).close()
        except StoreFullError:
            raise
        except StoreError:
            continue
        raise AssertionError("a read-only disk was accepted")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    print("all promises kept")  # noqa: T201
