"""A store as one principal sees it: every read and every write of `MemoryStore`, checked; deny by default.

    bound = BoundStore(store, Principal("alice"), write_guards=[RateLimit(60, seconds=60)])

The rules are those of `governance`. This class adds what follows from them:

* Joining a group gives access to its memory, so only the system enlists; anybody may leave. A rollback that
  would bring a membership back is refused.
* A draft may name only sources that its writer may read, and is trusted no more than they are.
* Whoever may write a cube of somebody else may archive it, activate it, and commit a new version in its
  place: of the same kind and semantic type, because a text must not become an adapter or be pinned into every
  prompt. Grants do not pass on to the new version.
* Only the system sets a legal basis or releases it, and only the system moves archives under other ids.
  Which keys of other stores are trusted is decided by whoever holds the store.

The events of a write name the principal. It is a class of its own, not a subclass of `MemoryStore`: a method
that is added there is missing here until somebody has decided who may call it, and a test asks.
"""

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from torch import Tensor

from persona_sdk.errors import FrozenError, InvalidInputError, NotFoundError
from persona_sdk.memory import events, revisions, snapshots, transitions, uses
from persona_sdk.memory.archive_format import ArchiveSummary
from persona_sdk.memory.archive_reader import Contents
from persona_sdk.memory.bound_reader import BoundReader, no_persona
from persona_sdk.memory.cube import CubeDraft, MemCube, State
from persona_sdk.memory.governance import Granted, Principal
from persona_sdk.memory.receipt import Receipt
from persona_sdk.memory.revisions import Revision
from persona_sdk.memory.snapshots import Snapshot
from persona_sdk.memory.store import MemoryStore
from persona_sdk.memory.write_guards import Write, WriteGuard, cap_trust


class BoundStore(BoundReader):
    """What one principal can do with a store."""

    def __init__(
        self, store: MemoryStore, principal: Principal, *, write_guards: Sequence[WriteGuard] = ()
    ) -> None:
        super().__init__(store, principal)
        self._write_guards = tuple(write_guards)

    def _acting(self) -> AbstractContextManager[None]:
        return events.acting_as(self.principal.name)

    def commit(
        self,
        owner: str,
        *,
        kind: str | None = None,
        add: Sequence[CubeDraft] = (),
        retire: Sequence[str] = (),
        groups: Sequence[str] | None = None,
        message: str | None = None,
        parent: int | None = None,
    ) -> Revision:
        """As `MemoryStore.commit`; for the owner, or to replace cubes that may be written by new versions.

        Raises:
            NotFoundError: it is not allowed, or what it names is not there.
            PersonaError: a guard refused, or as `MemoryStore.commit`.
        """
        if self._owns(owner):
            kind = kind or ("user" if self.principal.kind == "system" else self.principal.kind)
            if self.principal.kind not in ("system", kind):
                raise InvalidInputError(
                    f"{self.principal.name!r} is no {kind!r:.20}.", hint="Leave kind out."
                )
            parent = self._check_groups(owner, groups, parent)
        else:
            self._check_revision(owner, add, retire, plain=groups is None and message is None)
            kind = kind or self._store.kind_of(owner) or "user"
        drafts = [self._guarded(owner, draft.checked()) for draft in add]
        with self._acting():
            return self._store.commit(
                owner, kind=kind, add=drafts, retire=retire, groups=groups, message=message, parent=parent
            )

    def _check_groups(self, owner: str, groups: Sequence[str] | None, parent: int | None) -> int | None:
        """Refuse to enlist; else the revision that the decision was made on."""
        if groups is None or self.principal.kind == "system":
            return parent
        newest = self._store.head(owner)
        self._refuse_joining(set(groups) - set(self._store.groups(owner, revision=newest)))
        return newest if parent is None else parent

    def _refuse_joining(self, fresh: set[str]) -> None:
        if fresh:
            raise NotFoundError(
                f"No group {min(fresh)!r:.60} is open to {self.principal.name!r}.",
                hint="Ask whoever runs the store to enlist you. Nothing was committed.",
            )

    def _check_revision(
        self, owner: str, add: Sequence[CubeDraft], retire: Sequence[str], *, plain: bool
    ) -> None:
        """Allow somebody else no more than new versions of what it may write and retires."""
        if not retire:
            raise no_persona(owner)
        before = self._require_cubes(owner, retire, "write")
        versions = all(d.header.parents and set(d.header.parents) <= set(retire) for d in add)
        if not versions or not plain:
            raise no_persona(owner)
        if not all(_is_alike(draft, [before[name] for name in draft.header.parents]) for draft in add):
            raise InvalidInputError(
                "A new version of somebody else's memory is of its kind and type, and pinned only if it was.",
                hint="Change the text or the tensors. Nothing was committed.",
            )

    def _guarded(self, owner: str, draft: CubeDraft) -> CubeDraft:
        named: dict[str, list[str]] = {}
        for source in draft.header.sources:
            named.setdefault(source.owner, []).append(source.cube_id)
        found = {of: self.lookup(of, ids) for of, ids in named.items()}
        sources = []
        for source in draft.header.sources:
            if source.cube_id not in found[source.owner]:
                raise NotFoundError(
                    f"The source {source.cube_id!r:.60} is gone or has other content.",
                    hint="Derive from what is there now; nothing was committed.",
                )
            sources.append(found[source.owner][source.cube_id])
        write = Write(self.principal, owner, draft, tuple(sources))
        for guard in (cap_trust, *self._write_guards, cap_trust):
            write = replace(write, draft=guard(write))
        return write.draft

    def rollback(self, owner: str, to: int | str) -> Revision:
        """As `MemoryStore.rollback`; for the owner only."""
        self._require_own(owner)
        with self._acting(), self._store.writing() as connection:
            newest = revisions.head(connection, owner)
            revision = transitions.restore(connection, owner, snapshots.resolve(connection, owner, to))
            if self.principal.kind != "system":
                now = revisions.group_ids(connection, owner, revision.number)
                self._refuse_joining(set(now) - set(revisions.group_ids(connection, owner, newest)))
            return revision

    def add_vectors(self, owner: str, encoder: str, vectors: Mapping[str, Tensor]) -> int:
        """As `MemoryStore.add_vectors`; for the owner only, since a vector decides what is found."""
        self._require_own(owner)
        return self._store.add_vectors(owner, encoder, vectors)

    def record_uses(self, owner: str, cube_ids: Sequence[str], at: datetime) -> None:
        """As `uses.record`, of cubes that may be read."""
        if not self._owns(owner):
            self._require_cubes(owner, cube_ids, "read")
        with self._acting():
            uses.record(self._store, owner, cube_ids, at)

    def forget(self, owner: str, cube_ids: Sequence[str]) -> Receipt:
        """As `MemoryStore.forget`; for the owner only."""
        self._require_own(owner)
        with self._acting():
            return self._store.forget(owner, cube_ids)

    def forget_everything(self, owner: str) -> Receipt:
        """As `MemoryStore.forget_everything`; for the owner only."""
        self._require_own(owner)
        with self._acting():
            return self._store.forget_everything(owner)

    def archive(self, owner: str, cube_ids: Sequence[str], *, reason: str = "") -> Revision:
        """As `MemoryStore.archive`, of cubes that may be written."""
        self._require_cubes(owner, cube_ids, "write")
        with self._acting():
            return self._store.archive(owner, cube_ids, reason=reason)

    def activate(self, owner: str, cube_ids: Sequence[str], *, reason: str = "") -> Revision:
        """As `MemoryStore.activate`, of cubes that may be written."""
        self._require_cubes(owner, cube_ids, "write")
        with self._acting():
            return self._store.activate(owner, cube_ids, reason=reason)

    def merge(self, owner: str, cube_ids: Sequence[str], draft: CubeDraft, *, reason: str = "") -> Revision:
        """As `transitions.merge`; for the owner only."""
        self._require_own(owner)
        guarded = self._guarded(owner, draft.checked())
        with self._acting():
            return transitions.merge(self._store, owner, cube_ids, guarded, reason=reason)

    def freeze(self, owner: str, cube_id: str, reason: str, *, legal_basis: str | None = None) -> None:
        """As `MemoryStore.freeze`; for the owner, and with a legal basis for the system."""
        self._require_own(owner)
        if legal_basis is not None and self.principal.kind != "system":
            raise FrozenError("Only the system sets a legal basis.", hint="Freeze it without one.")
        with self._acting():
            self._store.freeze(owner, cube_id, reason, legal_basis=legal_basis)

    def unfreeze(self, owner: str, cube_id: str, reason: str) -> State:
        """As `MemoryStore.unfreeze`; for the owner, and of a legal hold for the system."""
        self._require_own(owner)
        with self._acting():
            may_release = self.principal.kind == "system"
            return self._store.unfreeze(owner, cube_id, reason, may_release=may_release)

    def grant(
        self, owner: str, cube_id: str, to: Principal, right: Granted = "read", *, special: bool = False
    ) -> None:
        """As `MemoryStore.grant`; for the owner only."""
        self._require_own(owner)
        with self._acting():
            self._store.grant(owner, cube_id, to, right, special=special)

    def revoke(self, owner: str, cube_id: str, to: Principal) -> None:
        """As `MemoryStore.revoke`; for the owner only."""
        self._require_own(owner)
        with self._acting():
            self._store.revoke(owner, cube_id, to)

    def snapshot(self, owner: str, name: str) -> Snapshot:
        """As `MemoryStore.snapshot`; for the owner only."""
        self._require_own(owner)
        with self._acting():
            return self._store.snapshot(owner, name)

    def public_key(self) -> bytes | None:
        """As `MemoryStore.public_key`; for everybody."""
        return self._store.public_key()

    def export(self, owner: str, path: str | Path, *, passphrase: str | None = None) -> Path:
        """As `MemoryStore.export`; for the owner only. Whose file the path is, the caller has to know."""
        self._require_own(owner)
        return self._store.export(owner, path, passphrase=passphrase)

    def inspect_archive(self, path: str | Path, *, passphrase: str | None = None) -> ArchiveSummary:
        """As `MemoryStore.inspect_archive`; for everybody. Whose file the path is, the caller has to know."""
        return self._store.inspect_archive(path, passphrase=passphrase)

    def import_archive(
        self,
        path: str | Path,
        *,
        as_id: str | None = None,
        keep_groups: bool = False,
        passphrase: str | None = None,
    ) -> str:
        """As `MemoryStore.import_archive`; all but the system only as themselves, and without groups."""
        if self.principal.kind != "system":
            if as_id not in (None, self.principal.id) or not self._owns(self.principal.id):
                raise no_persona(as_id or self.principal.id)
            as_id = self.principal.id

        def admit(contents: Contents) -> None:
            kind = contents.manifest.kind
            if self.principal.kind not in ("system", kind):
                raise InvalidInputError(
                    f"The archive is of a {kind}.", hint=f"Expected a {self.principal.kind}."
                )
            if keep_groups and self.principal.kind != "system":
                self._refuse_joining({span.name for span in contents.group_spans})

        with self._acting():
            return self._store.import_archive(
                path, as_id=as_id, keep_groups=keep_groups, passphrase=passphrase, admit=admit
            )


def _is_alike(draft: CubeDraft, before: Sequence[MemCube]) -> bool:
    same = all(
        (draft.kind, draft.header.semantic_type) == (cube.kind, cube.header.semantic_type) for cube in before
    )
    return same and (not draft.header.pinned or any(cube.header.pinned for cube in before))
