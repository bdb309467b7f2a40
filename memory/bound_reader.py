"""The reading half of a store as one principal sees it; `persona_sdk.memory.bound` adds the writing.

Methods have the names and meanings of `MemoryStore`. Where the principal is no owner, it is answered with the
live cubes it may read and nothing else of the persona; if there are none, in the words that are used when
there is no such persona, so that *forbidden* and *missing* cannot be told apart.
"""

from collections.abc import Sequence

from jaxtyping import Float32
from torch import Tensor

from persona_sdk.errors import NotFoundError
from persona_sdk.memory import governance, revisions, rows, uses
from persona_sdk.memory.audit import Fault
from persona_sdk.memory.cube import MemCube, PersonaKind
from persona_sdk.memory.events import Event, Head
from persona_sdk.memory.governance import Principal, Right
from persona_sdk.memory.passage import Passage
from persona_sdk.memory.retrieval import Retriever
from persona_sdk.memory.revisions import PersonaRecord, Revision
from persona_sdk.memory.snapshots import MemoryView, Snapshot, When
from persona_sdk.memory.store import MemoryStore
from persona_sdk.memory.uses import Use
from persona_sdk.tensors import Digest, TensorBundle


class BoundReader:
    """What one principal can read of a store."""

    def __init__(self, store: MemoryStore, principal: Principal) -> None:
        self._store = store
        self._principal = principal

    @property
    def principal(self) -> Principal:
        """Who acts; the same as long as the handle is there."""
        return self._principal

    # What is allowed ----------------------------------------------------------------------------------

    def _owns(self, owner: str) -> bool:
        with self._store.reading() as connection:
            return governance.standing(connection, self.principal, owner).everything

    def _require_own(self, owner: str) -> None:
        if not self._owns(owner):
            raise no_persona(owner)

    def _readable(self, owner: str) -> dict[str, MemCube] | None:
        """The live cubes of somebody else that may be read; None for who may read all, live or not."""
        with self._store.reading() as connection:
            rights = governance.standing(connection, self.principal, owner)
            if rights.everything:
                return None
            return {cube.id: cube for cube in governance.readable(connection, owner, rights)}

    def _allowed(self, owner: str) -> dict[str, MemCube] | None:
        """As `_readable`, and at least one.

        Raises:
            NotFoundError: there is none, or no such persona.
        """
        allowed = self._readable(owner)
        if allowed == {}:
            raise no_persona(owner)
        return allowed

    def _require_cubes(self, owner: str, ids: Sequence[str], right: Right) -> dict[str, MemCube]:
        """The cubes, live or not, if there is a right on each of them."""
        with self._store.reading() as connection:
            rights = governance.standing(connection, self.principal, owner)
            found = rows.lookup(connection, owner, ids)
            live = rows.live_among(connection, owner, ids)
        for cube_id in ids:
            cube = found.get(cube_id)
            if cube is None or not rights.may(right, cube, live=cube_id in live):
                raise no_cube(owner, cube_id)
        return found

    # Reading ------------------------------------------------------------------------------------------

    def personas(self) -> list[PersonaRecord]:
        """All personas for the system, else the principal's own, if there is one."""
        if self.principal.kind == "system":
            return self._store.personas()
        if not self._owns(self.principal.id):
            return []
        with self._store.reading() as connection:
            return revisions.records(connection, self.principal.id)

    def kind_of(self, owner: str) -> PersonaKind | None:
        """``"user"`` or ``"group"``; None if the persona is unknown or nothing of it may be read."""
        return None if self._readable(owner) == {} else self._store.kind_of(owner)

    def head(self, owner: str) -> int:
        """The newest revision."""
        return self.mark(owner)[0]

    def mark(self, owner: str) -> tuple[int, str]:
        """The newest revision and the stamp."""
        self._allowed(owner)
        return self._store.mark(owner)

    def cubes(self, owner: str, *, revision: int | None = None, kind: str | None = None) -> list[MemCube]:
        """The cubes live at a revision; of somebody else, those among them that may be read today."""
        allowed = self._allowed(owner)
        found = self._store.cubes(owner, revision=revision, kind=kind)
        return found if allowed is None else [cube for cube in found if cube.id in allowed]

    def all_cubes(self, owner: str) -> list[MemCube]:
        """Every cube that was not forgotten; for the owner only."""
        self._require_own(owner)
        return self._store.all_cubes(owner)

    def get(self, owner: str, cube_id: str) -> MemCube:
        """One cube."""
        if found := self.lookup(owner, [cube_id]):
            return found[cube_id]
        raise no_cube(owner, cube_id)

    def lookup(self, owner: str, cube_ids: Sequence[str]) -> dict[str, MemCube]:
        """The cubes among `cube_ids` that may be read; what is not there is left out."""
        allowed = self._readable(owner)
        if allowed is None:
            return self._store.lookup(owner, cube_ids)
        return {cube_id: allowed[cube_id] for cube_id in cube_ids if cube_id in allowed}

    def groups(self, owner: str, *, revision: int | None = None) -> tuple[str, ...]:
        """The groups of an owner; for the owner only."""
        self._require_own(owner)
        return self._store.groups(owner, revision=revision)

    def history(self, owner: str) -> list[Revision]:
        """All revisions; for the owner only."""
        self._require_own(owner)
        return self._store.history(owner)

    def load_blob(self, owner: str, digest: Digest) -> TensorBundle:
        """The tensors of a cube that may be read."""
        allowed = self._readable(owner)
        if allowed is not None and digest not in {cube.blob for cube in allowed.values()}:
            raise NotFoundError(
                f"No blob {digest!r:.20} belongs to {owner!r}.", hint="It may have been forgotten."
            )
        return self._store.load_blob(owner, digest)

    def vectors(
        self, owner: str, encoder: str, *, revision: int | None = None, skip: int = 0
    ) -> tuple[list[str], Float32[Tensor, "n d"]]:
        """Ids and embeddings live at a revision, of cubes that may be read, after the first `skip`."""
        allowed = self._allowed(owner)
        if allowed is None:
            return self._store.vectors(owner, encoder, revision=revision, skip=skip)
        ids, matrix = self._store.vectors(owner, encoder, revision=revision)
        kept = [row for row, cube_id in enumerate(ids) if cube_id in allowed][skip:]
        return [ids[row] for row in kept], matrix[kept]

    def vector_ids(self, owner: str, encoder: str, *, revision: int | None = None) -> list[str]:
        """The ids `vectors` would return."""
        allowed = self._allowed(owner)
        ids = self._store.vector_ids(owner, encoder, revision=revision)
        return ids if allowed is None else [cube_id for cube_id in ids if cube_id in allowed]

    def missing_vectors(self, owner: str, encoder: str) -> list[MemCube]:
        """Cubes that are not embedded yet; for the owner only."""
        self._require_own(owner)
        return self._store.missing_vectors(owner, encoder)

    def recall(
        self, retriever: Retriever, query: str, k: int = 5, owners: Sequence[str] | None = None
    ) -> list[Passage]:
        """The best passages that may be read, with a retriever of the same store.

        Args:
            retriever: what searches.
            query: what to look for.
            k: how many at most.
            owners: where; None takes the principal's own memory, its groups and what was granted to it.
        """
        return retriever.recall(owners, query, k, principal=self.principal)

    def shared(self) -> dict[str, list[MemCube]]:
        """The cubes that others granted to the principal, or to a group of it, by owner."""
        with self._store.reading() as connection:
            return governance.shared_with(connection, self.principal)

    def grants(self, owner: str) -> list[tuple[str, str, str]]:
        """What an owner has granted: cube, name of the principal, right; for the owner only."""
        self._require_own(owner)
        with self._store.reading() as connection:
            return [*governance.granted_by(connection, owner)]

    def uses(self, owner: str) -> dict[str, Use]:
        """The uses of cubes; for the owner only."""
        self._require_own(owner)
        return uses.of(self._store, owner)

    def snapshots(self, owner: str) -> list[Snapshot]:
        """The named revisions; for the owner only."""
        self._require_own(owner)
        return self._store.snapshots(owner)

    def as_of(self, owner: str, when: When) -> MemoryView:
        """The persona as it was; for the owner only, who keeps what the view can see."""
        self._require_own(owner)
        return self._store.as_of(owner, when)

    def audit(self, owner: str) -> list[Event]:
        """The audit log; for the owner only."""
        self._require_own(owner)
        return self._store.audit(owner)

    def verify_audit(self, owner: str, *, anchor: Head | None = None) -> list[Fault]:
        """What is wrong with the audit log; for the owner only."""
        self._require_own(owner)
        return self._store.verify_audit(owner, anchor=anchor)


def no_persona(owner: str) -> NotFoundError:
    """The one answer to whoever may not know whether there is such a persona."""
    return NotFoundError(f"There is no persona {owner!r:.60}.", hint="It may have been forgotten.")


def no_cube(owner: str, cube_id: str) -> NotFoundError:
    """The one answer to whoever may not know whether there is such a cube."""
    return NotFoundError(f"No cube {cube_id!r:.60} belongs to {owner!r}.", hint="It may have been forgotten.")
