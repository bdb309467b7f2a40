"""Flat files: read back as written, found damaged when they are, gone when forgotten, not kept if full."""

import errno
import os
import threading
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from persona_sdk.engine.low_rank import flat_files
from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.flat_files import SUFFIX, FlatFiles
from persona_sdk.engine.low_rank.host import Block
from persona_sdk.engine.low_rank.sites import single_sites
from persona_sdk.engine.low_rank.slots import Key
from persona_sdk.errors import InvalidInputError

LAYOUT = BlockLayout(8, single_sites({"a": (4, 6)}), frozenset({"a"}))


def key(number: int) -> Key:
    return Key(f"{number:064x}", 8)


def block(seed: int, dtype: torch.dtype = torch.float32) -> Block:
    return Block(LAYOUT, torch.randn(LAYOUT.size, generator=torch.Generator().manual_seed(seed)).to(dtype))


def put(files: FlatFiles, number: int, dtype: torch.dtype = torch.float32) -> bool:
    file = files.begin(key(number), LAYOUT)
    return file is not None and files.write(file, block(number, dtype))


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_block_is_read_back_and_is_a_safetensors_file(tmp_path: Path, dtype: torch.dtype) -> None:
    files = FlatFiles(tmp_path, 1 << 20, dtype)
    assert put(files, 1, dtype)
    found = files.read(key(1), pinned=False)
    assert found is not None
    assert torch.equal(found.data, block(1, dtype).data)
    assert found.layout is LAYOUT
    (path,) = tmp_path.iterdir()
    assert path.stat().st_mode & 0o077 == 0
    with safe_open(path, framework="pt") as stored:
        assert torch.equal(stored.get_tensor("block"), block(1, dtype).data)


def test_what_is_not_there_is_not_found(tmp_path: Path) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    file = files.begin(key(1), LAYOUT)
    assert file is not None
    assert files.read(key(1), pinned=False) is None  # begun, not written
    assert files.read(key(2), pinned=False) is None
    assert files.begin(key(1), LAYOUT) is None  # not twice
    assert files.damaged == 0


@given(order=st.lists(st.integers(0, 9), max_size=30), room=st.integers(0, 4))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bytes_stay_within_the_budget_and_the_oldest_go(tmp_path: Path, order: list[int], room: int) -> None:
    probe = FlatFiles(tmp_path, 1 << 20, torch.float32)
    put(probe, 1)
    one = used(tmp_path)
    probe.close()
    files = FlatFiles(tmp_path, room * one + one // 2, torch.float32)
    recent: list[int] = []
    for number in order:
        if number in recent:
            assert files.read(key(number), pinned=False) is not None
        else:
            assert put(files, number) is (room > 0)
        recent = ([*(other for other in recent if other != number), number])[-room:] if room else []
        assert files.bytes == used(tmp_path) <= files.budget
        assert set(files.keys()) == {key(other) for other in recent}
    files.close()
    assert used(tmp_path) == files.bytes == 0


@given(place=st.integers(0, 10_000), how=st.sampled_from(["flip", "cut", "append", "gone"]))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_file_is_deleted_and_not_believed(tmp_path: Path, place: int, how: str) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    put(files, 1)
    (path,) = tmp_path.iterdir()
    data = bytearray(path.read_bytes())
    if how == "flip":
        data[place % len(data)] ^= 1 << place % 8
    elif how == "cut":
        data = data[: place % len(data)]
    path.write_bytes(data + b"more" if how == "append" else data)
    if how == "gone":
        path.unlink()
    found = files.read(key(1), pinned=False)
    if how == "append":  # all of the block is there and right
        assert found is not None
        files.close()
        return
    assert found is None
    assert files.damaged == 1
    assert files.bytes == len(files) == used(tmp_path) == 0
    assert put(files, 1)
    files.close()


def test_a_full_disk_only_means_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    real, room = os.write, [150]

    def write(handle: int, data: memoryview) -> int:
        if room[0] <= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        done = real(handle, data[: room[0]])
        room[0] -= done
        return done

    monkeypatch.setattr(flat_files.os, "write", write)
    assert not put(files, 1)
    assert used(tmp_path) == files.bytes == len(files) == 0
    assert files.read(key(1), pinned=False) is None
    monkeypatch.setattr(flat_files.os, "write", real)
    assert put(files, 1)


def test_a_short_write_is_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files, real = FlatFiles(tmp_path, 1 << 20, torch.float32), os.write
    monkeypatch.setattr(flat_files.os, "write", lambda handle, data: real(handle, data[:7]))
    assert put(files, 1)
    assert files.read(key(1), pinned=False) is not None


def test_forgetting_overwrites_before_it_deletes(tmp_path: Path) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    put(files, 1)
    put(files, 2)
    path = next(path for path in tmp_path.iterdir() if key(1).digest in path.name)
    with path.open("rb") as still_open:
        files.forget([key(1), key(3)])
        assert not any(still_open.read())
    assert not path.exists()
    assert files.read(key(1), pinned=False) is None
    assert files.read(key(2), pinned=False) is not None
    assert files.bytes == used(tmp_path)


def test_what_is_forgotten_before_it_is_written_is_never_written(tmp_path: Path) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    file = files.begin(key(1), LAYOUT)
    assert file is not None
    files.forget([key(1)])
    assert not files.write(file, block(1))
    assert used(tmp_path) == files.bytes == 0


def test_forgetting_ends_after_a_write_that_is_under_way(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    real, reached, go = os.write, threading.Event(), threading.Event()

    def write(handle: int, data: memoryview) -> int:
        reached.set()
        assert go.wait(5)
        return real(handle, data)

    monkeypatch.setattr(flat_files.os, "write", write)
    file = files.begin(key(1), LAYOUT)
    assert file is not None
    kept: list[bool] = []
    writer = threading.Thread(target=lambda: kept.append(files.write(file, block(1))))
    writer.start()
    assert reached.wait(5)
    forgetter = threading.Thread(target=files.forget, args=([key(1)],))
    forgetter.start()
    forgetter.join(0.05)
    assert forgetter.is_alive()
    go.set()
    forgetter.join(5)
    assert used(tmp_path) == 0
    writer.join(5)
    assert kept == [False]


def test_only_flat_files_are_swept(tmp_path: Path) -> None:
    (tmp_path / f"left{SUFFIX}").write_bytes(b"from a process that died")
    (tmp_path / "notes.txt").write_text("somebody's")
    files = FlatFiles(tmp_path, 1 << 20, torch.float32)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    put(files, 1)
    files.close()
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_folder_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match="folder for flat files"):
        FlatFiles(tmp_path / "file", 1 << 20, torch.float32)


def test_without_a_folder_nothing_is_kept() -> None:
    files = FlatFiles(None, 1 << 20, torch.float32)
    assert files.begin(key(1), LAYOUT) is None
    files.close()


def test_a_digest_that_is_a_path_becomes_no_file(tmp_path: Path) -> None:
    files = FlatFiles(tmp_path / "cache", 1 << 20, torch.float32)
    assert files.begin(Key("../stray", 8), LAYOUT) is None
