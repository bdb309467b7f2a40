"""The cubes that promotion reads, derives and retires, of one owner at a time."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persona_sdk.errors import NotFoundError
from persona_sdk.library import commit_edit
from persona_sdk.memory import MemCube
from persona_sdk.memory.cube import PersonaKind
from persona_sdk.persona import Persona

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel


class PromotionCubes:
    """The store of a model as promotion sees it."""

    def __init__(self, model: "PersonaModel") -> None:
        self._model = model
        self._store = model.store

    def owners(self) -> list[str]:
        """Everybody who has a memory."""
        return [record.id for record in self._store.personas()]

    def edit(self, owner: str, message: str, changes: Callable[[], dict[str, Any]], **commit: Any) -> None:
        """Commit what `changes` reads from the newest revision."""
        commit_edit(self._store, owner, changes, kind=self.kind(owner), message=message, **commit)

    def retire(self, owner: str, cube_ids: set[str], kind: str, message: str) -> None:
        """Retire those of the cubes that are live and of this kind."""

        def changes() -> dict[str, Any]:
            live = self._store.cubes(owner, kind=kind)
            return {"retire": [cube.id for cube in live if cube.id in cube_ids]}

        if changes()["retire"]:
            self.edit(owner, message, changes)

    def live(self, owner: str, kind: str, semantic_type: str) -> list[MemCube]:
        """The live cubes of a kind and type that this program made: an archive may claim anything."""
        cubes = self._store.cubes(owner, kind=kind)
        return [c for c in cubes if c.header.semantic_type == semantic_type and c.header.trust == "system"]

    def ids(self, owner: str, kind: str, semantic_type: str) -> set[str]:
        """The ids of `live`."""
        return {cube.id for cube in self.live(owner, kind, semantic_type)}

    def ever_attached(self, owner: str) -> set[str]:
        """The adapters that were attached to the owner at any revision."""
        found = [c for c in self._store.all_cubes(owner) if c.header.semantic_type == "attachment"]
        return {source.cube_id for cube in found for source in cube.header.sources}

    def texts(self, owner: str, cube_ids: Sequence[str]) -> list[MemCube]:
        """Those of the texts that are live, oldest first."""
        wanted = set(cube_ids)
        return [cube for cube in self._store.cubes(owner, kind="plaintext") if cube.id in wanted]

    def kind(self, owner: str) -> PersonaKind:
        """Whether the owner is a user or a group.

        Raises:
            NotFoundError: there is no such persona.
        """
        kind = self._store.kind_of(owner)
        if kind is None:
            raise NotFoundError(f"There is no persona {owner!r}.", hint="It may have been forgotten.")
        return kind

    def persona(self, owner: str) -> Persona:
        """The owner's handle."""
        return Persona(self._model, owner, kind=self.kind(owner))
