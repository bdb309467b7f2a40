"""An archive under a passphrase: one AES-256-GCM message around the whole zip file.

    file = "PSDKMEM2" || salt (16) || nonce (12) || AES-256-GCM(key, nonce, zip, "PSDKMEM2")
    key  = scrypt(passphrase, salt, n = 2^15, r = 8, p = 1), 32 bytes

The costs belong to the mark at the beginning and are not read from the file, so that no file can make
opening it dear. A passphrase that can be guessed is no protection: use one that was generated.
"""

import hashlib
import os
from pathlib import Path

from persona_sdk.errors import ArchiveError, CorruptBlobError, InvalidInputError
from persona_sdk.memory import encryption

MARK = b"PSDKMEM2"
_SALT_BYTES = 16
_HEAD = len(MARK) + _SALT_BYTES
_LEAST = _HEAD + encryption.NONCE_BYTES + encryption.TAG_BYTES


def is_sealed(path: Path) -> bool:
    """Whether a file is an archive under a passphrase."""
    with path.open("rb") as file:
        return file.read(len(MARK)) == MARK


def seal(data: bytes, passphrase: str) -> bytes:
    """The bytes of an archive under a passphrase.

    Raises:
        InvalidInputError: the passphrase is empty or the archive is 2 GiB or larger.
        StoreError: the extra ``[crypto]`` is not installed.
    """
    if not passphrase or len(data) > encryption.MAX_BLOB:
        raise InvalidInputError(
            f"{len(data)} bytes cannot be put under this passphrase.",
            hint="Expected a passphrase that is not empty, and less than 2 GiB.",
        )
    salt = os.urandom(_SALT_BYTES)
    return MARK + salt + encryption.seal(encryption.aead(_key(passphrase, salt)), data, MARK)


def unseal(path: Path, passphrase: str | None) -> bytes:
    """Inverse of `seal`, of a file.

    Raises:
        ArchiveError: the passphrase is missing or wrong, or the file was changed.
        StoreError: the extra ``[crypto]`` is not installed.
    """
    if passphrase is None:
        raise ArchiveError("The archive is under a passphrase.", hint="Give it as passphrase=...")
    if not _LEAST <= path.stat().st_size <= _LEAST + encryption.MAX_BLOB:
        raise ArchiveError("The archive has an impossible size.", hint="Take it from its source again.")
    data = path.read_bytes()
    cipher = encryption.aead(_key(passphrase, data[len(MARK) : _HEAD]))
    try:
        return encryption.unseal(cipher, data[_HEAD:], MARK)
    except CorruptBlobError as error:
        raise ArchiveError(
            "The archive does not open with this passphrase.", hint="It is wrong, or the file was changed."
        ) from error


def _key(passphrase: str, salt: bytes) -> bytes:
    return hashlib.scrypt(passphrase.encode(), salt=salt, n=1 << 15, r=8, p=1, maxmem=1 << 26, dklen=32)
