"""The reading half of a store. Reads are scoped to one owner, never write, and see one state of the rows."""

from collections.abc import Sequence

from jaxtyping import Float32
from sqlalchemy import select
from torch import Tensor

from persona_sdk.errors import CorruptBlobError, NotFoundError
from persona_sdk.memory import cipher as ciphers
from persona_sdk.memory import revisions, rows
from persona_sdk.memory.cipher import OwnerCipher
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import MemCube, PersonaKind
from persona_sdk.memory.database import translated
from persona_sdk.memory.revisions import PersonaRecord, Revision
from persona_sdk.memory.schema import cubes, personas
from persona_sdk.tensors import Digest, TensorBundle


class StoreReader(StoreCore):
    """What can be read from an open store; `persona_sdk.memory.MemoryStore` adds the writing."""

    def personas(self) -> list[PersonaRecord]:
        """All personas, in the order of their ids."""
        with self.reading() as connection:
            return revisions.records(connection)

    def kind_of(self, owner: str) -> PersonaKind | None:
        """``"user"``, ``"group"``, or None for an unknown persona."""
        with self.reading() as connection:
            return connection.execute(select(personas.c.kind).where(personas.c.owner == owner)).scalar()

    def head(self, owner: str) -> int:
        """The newest revision, 0 when there is none."""
        with self.reading() as connection:
            return revisions.head(connection, owner)

    def mark(self, owner: str) -> tuple[int, str]:
        """The newest revision and a string that changes with every write to the owner; for caches."""
        with self.reading() as connection:
            return revisions.mark(connection, owner)

    def cubes(self, owner: str, *, revision: int | None = None, kind: str | None = None) -> list[MemCube]:
        """The cubes live at a revision (None: the newest; 0: before the first), oldest first.

        Raises:
            NotFoundError: the owner has no such revision.
        """
        with self.reading() as connection:
            at = revisions.resolve(connection, owner, revision)
            return rows.read_cubes(connection, owner, revision=at, kind=kind)

    def all_cubes(self, owner: str) -> list[MemCube]:
        """Every cube of an owner that was not forgotten, live or retired, oldest first."""
        with self.reading() as connection:
            return rows.read_cubes(connection, owner)

    def get(self, owner: str, cube_id: str) -> MemCube:
        """One cube, live or retired.

        Raises:
            NotFoundError: no such cube is the owner's.
        """
        if found := self.lookup(owner, [cube_id]):
            return found[cube_id]
        raise NotFoundError(
            f"No cube {cube_id!r:.60} belongs to {owner!r}.", hint="It may have been forgotten."
        )

    def lookup(self, owner: str, cube_ids: Sequence[str]) -> dict[str, MemCube]:
        """The owner's cubes among `cube_ids`, live or retired; what is not there is left out."""
        with self.reading() as connection:
            return rows.lookup(connection, owner, cube_ids)

    def groups(self, owner: str, *, revision: int | None = None) -> tuple[str, ...]:
        """The groups an owner belongs to at a revision, in the order they were given."""
        with self.reading() as connection:
            at = revisions.resolve(connection, owner, revision)
            return tuple(revisions.group_ids(connection, owner, at))

    def history(self, owner: str) -> list[Revision]:
        """All revisions, oldest first; none for an unknown persona."""
        with self.reading() as connection:
            return revisions.history(connection, owner)

    def load_blob(self, owner: str, digest: Digest) -> TensorBundle:
        """The tensors of one of the owner's cubes, verified.

        Raises:
            NotFoundError: no cube of the owner names the blob, whether or not it exists elsewhere.
            CorruptBlobError: the stored bytes are not what was stored.
        """
        cipher = self._require_blob(owner, digest)
        try:
            with translated(self.folder):
                return self.vault.read(digest, cipher)
        except CorruptBlobError:
            self._require_blob(owner, digest)  # forgotten while we read it
            raise

    def _require_blob(self, owner: str, digest: Digest) -> OwnerCipher:
        with self.reading() as connection:
            cipher = ciphers.reading(connection, owner)
            named = cubes.c.blob == cipher.file_name(digest)
            query = select(cubes.c.seq).where(cubes.c.owner == owner, named).limit(1)
            if connection.execute(query).first() is None:
                raise NotFoundError(
                    f"No blob {digest!r:.20} belongs to {owner!r}.", hint="It may have been forgotten."
                )
            return cipher

    def vectors(
        self, owner: str, encoder: str, *, revision: int | None = None, skip: int = 0
    ) -> tuple[list[str], Float32[Tensor, "n d"]]:
        """Cube ids and embeddings live at a revision, in a stable order, after the first `skip`."""
        with self.reading() as connection:
            at = revisions.resolve(connection, owner, revision)
            return rows.read_vectors(connection, owner, encoder, at, skip=skip)

    def vector_ids(self, owner: str, encoder: str, *, revision: int | None = None) -> list[str]:
        """The ids `vectors` would return, without reading the vectors."""
        with self.reading() as connection:
            at = revisions.resolve(connection, owner, revision)
            return rows.vector_ids(connection, owner, encoder, at)

    def missing_vectors(self, owner: str, encoder: str) -> list[MemCube]:
        """Plaintext cubes, live or retired, that this encoder has not embedded yet."""
        with self.reading() as connection:
            return rows.without_vector(connection, owner, encoder)
