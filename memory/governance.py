"""Who may do what with whose memory: deny, unless one of these says otherwise.

    who                          on whose memory            rights
    the system                   anybody's                  all
    a user or group              its own                    all
    a member of a group          the group's, live cubes    read
    whoever holds a grant        one cube                   read, or write, which includes read

Others read a cube only while it is live: what was retired or archived is history, which is its owner's alone.

A grant names one cube, and a user, a group, meaning all its members, or a service. Sharing and erasing cannot
be granted. A cube of sensitivity ``special`` is not shared by membership, and a grant of it must say
``special=True``; as headers never change, the grant that exists is the one that said so.

Membership and grants count as they are now, whatever revision is looked at. The decisions here are pure
functions of a `Standing`; `persona_sdk.memory.bound.BoundStore` applies them to every read and write.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from sqlalchemy import Connection, delete, insert, select

from persona_sdk.config import validate_id
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import events, revisions, rows
from persona_sdk.memory.core import StoreCore
from persona_sdk.memory.cube import MemCube, utc_now
from persona_sdk.memory.schema import grants, personas, to_column

PrincipalKind: TypeAlias = Literal["user", "group", "service", "system"]
Right: TypeAlias = Literal["read", "write", "share", "erase"]
Granted: TypeAlias = Literal["read", "write"]


@dataclass(frozen=True)
class Principal:
    """Somebody who acts. Whoever builds one vouches for it: authenticate first."""

    id: str
    kind: PrincipalKind = "user"

    def __post_init__(self) -> None:
        validate_id(self.id, "principal id")
        if self.kind not in get_args(PrincipalKind):
            raise InvalidInputError(
                f"{self.kind!r:.60} is no kind of principal.",
                hint=f"Known kinds: {', '.join(get_args(PrincipalKind))}.",
            )

    @property
    def name(self) -> str:
        """``<kind>:<id>``, as in grants and events; the system has no id there."""
        return events.SYSTEM if self.kind == "system" else f"{self.kind}:{self.id}"


SYSTEM = Principal("system", "system")


@dataclass(frozen=True)
class Standing:
    """What a principal is to an owner. ``granted`` is by cube."""

    everything: bool = False
    member: bool = False
    granted: frozenset[tuple[str, Granted]] = frozenset()

    def may(self, right: Right, cube: MemCube, *, live: bool) -> bool:
        """Whether it has a right on a cube, which is the owner's and is live or not."""
        if self.everything:
            return True
        if right == "read":
            shared = self.member and cube.header.sensitivity != "special"
            return live and (shared or any((cube.id, g) in self.granted for g in get_args(Granted)))
        return right == "write" and (cube.id, "write") in self.granted


OWNER = Standing(everything=True)


def standing(
    connection: Connection, principal: Principal, owner: str, names: Sequence[str] | None = None
) -> Standing:
    """What `principal` is to `owner` at this moment; nothing at all when there is no such persona.

    Whoever asks about many owners hands over the principal's `names_of`, to have them read once.
    """
    if principal.kind == "system":
        return OWNER
    try:
        validate_id(owner)
    except InvalidInputError:
        return Standing()  # PostgreSQL refuses to be asked for some of these, instead of finding nobody
    kind = connection.execute(select(personas.c.kind).where(personas.c.owner == owner)).scalar()
    if principal.id == owner and principal.kind in ("user", "group") and kind in (None, principal.kind):
        return OWNER
    names = names_of(connection, principal) if names is None else names
    found = connection.execute(
        select(grants.c.cube_id, grants.c.right).where(grants.c.owner == owner, grants.c.principal.in_(names))
    )
    return Standing(
        member=kind == "group" and f"group:{owner}" in names,
        granted=frozenset((row.cube_id, row.right) for row in found),
    )


def names_of(connection: Connection, principal: Principal) -> list[str]:
    """The names under which a principal is given something: its own, and those of its groups."""
    names = [principal.name]
    own = select(personas.c.kind).where(personas.c.owner == principal.id)
    if principal.kind == "user" and connection.execute(own).scalar() == "user":
        newest = revisions.head(connection, principal.id)
        names += [f"group:{group}" for group in revisions.group_ids(connection, principal.id, newest)]
    return names


def grant(
    store: StoreCore,
    owner: str,
    cube_id: str,
    to: Principal,
    right: Granted = "read",
    *,
    special: bool = False,
) -> None:
    """Let somebody else read, or read and write, a cube. A second grant replaces the first.

    Raises:
        InvalidInputError: the right cannot be granted, it is the owner or the system, or the cube is special
            and `special` is not set.
        NotFoundError: the cube is not the owner's.
    """
    if right not in get_args(Granted):
        raise InvalidInputError(f"{right!r:.60} cannot be granted.", hint="Expected 'read' or 'write'.")
    if to.kind == "system" or (to.id == owner and to.kind != "service"):
        raise InvalidInputError(f"{to.name!r} needs no grant of {owner!r}.", hint="Name somebody else.")
    with store.writing(owner) as connection:
        cube = rows.lookup(connection, owner, [cube_id]).get(cube_id)
        if cube is None:
            raise NotFoundError(f"No cube {cube_id!r:.60} belongs to {owner!r}.", hint="Nothing was granted.")
        if cube.header.sensitivity == "special" and not special:
            raise InvalidInputError(
                "The cube is of special sensitivity.", hint="Say special=True to share it."
            )
        _delete(connection, owner, cube_id, to)
        values = {"owner": owner, "cube_id": cube_id, "principal": to.name, "right": right}
        connection.execute(insert(grants).values(at=to_column(utc_now()), **values))
        events.append(connection, owner, "grant", {"granted": [[cube_id, events.alias(to.name), right]]})


def revoke(store: StoreCore, owner: str, cube_id: str, to: Principal) -> None:
    """Take a grant back.

    Raises:
        NotFoundError: there is none.
    """
    with store.writing(owner) as connection:
        if not _delete(connection, owner, cube_id, to):
            raise NotFoundError(
                f"No grant of {cube_id!r:.60} to {to.name!r} belongs to {owner!r}.",
                hint="Nothing was changed.",
            )
        events.append(connection, owner, "revoke", {"revoked": [[cube_id, events.alias(to.name)]]})


def _delete(connection: Connection, owner: str, cube_id: str, to: Principal) -> bool:
    key = (grants.c.owner == owner) & (grants.c.cube_id == cube_id) & (grants.c.principal == to.name)
    return connection.execute(delete(grants).where(key)).rowcount > 0


def withdraw(connection: Connection, persona: str) -> None:
    """Take back all grants to a persona that is erased: the next one of that id must not inherit them."""
    names = [f"user:{persona}", f"group:{persona}"]
    found = connection.execute(select(grants).where(grants.c.principal.in_(names)).order_by("owner")).all()
    for owner in dict.fromkeys(row.owner for row in found):
        pairs = [[row.cube_id, events.alias(row.principal)] for row in found if row.owner == owner]
        mine = (grants.c.owner == owner) & grants.c.principal.in_(names)
        connection.execute(delete(grants).where(mine))
        events.append(connection, owner, "revoke", {"revoked": pairs}, actor=events.SYSTEM)


def granted_by(connection: Connection, owner: str) -> list[tuple[str, str, Granted]]:
    """The grants an owner has given: cube, name of the principal, right."""
    query = select(grants).where(grants.c.owner == owner).order_by(grants.c.cube_id, grants.c.principal)
    return [(row.cube_id, row.principal, row.right) for row in connection.execute(query)]


def shared_with(connection: Connection, principal: Principal) -> dict[str, list[MemCube]]:
    """The live cubes a principal may read of those who granted it, or a group of it, something; by owner."""
    names = names_of(connection, principal)
    query = select(grants.c.owner).where(grants.c.principal.in_(names), grants.c.owner != principal.id)
    shared = {}
    for owner in connection.execute(query.distinct().order_by(grants.c.owner)).scalars():
        if cubes := readable(connection, owner, standing(connection, principal, owner, names)):
            shared[owner] = cubes
    return shared


def owners_for(connection: Connection, principal: Principal) -> list[str]:
    """Whose memory a principal may read something of: its own, its groups', and what was granted to it."""
    names = names_of(connection, principal)
    own = [name.partition(":")[2] for name in names if name.startswith(("user:", "group:"))]
    granted = select(grants.c.owner).where(grants.c.principal.in_(names)).distinct().order_by(grants.c.owner)
    return list(dict.fromkeys([*own, *connection.execute(granted).scalars()]))


def readable(connection: Connection, owner: str, rights: Standing) -> list[MemCube]:
    """The live cubes of an owner that somebody with these rights may read, oldest first."""
    if rights == Standing():
        return []
    live = rows.read_cubes(connection, owner, revision=revisions.head(connection, owner))
    return [cube for cube in live if rights.may("read", cube, live=True)]
