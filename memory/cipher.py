"""The seam for encryption at rest: what turns the content of one owner into stored bytes and back.

A store without encryption uses `CLEAR`, which hands everything through and costs nothing. Every place that
reads or writes content asks `reading` or `writing` for the cipher of the owner it is about. Each kind of
content has a pair of methods, so that it is bound to its place (`persona_sdk.memory.encryption`).
"""

from typing import Protocol, runtime_checkable

from sqlalchemy import Connection

from persona_sdk.tensors import Digest

_OPTION = "persona_cipher"


class OwnerCipher:
    """Leaves the content of an owner as it is. Subclasses seal it.

    ``overhead`` is how many bytes a sealed vector is longer. What was changed, or stored in another place,
    does not open: `CorruptBlobError`.
    """

    overhead = 0

    def seal_text(self, cube_id: str, text: str) -> str:
        """The text of a cube."""
        return text

    def open_text(self, cube_id: str, stored: str) -> str:
        """Inverse of `seal_text`."""
        return stored

    def seal_header(self, cube_id: str, header: str, blob: Digest | None) -> tuple[str, str | None]:
        """The header of a cube and the digest of its tensors, as the columns ``header`` and ``blob``."""
        return header, blob

    def open_header(self, cube_id: str, stored: str, file_name: str | None) -> tuple[str, Digest | None]:
        """Inverse of `seal_header`."""
        return stored, file_name

    def seal_vector(self, cube_id: str, encoder: str, data: bytes) -> bytes:
        """An embedding."""
        return data

    def open_vector(self, cube_id: str, encoder: str, stored: bytes) -> bytes:
        """Inverse of `seal_vector`."""
        return stored

    def seal_message(self, number: int, text: str) -> str:
        """The message of a revision."""
        return text

    def open_message(self, number: int, stored: str) -> str:
        """Inverse of `seal_message`."""
        return stored

    def file_name(self, digest: Digest) -> str:
        """What the file of a payload, and the column ``blob``, is called."""
        return digest

    def seal_blob(self, digest: Digest, data: bytes) -> bytes:
        """The file of a payload."""
        return data

    def open_blob(self, digest: Digest, stored: bytes) -> bytes:
        """Inverse of `seal_blob`."""
        return stored


@runtime_checkable
class StoreCipher(Protocol):
    """Knows the cipher of every owner of one store."""

    def of(self, connection: Connection, owner: str, *, create: bool) -> OwnerCipher:
        """The owner's cipher; `create` makes a key in this transaction when there is none."""
        ...


CLEAR = OwnerCipher()


def use(connection: Connection, cipher: StoreCipher | None) -> Connection:
    """Let the functions of this package that are given `connection` use a store's cipher."""
    return connection if cipher is None else connection.execution_options(**{_OPTION: cipher})


def reading(connection: Connection, owner: str) -> OwnerCipher:
    """The cipher to open an owner's content with."""
    return _of(connection, owner, create=False)


def writing(connection: Connection, owner: str) -> OwnerCipher:
    """The cipher to seal an owner's content with, in a write transaction."""
    return _of(connection, owner, create=True)


def _of(connection: Connection, owner: str, *, create: bool) -> OwnerCipher:
    cipher: StoreCipher | None = connection.get_execution_options().get(_OPTION)
    return CLEAR if cipher is None else cipher.of(connection, owner, create=create)
