"""Durable files: whole or absent, also after a crash. Written beside the target, synced, renamed.

And the one folder for files that need not be durable.
"""

import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def sync(path: Path) -> None:
    """Make a file's content, or a folder's entries, durable; folders only where the system allows that."""
    if os.name == "nt" and path.is_dir():
        return
    handle = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def replacing(target: Path) -> Iterator[Path]:
    """Yield a path to write to; when the block ends well, the file takes the place of `target`.

    When the block or the disk fails, `target` stays as it was and nothing else is left behind.
    """
    partial = target.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        yield partial
        sync(partial)
        os.replace(partial, target)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    sync(target.parent)


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file so that a reader sees all of it or none."""
    with replacing(path) as partial:
        partial.write_bytes(data)


def cache_dir() -> Path:
    """Folder for what can be made anew: weights, fingerprints, measured costs. Not created here.

    ``PERSONA_CACHE`` names it, else it lies in the user's cache folder.
    """
    if chosen := os.environ.get("PERSONA_CACHE"):
        return Path(chosen).expanduser()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(shared) if os.path.isabs(shared) else Path.home() / ".cache") / "persona_sdk"
