"""The adapters of a store: parametric MemCubes with a name, and the attachments that use them.

An adapter is a cube of its owner (a user, a group, or ``shared``) and is called ``owner/name``. Attaching
it writes a second, small cube into the persona's own history: which adapter cube, how strong, with what
state. So attaching is a commit, rolling back detaches, and forgetting an adapter retires every attachment.
An attachment is pinned to one version of the adapter; attach again to take a newer one.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any
from weakref import WeakValueDictionary

from persona_sdk import preferred, registry
from persona_sdk.adapter_cache import AdapterCache
from persona_sdk.adapters import Adapter, AdapterRequest
from persona_sdk.adapters.base import controls_of
from persona_sdk.config import FrozenConfig, validate_id
from persona_sdk.errors import (
    IncompatibleAdapterError,
    InvalidInputError,
    NotFoundError,
    RevisionConflictError,
)
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, MemoryStore, Origin, Revision, Source
from persona_sdk.models import LanguageModel
from persona_sdk.plan import Contribution

SHARED = "shared"
_TRIES = 50


class AdapterFacts(FrozenConfig):
    """What an adapter's cube says in its attributes; ``report`` is what examined it, if anything did."""

    family: str
    base: str
    config: dict[str, Any]
    report: dict[str, Any] | None = None


class AttachmentFacts(FrozenConfig):
    """What an attachment's cube says in its attributes."""

    weight: float
    state: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Attachment:
    """One use of an adapter by a persona."""

    cube_id: str
    title: str
    adapter: Source
    weight: float
    state: Mapping[str, Any]

    @property
    def name(self) -> str:
        """``owner/name`` of the adapter."""
        return f"{self.adapter.owner}/{self.title}"


@dataclass(frozen=True)
class Loaded:
    """An adapter and the name and revision it goes by in plans: ``nurses/tone@2``."""

    adapter: Adapter
    label: str


class Unused(StrEnum):
    """Why an attachment takes no part."""

    OUT_OF_REACH = "out of reach"
    TWICE = "attached twice"
    ABSENT = "not in this store"


class AdapterLibrary:
    """Named adapters in a memory store; reachable as ``model.adapters``."""

    def __init__(self, model: LanguageModel, store: MemoryStore) -> None:
        self._model = model
        self._store = store
        # Handles in use, by id: they know whether an owner without a commit is a user or a group.
        self.handles: WeakValueDictionary[str, Any] = WeakValueDictionary()
        self._cache = AdapterCache(self._read)
        store.on_forget(lambda _owner: self._cache.clear())

    def add(
        self,
        name: str,
        adapter: Adapter,
        *,
        sources: Sequence[MemCube] = (),
        kind: str | None = None,
        report: Mapping[str, Any] | None = None,
        origin: Origin | None = None,
        message: str | None = None,
    ) -> MemCube:
        """File an adapter under ``owner/name`` (``name`` alone means ``shared/name``); replaces an old one.

        For a user's own adapters see `Persona.add_adapter`.

        Args:
            name: the owner's id and a name of its own, e.g. ``"nurses/tone"``.
            adapter: any family's adapter, made for this base model.
            sources: the memories it was trained from. Forgetting one of them retires the adapter.
            kind: ``"user"`` or ``"group"``, for an owner that is not in the store yet; if left out, that of
                its handle, else a group.
            report: what an examination of it found; kept in its attributes.
            origin: where it came from.
            message: a note for the history.

        Raises:
            IncompatibleAdapterError: made for another base model.
        """
        owner, title = split_name(name)
        adapter.check_base(self._model.fingerprint, name=f"Adapter {name!r}")
        draft = CubeDraft(
            kind="parametric",
            payload=adapter.tensors,
            header=CubeHeader(
                title=title,
                semantic_type="adapter",
                trust="system",
                origin=origin or Origin(),
                sources=tuple(Source.of(cube) for cube in sources),
                attributes=AdapterFacts(
                    family=adapter.family,
                    base=adapter.base,
                    config=adapter.config.model_dump(mode="json"),
                    report=None if report is None else dict(report),
                ).model_dump(),
            ),
        )
        handle = self.handles.get(owner)
        kind = kind or self._store.kind_of(owner) or (handle.kind if handle is not None else "group")

        def changes() -> dict[str, Any]:
            return {"retire": [cube.id for cube in self._adapters(owner) if cube.header.title == title]}

        note = message or f"adapter {name}"
        revision = commit_edit(self._store, owner, changes, kind=kind, add=(draft,), message=note)
        return self._store.get(owner, revision.added[0])

    def names(self, owner: str | None = None) -> list[str]:
        """Names of all adapters, or of one owner's."""
        owners = [record.id for record in self._store.personas()] if owner is None else [owner]
        return sorted(f"{who}/{cube.header.title}" for who in owners for cube in self._adapters(who))

    def get(self, name: str) -> Adapter:
        """Load an adapter by name."""
        return self._cache.get(self.find(name))

    def find(self, name: str) -> MemCube:
        """The cube that holds an adapter.

        Raises:
            NotFoundError: no such adapter.
        """
        owner, title = split_name(name)
        for cube in self._adapters(owner):
            if cube.header.title == title:
                return cube
        known = ", ".join(self.names(owner)[:5]) or "none yet"
        raise NotFoundError(
            f"There is no adapter {name!r}.", hint=f"Adapters of {owner!r}: {known}. See model.adapters.add."
        )

    def attachment(
        self, name: str, *, weight: float, state: Mapping[str, Any]
    ) -> tuple[CubeDraft, Contribution]:
        """What a persona commits to attach an adapter, and what that version of it would add to a plan."""
        cube = self.find(name)
        contribution = self._cache.get(cube).contribute(state, AdapterRequest(origin=name, weight=weight))
        header = CubeHeader(
            title=cube.header.title,
            semantic_type="attachment",
            trust="system",
            sources=(Source.of(cube),),
            attributes=AttachmentFacts.parse({"weight": weight, "state": dict(state)}).model_dump(),
        )
        return CubeDraft(kind="parametric", header=header), contribution

    def attachments(self, owner: str, *, revision: int | None = None) -> list[Attachment]:
        """Everything attached to a persona at a revision, oldest first."""
        return _attachments(self._store.cubes(owner, revision=revision, kind="parametric"))

    def revisions(self, persona: str) -> dict[str, int]:
        """The newest revisions of a persona and then of its groups, in the order they apply."""
        own = self._store.head(persona)
        groups = self._store.groups(persona, revision=own)
        return {persona: own} | {group: self._store.head(group) for group in groups}

    def preference(self, persona: str, weights: Mapping[str, float]) -> CubeDraft:
        """What a persona commits to prefer something; see `persona_sdk.preferred`.

        Raises:
            InvalidInputError: a name that no adapter in its reach has, or weights that one cannot use.
        """
        reach = [(found.adapter, at.state) for at, found in self._loaded(self.revisions(persona))]
        return preferred.draft(weights, reach)

    def preferences(self, owner: str, *, revision: int | None = None) -> list[MemCube]:
        """The cube of what a persona or group itself prefers at a revision, if it does."""
        return preferred.stated(self._store.cubes(owner, revision=revision, kind="parametric"))

    def controls(self, persona: str) -> dict[str, dict[str, float]]:
        """Values of all controls in a persona's reach, by adapter."""
        found: dict[str, dict[str, float]] = {}
        for attachment, loaded in self._loaded(self.revisions(persona)):
            if values := controls_of(loaded.adapter, attachment.state):
                found.setdefault(attachment.name, dict(values))
        return found

    def reachable(self, revisions: Mapping[str, int]) -> Iterator[tuple[str, Attachment, Loaded | Unused]]:
        """Every attachment of these owners, with whose it is, and its adapter or why that takes no part.

        A persona and its groups reach what one of them or `SHARED` owns, once: where it is attached first.
        Its state is that under everybody's preferences. Raises like `load`.
        """
        used: set[str] = set()
        cubes = {
            owner: self._store.cubes(owner, revision=revision, kind="parametric")
            for owner, revision in revisions.items()
        }
        preferences = [preferred.weights_of(cubes[owner]) for owner in reversed(list(revisions))]
        for owner in revisions:
            for attachment in _attachments(cubes[owner]):
                where = attachment.adapter
                if where.owner not in (*revisions, SHARED):
                    yield owner, attachment, Unused.OUT_OF_REACH
                elif where.cube_id in used:
                    yield owner, attachment, Unused.TWICE
                elif (loaded := self.load(attachment)) is None:
                    yield owner, attachment, Unused.ABSENT
                else:
                    used.add(where.cube_id)
                    state = preferred.applied(loaded.adapter, attachment.state, preferences)
                    yield owner, replace(attachment, state=state), loaded

    def load(self, attachment: Attachment) -> Loaded | None:
        """The adapter an attachment is pinned to; None if it is not in this store, as after importing a
        member without the group.

        Raises:
            CorruptBlobError: its stored weights are damaged.
        """
        where = attachment.adapter
        cube = self._store.lookup(where.owner, [where.cube_id]).get(where.cube_id)
        return None if cube is None else Loaded(self._cache.get(cube), f"{attachment.name}@{cube.revision}")

    def _loaded(self, revisions: Mapping[str, int]) -> Iterator[tuple[Attachment, Loaded]]:
        for _, attachment, found in self.reachable(revisions):
            if not isinstance(found, Unused):
                yield attachment, found

    def _adapters(self, owner: str) -> list[MemCube]:
        cubes = self._store.cubes(owner, kind="parametric")
        return [cube for cube in cubes if cube.header.semantic_type == "adapter"]

    def _read(self, cube: MemCube) -> Adapter:
        name = f"{cube.owner}/{cube.header.title}"
        if cube.blob is None:
            raise IncompatibleAdapterError(
                f"The cube of adapter {name!r} holds no weights.", hint="Add it again."
            )
        facts = AdapterFacts.parse(cube.header.attributes)
        tensors = self._store.load_blob(cube.owner, cube.blob)
        adapter = registry.family(facts.family).from_tensors(facts.base, tensors, facts.config)
        adapter.check_base(self._model.fingerprint, name=f"Adapter {name!r}")
        return adapter


def _attachments(cubes: Sequence[MemCube]) -> list[Attachment]:
    return [
        Attachment(
            cube_id=cube.id,
            title=cube.header.title,
            adapter=cube.header.sources[0],
            **AttachmentFacts.parse(cube.header.attributes).model_dump(),
        )
        for cube in cubes
        if cube.header.semantic_type == "attachment" and cube.header.sources
    ]


def commit_edit(
    store: MemoryStore, owner: str, changes: Callable[[], dict[str, Any]], **commit: Any
) -> Revision:
    """Commit what `changes` reads from the newest revision; read and commit again if somebody was faster."""
    for _ in range(_TRIES - 1):
        parent = store.head(owner)
        with suppress(RevisionConflictError):
            return store.commit(owner, parent=parent, **commit, **changes())
    return store.commit(owner, parent=store.head(owner), **commit, **changes())


def split_name(name: str) -> tuple[str, str]:
    """``"nurses/tone"`` -> ``("nurses", "tone")``; a bare name belongs to ``shared``."""
    if not isinstance(name, str):
        raise InvalidInputError(f"{name!r} is no adapter name.", hint='Expected "owner/name" or "name".')
    owner, slash, title = name.rpartition("/")
    if slash and not owner:
        raise InvalidInputError(f"{name!r} names no owner.", hint='Expected "owner/name" or "name".')
    return validate_id(owner or SHARED, "owner"), validate_id(title, "adapter name")
