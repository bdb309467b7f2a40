"""Encryption at rest: one data key per persona, wrapped by a master key that is not in the store.

    stored = nonce || AES-256-GCM(key, nonce, content, place)      nonce: 12 random bytes
    wrapped = id(master) || nonce || AES-256-GCM(master, nonce, key, owner)

    symbol   what                                                where
    master   32 bytes of the application, see `KeyRing`          never stored
    key      32 random bytes of one persona                      table ``keys``, wrapped
    place    owner, and cube, encoder, revision or digest        nowhere: it is recomputed

Sealed: text and header of cubes, vectors, tensors, messages of revisions. Since the place is authenticated,
rows that were swapped, between owners too, do not open. Files of tensors are named HMAC(key, digest), so that
equal content of two personas does not look equal. Clear: ids of personas, cubes and groups, kinds, times,
slots, encoders, sizes, who derives from whom, names of snapshots, reasons of states, the audit log. A slot is
a word of the application ("lives_in") that is searched for in SQL; put nothing secret into its name.
In memory, and in archives without a passphrase, everything is clear.

Erasing a persona erases its key, so copies of its content cannot be read any more. A backup that holds the
``keys`` table too still opens with the master key of its time: change the master key (all keys are
wrapped anew, no data is touched) and destroy the old one, or keep that table out of backups.
"""

import base64
import hashlib
import hmac
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, Self

from sqlalchemy import Connection, insert, select, update

from persona_sdk.errors import CorruptBlobError, InvalidInputError, MasterKeyError, StoreError
from persona_sdk.memory.cipher import OwnerCipher
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.events import STORE
from persona_sdk.memory.schema import FORGOTTEN, keys, personas, to_column
from persona_sdk.tensors import Digest

KEY_BYTES, NONCE_BYTES, TAG_BYTES = 32, 12, 16
MAX_BLOB = (1 << 31) - 1 - TAG_BYTES  # the library's limit for one call
_ID_BYTES = 8
_BLANKED = ("", FORGOTTEN)  # messages that say nothing are kept as they are


class KeyRing:
    """The master key, as 32 bytes or as something that gives them whenever a key is wrapped or unwrapped."""

    def __init__(self, master: bytes | Callable[[], bytes]) -> None:
        self._master = master
        aead(self.master())

    @classmethod
    def from_environment(cls, name: str = "PERSONA_MASTER_KEY") -> Self:
        """The master key in an environment variable, as 64 hex digits or in base64.

        Raises:
            MasterKeyError: the variable is not set or holds no such key.
        """

        def read() -> bytes:
            value = os.environ.get(name, "")
            try:
                return bytes.fromhex(value) if len(value) == 64 else base64.b64decode(value, validate=True)
            except ValueError:
                return b""

        return cls(read)

    def master(self) -> bytes:
        """The key itself.

        Raises:
            MasterKeyError: it does not have 32 bytes.
        """
        key = self._master() if callable(self._master) else self._master
        if not isinstance(key, bytes) or len(key) != KEY_BYTES:
            raise MasterKeyError(
                "There is no usable master key.",
                hint=f"Expected {KEY_BYTES} random bytes; nothing was changed.",
            )
        return key

    def wrap(self, owner: str, key: bytes) -> bytes:
        """A data key as it is stored."""
        master = self.master()
        return _name(master) + seal(aead(master), key, _place("key", owner))

    def unwrap(self, owner: str, wrapped: bytes) -> bytes:
        """Inverse of `wrap`.

        Raises:
            MasterKeyError: it was wrapped by another master key, for another owner, or is damaged.
        """
        master = self.master()
        if wrapped[:_ID_BYTES] == _name(master):
            try:
                return unseal(aead(master), wrapped[_ID_BYTES:], _place("key", owner))
            except CorruptBlobError:
                pass
        raise MasterKeyError(
            "A data key does not open with this master key.",
            hint="Open the store with the key it was last given; nothing was changed.",
        )


class PersonaCipher(OwnerCipher):
    """Seals and opens the content of one owner; see `persona_sdk.memory.cipher`."""

    overhead = NONCE_BYTES + TAG_BYTES

    def __init__(self, owner: str, key: bytes) -> None:
        self._owner = owner
        self._naming = hmac.digest(key, b"persona_sdk file names", "sha256")
        self._aead = aead(key)

    def seal_text(self, cube_id: str, text: str) -> str:
        """The text of a cube, as base64."""
        return self._seal_str(text, "text", cube_id)

    def open_text(self, cube_id: str, stored: str) -> str:
        """Inverse of `seal_text`."""
        return self._open_str(stored, "text", cube_id)

    def seal_header(self, cube_id: str, header: str, blob: Digest | None) -> tuple[str, str | None]:
        """Header and digest, sealed as one, and the name of the file."""
        name = None if blob is None else self.file_name(blob)
        return self._seal_str(f"{blob or ''}\n{header}", "header", cube_id), name

    def open_header(self, cube_id: str, stored: str, file_name: str | None) -> tuple[str, Digest | None]:
        """Inverse of `seal_header`."""
        blob, _, header = self._open_str(stored, "header", cube_id).partition("\n")
        if file_name != (self.file_name(blob) if blob else None):
            raise _changed()
        return header, blob or None

    def seal_vector(self, cube_id: str, encoder: str, data: bytes) -> bytes:
        """An embedding."""
        return seal(self._aead, data, _place("vector", self._owner, cube_id, encoder))

    def open_vector(self, cube_id: str, encoder: str, stored: bytes) -> bytes:
        """Inverse of `seal_vector`."""
        return unseal(self._aead, stored, _place("vector", self._owner, cube_id, encoder))

    def seal_message(self, number: int, text: str) -> str:
        """The message of a revision; one that says nothing stays as it is."""
        return text if text in _BLANKED else self._seal_str(text, "message", str(number))

    def open_message(self, number: int, stored: str) -> str:
        """Inverse of `seal_message`."""
        return stored if stored in _BLANKED else self._open_str(stored, "message", str(number))

    def file_name(self, digest: Digest) -> str:
        """HMAC of the digest, so that the name tells nothing about the content."""
        return hmac.digest(self._naming, digest.encode(), "sha256").hex()

    def seal_blob(self, digest: Digest, data: bytes) -> bytes:
        """The file of a payload.

        Raises:
            InvalidInputError: it is 2 GiB or larger.
        """
        if len(data) > MAX_BLOB:
            raise InvalidInputError(
                f"A payload of {len(data)} bytes cannot be encrypted.", hint="Split it into several cubes."
            )
        return seal(self._aead, data, _place("blob", self._owner, digest))

    def open_blob(self, digest: Digest, stored: bytes) -> bytes:
        """Inverse of `seal_blob`."""
        return unseal(self._aead, stored, _place("blob", self._owner, digest))

    def _seal_str(self, text: str, what: str, name: str) -> str:
        return base64.b64encode(seal(self._aead, text.encode(), _place(what, self._owner, name))).decode()

    def _open_str(self, stored: str, what: str, name: str) -> str:
        try:
            data = base64.b64decode(stored, validate=True)
        except ValueError as error:
            raise _changed() from error
        return unseal(self._aead, data, _place(what, self._owner, name)).decode()


class Encryption:
    """The ciphers of one encrypted store. Thread-safe; unwrapped keys are kept while it is open."""

    def __init__(self, ring: KeyRing) -> None:
        self._rings: tuple[KeyRing, ...] = (ring,)  # two while the master key is being changed
        self._lock = threading.Lock()
        self._known: dict[str, tuple[bytes, PersonaCipher]] = {}

    def of(self, connection: Connection, owner: str, *, create: bool) -> PersonaCipher:
        """The owner's cipher. Its row is read each time: another process may have erased the persona.

        Raises:
            MasterKeyError: the key was wrapped by another master key.
        """
        query = select(keys.c.wrapped).where(keys.c.owner == owner)
        wrapped = connection.execute(query).scalar()
        if wrapped is None:
            # Without a row there is no content either: a key of the moment then finds and opens nothing.
            key = os.urandom(KEY_BYTES)
            if create:
                _insert_key(connection, self._current(connection), owner, key)
            return PersonaCipher(owner, key)
        with self._lock:
            known = self._known.get(owner)
        if known is None or known[0] != wrapped:
            known = (wrapped, PersonaCipher(owner, self._unwrap(owner, wrapped)))
            with self._lock:
                self._known[owner] = known
        return known[1]

    def drop(self, owner: str) -> None:
        """Let go of an owner's key."""
        with self._lock:
            self._known.pop(owner, None)

    @contextmanager
    def changing_to(self, ring: KeyRing) -> Iterator[None]:
        """Around the transaction of `rotate`: open keys with either master key; with `ring` alone after it.

        With the old one alone again if it fails.
        """
        before = self._rings
        self._rings = (*before, ring)
        try:
            yield
            self._rings = (ring,)
        except BaseException:
            self._rings = before
            raise
        finally:
            with self._lock:
                self._known.clear()

    def rotate(self, connection: Connection, ring: KeyRing) -> int:
        """Wrap every key with another master key; how many there are."""
        rows = connection.execute(select(keys.c.owner, keys.c.wrapped)).all()
        for row in rows:
            wrapped = ring.wrap(row.owner, self._unwrap(row.owner, row.wrapped))
            connection.execute(update(keys).where(keys.c.owner == row.owner).values(wrapped=wrapped))
        return len(rows)

    def _unwrap(self, owner: str, wrapped: bytes) -> bytes:
        *others, last = self._rings
        for ring in others:
            with suppress(MasterKeyError):
                return ring.unwrap(owner, wrapped)
        return last.unwrap(owner, wrapped)

    def _current(self, connection: Connection) -> KeyRing:
        """The master key that is in use in this transaction, whoever changed it: that of the store's key.

        Raises:
            MasterKeyError: another process has changed it.
        """
        wrapped = connection.execute(select(keys.c.wrapped).where(keys.c.owner == STORE)).scalar_one()
        for ring in self._rings:
            with suppress(MasterKeyError):
                ring.unwrap(STORE, wrapped)
                return ring
        raise MasterKeyError(
            "The store's master key was changed.", hint="Open the store again with the new one."
        )


def unlock(connection: Connection, ring: KeyRing | None) -> Encryption | None:
    """The encryption of a store, in a write transaction; a store without personas may begin to have it.

    Raises:
        MasterKeyError: the master key is missing or another one, or the store is not encrypted.
    """
    wrapped = connection.execute(select(keys.c.wrapped).where(keys.c.owner == STORE)).scalar()
    if ring is None:
        if wrapped is None:
            return None
        raise MasterKeyError(
            "The store is encrypted.", hint="Open it with encryption=KeyRing(...); nothing was changed."
        )
    if wrapped is not None:
        ring.unwrap(STORE, wrapped)
    elif connection.execute(select(personas.c.owner).limit(1)).first():
        raise MasterKeyError(
            "The store is not encrypted.",
            hint="Open it without a key, export its personas, and import them into a new encrypted store.",
        )
    else:
        _insert_key(connection, ring, STORE, os.urandom(KEY_BYTES))
    return Encryption(ring)


def aead(key: bytes) -> Any:
    """AES-256-GCM with a key.

    Raises:
        StoreError: the extra ``[crypto]`` is not installed.
    """
    try:
        from cryptography.hazmat.primitives.ciphers.aead import AESGCM
    except ImportError as error:
        raise StoreError(
            "Encryption needs the package cryptography.", hint="pip install 'persona-sdk[crypto]'."
        ) from error
    return AESGCM(key)


def _insert_key(connection: Connection, ring: KeyRing, owner: str, key: bytes) -> None:
    values = {"wrapped": ring.wrap(owner, key), "created_at": to_column(utc_now())}
    connection.execute(insert(keys).values(owner=owner, **values))


def _place(what: str, *names: str) -> bytes:
    return "\0".join(("persona_sdk 1", what, *names)).encode()


def seal(cipher: Any, data: bytes, place: bytes) -> bytes:
    """``nonce || AES-256-GCM``, with the cipher of `aead`; `place` is authenticated and not part of it."""
    nonce = os.urandom(NONCE_BYTES)
    sealed: bytes = cipher.encrypt(nonce, data, place)
    return nonce + sealed


def unseal(cipher: Any, stored: bytes, place: bytes) -> bytes:
    """Inverse of `seal`.

    Raises:
        CorruptBlobError: it was changed, or sealed with another key or for another place.
    """
    from cryptography.exceptions import InvalidTag

    try:
        opened: bytes = cipher.decrypt(stored[:NONCE_BYTES], stored[NONCE_BYTES:], place)
    except (InvalidTag, ValueError) as error:
        raise _changed() from error
    return opened


def _changed() -> CorruptBlobError:
    return CorruptBlobError(
        "Encrypted content was changed, or does not belong where it is stored.",
        hint="Restore it from a copy, or forget the cube.",
    )


def _name(master: bytes) -> bytes:
    return hashlib.sha256(b"persona_sdk master key\0" + master).digest()[:_ID_BYTES]
