"""Content-addressed tensors on disk: ``blobs/<first two hex digits>/<digest>.safetensors``.

A blob is written to a temporary file, synced, renamed and its folder synced, *before* the transaction that
names it. After a crash there may thus be a blob that nothing names, which `candidates` finds later, but
never a name without its blob. Every read recomputes the digest.

A folder ``<two hex>`` whose time of change is `IN_ORDER` was left, or found, without leftovers. Whatever is
created or removed in it changes that time, so a crash cannot leave the mark behind.

The vault knows no owners: who may read what is decided by the rows of the store. In an encrypted store the
file has the name that the owner's cipher gives it instead of the digest, and sealed content.
"""

import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from persona_sdk import files
from persona_sdk.errors import CorruptBlobError, InvalidInputError
from persona_sdk.memory.cipher import CLEAR, OwnerCipher
from persona_sdk.tensors import Digest, TensorBundle, digest, freeze

SUFFIX = ".safetensors"
IN_ORDER = 0  # the time of change, in ns since 1970, of a folder without leftovers
MIN_AGE = 600.0  # seconds; another process may be between writing a blob and naming it

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(value: object) -> bool:
    """Whether `value` has the form of a content digest."""
    return isinstance(value, str) and _DIGEST.fullmatch(value) is not None


def encode(bundle: TensorBundle) -> tuple[Digest, bytes]:
    """A bundle's digest and its safetensors bytes.

    Raises:
        InvalidInputError: a name or a tensor cannot be stored.
    """
    for name in bundle:
        if not name or name == "__metadata__" or "\0" in name:
            raise InvalidInputError(
                f"{name!r} cannot name a tensor.", hint="Use a non-empty name without NUL."
            )
    try:
        plain = {name: tensor.cpu().clone() for name, tensor in freeze(bundle).items()}
        return digest(plain), save(plain)
    except (RuntimeError, TypeError, ValueError, KeyError, SafetensorError) as error:
        raise InvalidInputError(
            f"The tensors cannot be stored: {error}.",
            hint="Expected dense tensors of a dtype safetensors knows.",
        ) from error


def parse(data: bytes) -> TensorBundle:
    """The bundle in safetensors bytes, whatever it is.

    Raises:
        CorruptBlobError: the bytes are no safetensors.
    """
    try:
        return freeze(load(data))
    except (SafetensorError, RuntimeError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CorruptBlobError(f"A blob cannot be read: {error}.", hint=_RESTORE) from error


def decode(data: bytes, expected: Digest) -> TensorBundle:
    """The bundle in safetensors bytes.

    Raises:
        CorruptBlobError: the bytes are no safetensors, or their content has another digest.
    """
    bundle = parse(data)
    found = digest(bundle)
    if found != expected:
        raise CorruptBlobError(f"Blob {expected[:12]} holds the content of {found[:12]}.", hint=_RESTORE)
    return bundle


_RESTORE = "Restore the file from a copy, or forget the cube."


class Vault:
    """The blob files of one store. Errors of the file system pass through as `OSError`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(mode=0o700, exist_ok=True)

    def path(self, name: str) -> Path:
        """Where the file of that name lies."""
        if not is_digest(name):
            raise InvalidInputError(f"{name!r:.80} is no content digest.", hint="Expected 64 hex digits.")
        return self.folder / name[:2] / f"{name}{SUFFIX}"

    def holds(self, name: str) -> bool:
        """Whether there is a file of that name; its content is not read."""
        return self.path(name).is_file()

    def write(self, name: Digest, data: bytes, cipher: OwnerCipher = CLEAR) -> bool:
        """Store encoded bytes durably; False when an intact copy is already there. Repairs a damaged one."""
        try:
            self.read(name, cipher)
            return False
        except CorruptBlobError:
            pass
        target = self.path(cipher.file_name(name))
        if not target.parent.exists():
            target.parent.mkdir(mode=0o700, exist_ok=True)
            files.sync(self.folder)
        files.write_atomically(target, cipher.seal_blob(name, data))
        return True

    def read(self, name: Digest, cipher: OwnerCipher = CLEAR) -> TensorBundle:
        """The tensors filed under a digest, verified.

        Raises:
            CorruptBlobError: the file is missing, damaged or another one's.
        """
        try:
            data = self.path(cipher.file_name(name)).read_bytes()
        except FileNotFoundError as error:
            raise CorruptBlobError(f"Blob {name[:12]} is missing.", hint=_RESTORE) from error
        return decode(cipher.open_blob(name, data), name)

    def delete(self, name: str) -> int:
        """Remove a blob durably and return how many bytes it had; 0 when it was not there."""
        target = self.path(name)
        try:
            size = target.stat().st_size
            target.unlink()
        except FileNotFoundError:
            return 0
        files.sync(target.parent)
        return size

    # Leftovers ----------------------------------------------------------------------------------------

    @contextmanager
    def settling(self, names: Collection[Digest]) -> Iterator[Callable[[], None]]:
        """For whoever changes the folders of `names`: call what is yielded when the files are changed.

        Folders that were in order then count as in order again after the block, unless it raises or
        somebody else has changed them meanwhile.
        """
        folders = {self.path(name).parent for name in names}
        before = {folder: _changed_at(folder) for folder in folders}
        after: dict[Path, int | None] = {}
        yield lambda: after.update({folder: _changed_at(folder) for folder in folders})
        for folder, moment in after.items():
            if before[folder] in (IN_ORDER, None):
                _settle(folder, moment)

    def suspect(self, names: Collection[Digest]) -> None:
        """Have the folders of `names` looked at again, although nothing has changed in them yet."""
        for folder in {self.path(name).parent for name in names}:
            with suppress(FileNotFoundError):
                os.utime(folder)
                files.sync(folder)

    def candidates(
        self, named: Callable[[Sequence[Digest]], Collection[Digest]], *, min_age: float = MIN_AGE
    ) -> list[Path]:
        """Blobs older than `min_age` seconds that nothing names, and old temporary files.

        Only folders that are not known to be in order are looked at, so that this takes the time of what
        there is to do.

        Args:
            named: which of some digests have a row that names them.
            min_age: seconds.
        """
        found = []
        for folder in self.folder.glob("[0-9a-f][0-9a-f]"):
            changed = _changed_at(folder)
            if changed == IN_ORDER:
                continue
            blobs = [file for file in folder.glob(f"*{SUFFIX}") if is_digest(file.stem)]
            kept = named([file.stem for file in blobs]) if blobs else ()
            partials = list(folder.glob("*.tmp"))
            orphans = [file for file in blobs if file.stem not in kept]
            found += [file for file in orphans if _older(file, min_age)]
            # A partial may be in use by a writer that has not reached its transaction yet.
            found += [file for file in partials if _older(file, max(min_age, MIN_AGE))]
            if not orphans and not partials and _older(folder, MIN_AGE):
                _settle(folder, changed)  # nobody who is at work now has begun before
        return found


def _changed_at(folder: Path) -> int | None:
    try:
        return folder.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _older(path: Path, seconds: float) -> bool:
    try:
        return path.stat().st_mtime < time.time() - seconds
    except FileNotFoundError:
        return False


def _settle(folder: Path, moment: int | None) -> None:
    """Mark a folder as in order, if it is as it was at `moment`."""
    with suppress(OSError):  # it is only looked at once more
        if _changed_at(folder) == moment:
            os.utime(folder, ns=(IN_ORDER, IN_ORDER))
