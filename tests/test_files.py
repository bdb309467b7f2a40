"""Files are whole or absent."""

import errno
import os

import pytest

from persona_sdk.files import replacing, write_atomically


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_write_that_fails_changes_nothing(tmp_path, monkeypatch, step):
    file = tmp_path / "record.json"
    write_atomically(file, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, step, full)
        with pytest.raises(OSError, match="No space"):
            write_atomically(file, b"new")
    assert [f.name for f in tmp_path.iterdir()] == ["record.json"]
    assert file.read_bytes() == b"old"
    write_atomically(file, b"new")
    assert file.read_bytes() == b"new"


def test_a_block_that_raises_leaves_nothing(tmp_path):
    def interrupted() -> None:
        with replacing(tmp_path / "x") as partial:
            partial.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert list(tmp_path.iterdir()) == []
