"""The disk tier: one block per file, as a safetensors file of one flat tensor, so that a read is one call.

    <digest>-<rank>.flat:   | 8 bytes: length | JSON header | block |         tensor "block", [size]

The files are a cache of this process: what is in them (layout, checksum) is remembered here, they are not
synced, they are removed when the tier is opened and closed, and one that does not match its CRC-32 is
deleted. Blocks are read with `readinto` the memory they stay in; mapping a file and copying takes as long.
"""

import json
import logging
import os
import threading
import uuid
import zlib
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import BlockLayout, host_tensor
from persona_sdk.engine.low_rank.host import Block
from persona_sdk.engine.low_rank.slots import Key
from persona_sdk.errors import InvalidInputError

logger = logging.getLogger("persona_sdk.engine")

SUFFIX = ".flat"
_TYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64"}


@dataclass(frozen=True, eq=False)
class FlatFile:
    """A file that is there, or is about to be.

    Args:
        bytes: of the file, header included.
        done: set when writing has ended, well or not.
    """

    key: Key
    layout: BlockLayout
    path: Path
    bytes: int
    done: threading.Event = field(default_factory=threading.Event)


class FlatFiles:
    """Blocks in files, the least recently used goes first, within a budget of bytes. Thread-safe.

    A block is written in two parts: `begin` reserves its bytes and is quick, `write` is not. In between and
    afterwards `forget` takes it back.
    """

    def __init__(self, folder: Path | None, budget: int, dtype: torch.dtype) -> None:
        self.budget = budget if folder is not None else 0
        self.bytes = 0
        self.damaged = self.evictions = 0
        self._dtype = dtype
        self._folder = folder
        self._lock = threading.Lock()
        self._files: OrderedDict[Key, FlatFile] = OrderedDict()
        self._checksums: dict[FlatFile, int] = {}  # of those that are completely written
        self._writing: set[FlatFile] = set()
        self._headers: dict[int, bytes] = {}  # by number of elements
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
                self._sweep()
            except OSError as error:
                raise InvalidInputError(
                    f"The folder for flat files cannot be used: {error}.",
                    hint="Give a folder this process may write to, or none.",
                ) from error

    def __len__(self) -> int:
        """Files that can be read."""
        return len(self._checksums)

    def layout(self, key: Key) -> BlockLayout | None:
        """The layout of a block that can be read."""
        with self._lock:
            file = self._files.get(key)
            return file.layout if file in self._checksums else None

    def begin(self, key: Key, layout: BlockLayout) -> FlatFile | None:
        """Reserve room for a block; older files go. None if it is there already, or above the budget."""
        size = len(self._header(layout.size)) + layout.size * self._dtype.itemsize
        with self._lock:
            if self._folder is None or size > self.budget or key in self._files:
                return None
            if not key.digest.isalnum():  # it becomes part of a file name
                return None
            while self.bytes + size > self.budget:
                self._drop(next(iter(self._files.values())))
                self.evictions += 1
            path = self._folder / f"{key.digest}-{key.rank}-{uuid.uuid4().hex[:8]}{SUFFIX}"
            file = self._files[key] = FlatFile(key, layout, path, size)
            self.bytes += size
            return file

    def write(self, file: FlatFile, block: Block) -> bool:
        """Write a block. False if the disk would not take it, or it was forgotten since `begin`."""
        with self._lock:
            if self._files.get(file.key) is not file:
                return False
            self._writing.add(file)
        try:
            return self._write(file, _bytes(block.data))
        finally:
            with self._lock:
                self._writing.discard(file)
            file.done.set()

    def _write(self, file: FlatFile, view: memoryview) -> bool:
        checksum = zlib.crc32(view)
        try:
            handle = os.open(file.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            try:
                for part in (memoryview(self._header(file.layout.size)), view):
                    _write_all(handle, part)
            finally:
                os.close(handle)
        except OSError as error:
            logger.warning("An adapter was not kept on disk: %s", error)
            self._remove(file)
            return False
        with self._lock:
            wanted = self._files.get(file.key) is file
            if wanted:
                self._checksums[file] = checksum
        if not wanted:
            _erase(file)
        return wanted

    def read(self, key: Key, *, pinned: bool) -> Block | None:
        """The block of an adapter, or None: not here, or damaged, and then its file is deleted."""
        with self._lock:
            file = self._files.get(key)
            checksum = self._checksums.get(file) if file is not None else None
            if file is None or checksum is None:
                return None
            self._files.move_to_end(key)
        data = host_tensor(file.layout.size, self._dtype, pinned=pinned)
        view = _bytes(data)
        try:
            with file.path.open("rb", buffering=0) as source:
                header = self._header(file.layout.size)
                whole = source.read(len(header)) == header and source.readinto(view)
        except OSError as error:
            logger.warning("A kept adapter could not be read: %s", error)
            whole = False
        if whole == len(view) and zlib.crc32(view) == checksum:
            return Block(file.layout, data)
        with self._lock:
            # One that was forgotten or evicted while it was read is not damaged.
            self.damaged += self._files.get(key) is file
        self._remove(file)
        return None

    def forget(self, keys: Iterable[Key]) -> None:
        """Overwrite the files of these adapters with zeros and delete them; ends when they are gone."""
        self.erase(self.retract(keys))

    def retract(self, keys: Iterable[Key]) -> list[FlatFile]:
        """The quick half of `forget`: from now on these are not found."""
        with self._lock:
            found = [file for key in keys if (file := self._files.get(key)) is not None]
            for file in found:
                if file not in self._writing:
                    file.done.set()
                self._drop(file, unlink=False)
        return found

    def erase(self, retracted: Iterable[FlatFile]) -> None:
        """The other half: zeros over the files, then no files."""
        for file in retracted:
            file.done.wait()
            _erase(file)

    def keys(self) -> tuple[Key, ...]:
        """All that is here or being written."""
        with self._lock:
            return tuple(self._files)

    def close(self) -> None:
        """Erase all files."""
        self.forget(self.keys())
        self._sweep()

    def _remove(self, file: FlatFile) -> None:
        with self._lock:
            self._drop(file)

    def _drop(self, file: FlatFile, *, unlink: bool = True) -> None:
        """Out of the books and off the disk, unless that happened before."""
        if self._files.get(file.key) is file:
            del self._files[file.key]
            self._checksums.pop(file, None)
            self.bytes -= file.bytes
        if unlink:
            _unlink(file.path)

    def _header(self, size: int) -> bytes:
        """What stands before a block of `size` numbers, as safetensors defines it."""
        header = self._headers.get(size)
        if header is None:
            tensor = {
                "dtype": _TYPES[self._dtype],
                "shape": [size],
                "data_offsets": [0, size * self._dtype.itemsize],
            }
            text = json.dumps({"block": tensor}, separators=(",", ":")).encode()
            text += b" " * (-len(text) % 8)
            header = self._headers[size] = len(text).to_bytes(8, "little") + text
        return header

    def _sweep(self) -> None:
        """Remove what a process that died left here; nothing else is touched."""
        if self._folder is not None:
            for path in self._folder.glob(f"*{SUFFIX}"):
                _unlink(path)


def _bytes(data: Float[Tensor, " size"]) -> memoryview:
    return data.view(torch.uint8).numpy().data


def _write_all(handle: int, part: memoryview) -> None:
    while part:
        part = part[os.write(handle, part) :]


def _erase(file: FlatFile) -> None:
    """Zeros over a file, then no file. A file that cannot be overwritten is deleted all the same."""
    try:
        with file.path.open("r+b", buffering=0) as target:
            zeros = bytes(1 << 20)
            for start in range(0, file.bytes, len(zeros)):
                target.write(zeros[: file.bytes - start])
            os.fsync(target.fileno())
    except FileNotFoundError:
        return  # evicted meanwhile
    except OSError as error:
        logger.warning("A forgotten adapter's file was deleted without being overwritten: %s", error)
    _unlink(file.path)


def _unlink(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        logger.warning("A file of the adapter cache could not be deleted: %s", error)
