"""The verbs that move cubes between states of life: state and live set in one transaction, and one event.

    verb       revision                                             state
    archive    retires the cubes that are live                      archived
    activate   opens those that are not                             activated
    merge      retires the parents, adds the version made of them   merged
    restore    a rollback: opens and closes                         archived, merged -> activated where opened
    freeze     none                                                 frozen
    unfreeze   none                                                 that before the freeze

A frozen cube is neither retired nor brought back by any of them: a rollback that would is refused as a whole,
because leaving the cube out would make it another state than the one that was asked for.
"""

from collections.abc import Sequence
from dataclasses import replace

from sqlalchemy import Connection

from persona_sdk.errors import FrozenError, InvalidInputError, LifecycleError, NotFoundError
from persona_sdk.memory import commits, events, lifecycle, revisions, rows
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import SENSITIVITY_ORDER, TRUST_ORDER, CubeDraft, Source, State, clean_text
from persona_sdk.memory.revisions import Revision
from persona_sdk.memory.vault import encode


def archive(store: StoreCore, owner: str, ids: Sequence[str], *, reason: str = "") -> Revision:
    """Put cubes aside: out of the live set, still in history, brought back by `activate`.

    Raises:
        FrozenError: one is frozen.
        LifecycleError: one is archived already.
        NotFoundError: one is not the owner's.
    """
    wanted = _some(ids)
    with store.writing(owner) as connection:
        lifecycle.require_unfrozen(connection, owner, wanted)
        number = revisions.advance(connection, owner, message="archive")
        live = rows.live_among(connection, owner, wanted)
        moved = lifecycle.move_each(connection, owner, wanted, "archived", reason=reason)
        revisions.close_cubes(connection, owner, [i for i in wanted if i in live], number)
        return commits.recorded(connection, owner, number, "archive", {"states": moved})


def activate(store: StoreCore, owner: str, ids: Sequence[str], *, reason: str = "") -> Revision:
    """Make cubes live and activated, whether they were archived, merged, retired or just never used.

    Raises:
        FrozenError: one is frozen.
        NotFoundError: one is not the owner's.
    """
    wanted = _some(ids)
    with store.writing(owner) as connection:
        lifecycle.require_unfrozen(connection, owner, wanted)
        number = revisions.advance(connection, owner, message="activate")
        live = rows.live_among(connection, owner, wanted)
        moved = lifecycle.move_all(connection, owner, wanted, "activated", reason=reason)
        revisions.open_cubes(connection, owner, [i for i in wanted if i not in live], number)
        return commits.recorded(connection, owner, number, "activate", {"states": moved})


def merge(
    store: StoreCore, owner: str, ids: Sequence[str], draft: CubeDraft, *, reason: str = ""
) -> Revision:
    """Compress cubes into a new version: `draft`, which names them as parents and sources.

    It is trusted no more than the least trusted of them, nor less sensitive than the most sensitive.

    Raises:
        FrozenError: one is frozen.
        LifecycleError: one is merged or archived already.
        NotFoundError: one is not the owner's, or not live.
    """
    wanted, draft = _some(ids), draft.checked()
    blob = None if draft.payload is None else encode(draft.payload)
    with store.blobs_written([blob] if blob else []) as new, store.writing(owner) as connection:
        lifecycle.require_unfrozen(connection, owner, wanted)
        parents = rows.lookup(connection, owner, wanted)
        moved = lifecycle.move_each(connection, owner, wanted, "merged", reason=reason)
        number = revisions.advance(connection, owner, message="merge")
        revisions.close_cubes(connection, owner, wanted, number)
        headers = [draft.header, *(cube.header for cube in parents.values())]
        links = (*draft.header.sources, *map(Source.of, parents.values()))
        header = draft.header.model_copy(
            update={
                "parents": tuple(dict.fromkeys((*draft.header.parents, *wanted))),
                "sources": tuple(dict.fromkeys(links)),
                "trust": max((h.trust for h in headers), key=TRUST_ORDER.index),
                "sensitivity": max((h.sensitivity for h in headers), key=SENSITIVITY_ORDER.index),
            }
        )
        made = [replace(draft, header=header)]
        commits.add_cubes(store, connection, owner, made, [blob], number, new)
        return commits.recorded(connection, owner, number, "merge", {"states": moved})


def restore(connection: Connection, owner: str, revision: int) -> Revision:
    """Roll back, inside a write transaction. Cubes that wake up are activated.

    Raises:
        FrozenError: a frozen cube would be retired or brought back.
        NotFoundError: the owner has no such revision.
    """
    before = set(revisions.live_ids(connection, owner, revisions.head(connection, owner)))
    number = revisions.restore(connection, owner, revision)
    after = set(revisions.live_ids(connection, owner, number))
    lifecycle.require_unfrozen(connection, owner, sorted(before ^ after))
    moved = lifecycle.wake(connection, owner, sorted(after - before), reason="rollback")
    return commits.recorded(connection, owner, number, "rollback", {"states": moved})


def freeze(
    store: StoreCore, owner: str, cube_id: str, reason: str, *, legal_basis: str | None = None
) -> None:
    """Lock a cube. With a legal basis it cannot be forgotten either, nor can what it was derived from.

    Raises:
        LifecycleError: it is frozen already.
        NotFoundError: it is not the owner's.
    """
    if not clean_text(reason, "reason").strip() or (legal_basis is not None and not legal_basis.strip()):
        raise InvalidInputError("A freeze has no reason.", hint="Say why, and on what legal basis if any.")
    with store.writing(owner) as connection:
        lifecycle.move(connection, owner, cube_id, "frozen", reason=reason, legal_basis=legal_basis)
        held = legal_basis is not None
        events.append(connection, owner, "freeze", {"states": {cube_id: "frozen"}, "legal": held})


def unfreeze(store: StoreCore, owner: str, cube_id: str, reason: str, *, may_release: bool = True) -> State:
    """Unlock a cube; its state then, the one before the freeze.

    Args:
        store: the store.
        owner: whose cube.
        cube_id: which one.
        reason: why.
        may_release: whether whoever asks may end a legal hold.

    Raises:
        FrozenError: it is on legal hold and `may_release` is false.
        LifecycleError: it is not frozen.
        NotFoundError: it is not the owner's.
    """
    with store.writing(owner) as connection:
        now = lifecycle.standings(connection, owner, [cube_id]).get(cube_id)
        if now is None:
            raise NotFoundError(f"No cube {cube_id!r:.60} belongs to {owner!r}.", hint="Nothing was changed.")
        if now.state != "frozen":
            raise LifecycleError(f"The cube is {now.state}, not frozen.", hint="Nothing was changed.")
        if now.legal_basis is not None and not may_release:
            raise FrozenError("The cube is on legal hold.", hint="Only the system can release it.")
        lifecycle.move(connection, owner, cube_id, now.before, reason=reason)
        events.append(connection, owner, "unfreeze", {"states": {cube_id: now.before}})
        return now.before


def _some(ids: Sequence[str]) -> list[str]:
    if isinstance(ids, str) or not ids:
        raise InvalidInputError("No list of cubes was given.", hint="Expected at least one id, in a list.")
    return list(dict.fromkeys(ids))
