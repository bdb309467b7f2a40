"""What SQLite leaves of erased rows in its file, and how it is overwritten in place.

``secure_delete`` zeroes cells and pages as they are freed. One place escapes it: when SQLite rebuilds a
b-tree page it moves cells and keeps their old copies in the gap between the cell pointers and the cells. A
page that was rebuilt once can so hold a row that is deleted elsewhere later:

    | header (8 or 12) | cell pointers (2 each) | gap, unused | cells |
                                                ^ end         ^ start (bytes 5 and 6 of the header)

Rewriting the whole file (``VACUUM``) removes this, but takes minutes on a large store. `overwrite_gaps`
zeroes the gaps of chosen pages instead; `persona_sdk.memory.checkpoint` knows which ones changed and when
nobody writes. Only unused bytes change, so readers cannot tell.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO, ClassVar

_WAL_HEADER, _FRAME_HEADER = 32, 24
_BTREE_HEADER = {2: 12, 5: 12, 10: 8, 13: 8}  # page type -> bytes of its header


def gap(page: bytes, number: int) -> tuple[int, int] | None:
    """The unused bytes ``[end, start)`` of a b-tree page; None for any other page.

    The first byte tells: an overflow or a free page begins with a page number, whose first byte is 0 or 1
    in a file below 128 GiB, which no b-tree page does. Pointer maps are the caller's to leave out.
    """
    at = 100 if number == 1 else 0  # the file's own header comes first
    size = _BTREE_HEADER.get(page[at])
    if size is None:
        return None
    cells, start = struct.unpack_from(">HH", page, at + 3)
    end, start = at + size + 2 * cells, start or 65536
    return (end, start) if end < start <= len(page) else None


def changed_pages(wal: Path, *, current: bool = False) -> tuple[list[int], int]:
    """The numbers of the pages in a WAL file, and where its frames end.

    `current` stops at the first frame that an earlier generation of the WAL left behind.
    """
    try:
        file: BinaryIO = wal.open("rb")
    except FileNotFoundError:
        return [], 0
    with file:
        size, header = os.fstat(file.fileno()).st_size, file.read(_WAL_HEADER)
        if len(header) < _WAL_HEADER:
            return [], 0
        salts, step = header[16:24], _FRAME_HEADER + int.from_bytes(header[8:12], "big")
        pages, at = [], _WAL_HEADER
        while at + step <= size:
            file.seek(at)
            frame = file.read(16)
            if current and frame[8:16] != salts:
                break
            pages.append(int.from_bytes(frame[:4], "big"))
            at += step
        return pages, at


class Descriptor:
    """A file descriptor of a database, one for the whole process.

    POSIX drops *all* locks of a process on a file when it closes *any* descriptor of it, SQLite's too. So
    there is one, and it is closed only when no engine of this process uses the file any more.
    """

    _opened: ClassVar[dict[tuple[int, int], "Descriptor"]] = {}

    def __init__(self, file: Path) -> None:
        self.number = os.open(file, os.O_RDWR | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0))
        self.users = 0

    @classmethod
    def of(cls, file: Path) -> "Descriptor":
        """The process's descriptor of a file."""
        status = file.stat()
        key = (status.st_dev, status.st_ino)
        if key not in cls._opened:
            cls._opened[key] = cls(file)
        return cls._opened[key]

    def release(self) -> None:
        """One user less; the last one closes it."""
        self.users -= 1
        if self.users == 0:
            for key in [key for key, value in self._opened.items() if value is self]:
                del self._opened[key]
            os.close(self.number)


def overwrite_gaps(descriptor: int, pages: Iterable[int] | None, page_size: int, *, maps: bool) -> int:
    """Zero the gaps of pages, None for all, in place and durably; return how many held anything.

    `maps`: the file has pages that map pointers, which are left alone.
    """
    count = os.fstat(descriptor).st_size // page_size
    every = page_size // 5 + 1  # a page of the map comes before as many others
    dirty = 0
    for number in range(1, count + 1) if pages is None else sorted(set(pages)):
        if not 1 <= number <= count or (maps and number > 1 and (number - 2) % every == 0):
            continue
        at = (number - 1) * page_size
        os.lseek(descriptor, at, os.SEEK_SET)
        page = os.read(descriptor, page_size)
        found = gap(page, number)
        if found and (unused := page[found[0] : found[1]]).strip(b"\0"):
            os.lseek(descriptor, at + found[0], os.SEEK_SET)
            os.write(descriptor, bytes(len(unused)))
            dirty += 1
    if dirty:
        os.fsync(descriptor)
    return dirty


def wipe_wal(wal: Path) -> bool:
    """Overwrite what lies behind a WAL's current frames and cut it off; the caller holds the write lock.

    False when its frames are not just the one with which `checkpoint` begins a new WAL.
    """
    pages, end = changed_pages(wal, current=True)
    if set(pages) - {1}:
        return False
    with wal.open("r+b") as file:
        size = os.fstat(file.fileno()).st_size
        file.seek(end)
        for at in range(end, size, 1 << 20):
            file.write(bytes(min(1 << 20, size - at)))
        file.flush()
        os.fsync(file.fileno())
        file.truncate(end)
    return True
