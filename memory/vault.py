"""Content-addressed tensors on disk: ``blobs/<first two hex digits>/<digest>.safetensors``.

A blob is written to a temporary file, synced, renamed and its folder synced, *before* the transaction that
names it. After a crash there may thus be a blob that nothing names, which `candidates` finds later, but
never a name without its blob. Every read recomputes the digest.

The vault knows no owners: who may read what is decided by the rows of the store. In an encrypted store the
file has the name that the owner's cipher gives it instead of the digest, and sealed content.
"""

import re
import time
from collections.abc import Collection
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load, save

from persona_sdk import files
from persona_sdk.errors import CorruptBlobError, InvalidInputError
from persona_sdk.memory.cipher import CLEAR, OwnerCipher
from persona_sdk.tensors import Digest, TensorBundle, digest, freeze

SUFFIX = ".safetensors"
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

    def candidates(self, named: Collection[Digest], *, min_age: float = MIN_AGE) -> list[Path]:
        """Files older than `min_age` seconds whose digest is not among `named`, and old temporary ones."""
        before = time.time() - min_age
        found = []
        for file in self.folder.glob("[0-9a-f][0-9a-f]/*"):
            orphan = file.suffix == SUFFIX and is_digest(file.stem) and file.stem not in named
            try:
                # A partial may be in use by a writer that has not reached its transaction yet.
                oldest = before if orphan else time.time() - max(min_age, MIN_AGE)
                if (orphan or file.suffix == ".tmp") and file.stat().st_mtime < oldest:
                    found.append(file)
            except FileNotFoundError:
                continue
        return found
