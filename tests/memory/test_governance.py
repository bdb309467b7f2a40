"""Who sees and does what: every method of a bound store, two users, a group and a service."""

import inspect
import tempfile
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import func, select

from persona_sdk.errors import (
    FrozenError,
    InvalidInputError,
    NotFoundError,
    PersonaError,
    RevisionConflictError,
)
from persona_sdk.memory import BoundStore, CubeDraft, MemoryStore, Principal, Retriever, Source, VectorIndex
from persona_sdk.memory.governance import SYSTEM
from persona_sdk.memory.schema import metadata
from persona_sdk.memory.snapshots import Recaller
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
NOW = datetime(2030, 1, 1, tzinfo=UTC)
ALICE, BOB, CAROL = Principal("alice"), Principal("bob"), Principal("carol")
CLUB = Principal("club", "group")
SERVICE = Principal("indexer", "service")

# Of the store itself, not of a persona in it: whoever holds the store has them, no principal does.
MAINTENANCE = {
    "announce", "announce_derived", "blobs_written", "close", "drop_unnamed", "keep_blob",
    "on_derived_erased", "on_forget", "open", "reading", "rotate_master_key", "scrub", "sweep", "unlock",
    "writing",
}  # fmt: skip


def public(kind: type) -> set[str]:
    return {name for name, _ in inspect.getmembers(kind, callable) if not name.startswith("_")}


# What one principal can try with the persona `owner`, its cube `i` and its blob `b`; `r` is a retriever,
# `p` a path.
Call = Callable[[BoundStore, str, str, str, Any, Path], object]
CALLS: dict[str, Call] = {
    "activate": lambda s, owner, i, b, r, p: s.activate(owner, [i]),
    "add_vectors": lambda s, owner, i, b, r, p: s.add_vectors(owner, "e", {i: torch.ones(3)}),
    "all_cubes": lambda s, owner, i, b, r, p: s.all_cubes(owner),
    "archive": lambda s, owner, i, b, r, p: s.archive(owner, [i]),
    "as_of": lambda s, owner, i, b, r, p: s.as_of(owner, 1),
    "audit": lambda s, owner, i, b, r, p: s.audit(owner),
    "commit": lambda s, owner, i, b, r, p: s.commit(owner, add=[CubeDraft.of("planted")]),
    "cubes": lambda s, owner, i, b, r, p: s.cubes(owner),
    "export": lambda s, owner, i, b, r, p: s.export(owner, p / "x.memcube"),
    "forget": lambda s, owner, i, b, r, p: s.forget(owner, [i]),
    "forget_everything": lambda s, owner, i, b, r, p: s.forget_everything(owner),
    "freeze": lambda s, owner, i, b, r, p: s.freeze(owner, i, "mine now"),
    "get": lambda s, owner, i, b, r, p: s.get(owner, i),
    "grant": lambda s, owner, i, b, r, p: s.grant(owner, i, CAROL),
    "grants": lambda s, owner, i, b, r, p: s.grants(owner),
    "groups": lambda s, owner, i, b, r, p: s.groups(owner),
    "head": lambda s, owner, i, b, r, p: s.head(owner),
    "history": lambda s, owner, i, b, r, p: s.history(owner),
    "import_archive": lambda s, owner, i, b, r, p: s.import_archive(p / "bob.memcube", as_id=owner),
    "inspect_archive": lambda s, owner, i, b, r, p: s.inspect_archive(p / "bob.memcube").format,
    "kind_of": lambda s, owner, i, b, r, p: s.kind_of(owner),
    "load_blob": lambda s, owner, i, b, r, p: s.load_blob(owner, b),
    "lookup": lambda s, owner, i, b, r, p: s.lookup(owner, [i]),
    "mark": lambda s, owner, i, b, r, p: s.mark(owner),
    "merge": lambda s, owner, i, b, r, p: s.merge(owner, [i], CubeDraft.of("planted")),
    "missing_vectors": lambda s, owner, i, b, r, p: s.missing_vectors(owner, "e"),
    "personas": lambda s, owner, i, b, r, p: s.personas(),
    "public_key": lambda s, owner, i, b, r, p: s.public_key(),
    "recall": lambda s, owner, i, b, r, p: s.recall(r, "secret", owners=[owner]),
    "record_uses": lambda s, owner, i, b, r, p: s.record_uses(owner, [i], NOW),
    "revoke": lambda s, owner, i, b, r, p: s.revoke(owner, i, CAROL),
    "rollback": lambda s, owner, i, b, r, p: s.rollback(owner, 1),
    "shared": lambda s, owner, i, b, r, p: s.shared(),
    "snapshot": lambda s, owner, i, b, r, p: s.snapshot(owner, "mine"),
    "snapshots": lambda s, owner, i, b, r, p: s.snapshots(owner),
    "unfreeze": lambda s, owner, i, b, r, p: s.unfreeze(owner, i, "mine now"),
    "uses": lambda s, owner, i, b, r, p: s.uses(owner),
    "vector_ids": lambda s, owner, i, b, r, p: s.vector_ids(owner, "e"),
    "vectors": lambda s, owner, i, b, r, p: s.vectors(owner, "e"),
    "verify_audit": lambda s, owner, i, b, r, p: s.verify_audit(owner),
}


def test_every_method_of_the_store_was_decided_on() -> None:
    assert public(MemoryStore) - MAINTENANCE <= public(BoundStore)
    assert not MAINTENANCE & public(BoundStore)
    assert public(BoundStore) == set(CALLS), "a new method needs a line in the table of attempts"
    assert not issubclass(BoundStore, MemoryStore)
    assert not hasattr(BoundStore, "__getattr__")


@pytest.fixture
def retriever(store: MemoryStore, embedder: HashEmbedder) -> Recaller:
    return Retriever(store, VectorIndex(store), embedder)


@pytest.fixture
def secrets(store: MemoryStore, note: Maker, weights: Maker, tmp_path: Path) -> tuple[str, str]:
    """Bob's cube and blob. He has a snapshot, a grant, a group and an archived cube as well."""
    cube, tensors, old = store.commit(
        "bob", add=[note("secret of bob"), weights(1), note("old secret")], groups=["club"], message="secret"
    ).added
    store.archive("bob", [old])
    store.snapshot("bob", "secret")
    store.grant("bob", cube, CAROL)
    store.export("bob", tmp_path / "bob.memcube")
    return cube, store.get("bob", tensors).blob or ""


def outcome(call: Call, *arguments: Any) -> str:
    """What a call gave, with the ids of what it was about made the same."""
    owner, cube, blob = arguments[1:4]
    try:
        found = repr(call(*arguments))
    except NotFoundError as error:
        found = f"{type(error).__name__}: {error} {error.context}"
    for name, shown in ((owner, "<owner>"), (cube, "<cube>"), (blob, "<blob>"), (blob[:19], "<blob>")):
        found = found.replace(name, shown)
    return found


STRANGERS = [ALICE, CLUB, SERVICE, Principal("bob", "group"), Principal("bob", "service")]


@pytest.mark.parametrize("principal", STRANGERS, ids=lambda principal: principal.name)
def test_forbidden_and_missing_are_the_same(
    store: MemoryStore, secrets: tuple[str, str], retriever: Recaller, tmp_path: Path, principal: Principal
) -> None:
    """Whoever is nothing to bob learns nothing, not even whether he exists, and changes nothing."""
    store.commit("alice", add=[CubeDraft.of("mine")])
    bound, before = BoundStore(store, principal), rows(store)
    cube, blob = secrets
    for name, call in CALLS.items():
        there = outcome(call, bound, "bob", cube, blob, retriever, tmp_path)
        missing = outcome(call, bound, "zed", "f" * 32, "f" * 64, retriever, tmp_path)
        assert there == missing, name
        assert "secret" not in there, name
        assert rows(store) == before, name


def rows(store: MemoryStore) -> dict[str, list[Any]]:
    with store.reading() as connection:
        return {name: connection.execute(select(table)).fetchall() for name, table in metadata.tables.items()}


DESTRUCTIVE = {"forget", "forget_everything", "freeze", "merge", "archive", "import_archive"}


@pytest.mark.parametrize("principal", [BOB, SYSTEM], ids=lambda principal: principal.name)
def test_the_owner_and_the_system_may_do_everything(
    store: MemoryStore, secrets: tuple[str, str], retriever: Recaller, tmp_path: Path, principal: Principal
) -> None:
    cube, blob = secrets
    bound = BoundStore(store, principal)
    for name in [*sorted(set(CALLS) - DESTRUCTIVE - {"unfreeze"}), "freeze", "unfreeze", "forget"]:
        said = outcome(CALLS[name], bound, "bob", cube, blob, retriever, tmp_path)
        assert "Error" not in said, name
    assert store.verify_audit("bob") == []
    assert bound.forget_everything("bob").verify(store)
    assert bound.import_archive(tmp_path / "bob.memcube") == "bob"


def test_a_member_reads_what_the_group_remembers_now(
    store: MemoryStore, note: Maker, weights: Maker, retriever: Recaller, embedder: HashEmbedder
) -> None:
    add = [note("open"), note("special", sensitivity="special"), weights(1), note("open but old")]
    seen, special, tensors, old = store.commit("club", kind="group", add=add).added
    store.archive("club", [old])
    store.commit("alice", groups=["club"])
    bound = BoundStore(store, ALICE)
    encoder = embedder.fingerprint
    assert [cube.id for cube in bound.cubes("club")] == [seen, tensors]
    assert [cube.id for cube in bound.cubes("club", revision=1)] == [seen, tensors], "not what is past"
    assert bound.get("club", seen).text == "open"
    assert set(bound.lookup("club", [seen, special, old])) == {seen}
    assert bound.vector_ids("club", encoder) == bound.vectors("club", encoder)[0] == [seen]
    assert bound.vectors("club", encoder)[1].equal(embedder.encode(["open"]))
    assert bound.vectors("club", encoder, skip=1)[0] == []
    assert bound.load_blob("club", bound.get("club", tensors).blob or "")
    assert bound.head("club") == 2
    assert [p.id for p in bound.recall(retriever, "special open", 5)] == [seen]
    assert [p.id for p in bound.recall(retriever, "special", 1, owners=["club"])] == [seen], (
        "the best is hidden"
    )
    for hidden in (special, old):
        with pytest.raises(NotFoundError):
            bound.get("club", hidden)
    for refused in ("history", "all_cubes", "audit", "groups", "forget_everything", "as_of", "uses"):
        with pytest.raises(NotFoundError):
            CALLS[refused](bound, "club", seen, "", retriever, Path())
    store.commit("alice", groups=[])
    with pytest.raises(NotFoundError):
        bound.cubes("club")
    with pytest.raises(NotFoundError):
        bound.cubes("club", revision=1)


def test_nobody_enlists_themselves(store: MemoryStore, tmp_path: Path, note: Maker) -> None:
    store.commit("club", kind="group", add=[note("secret of the club")])
    bound = BoundStore(store, ALICE)
    for attempt in (
        {"groups": ["club"]},
        {"groups": ["nothing-yet"]},
        {"groups": ["club"], "add": [note("hi")]},
    ):
        with pytest.raises(NotFoundError, match="is open to"):
            bound.commit("alice", **attempt)
    BoundStore(store, SYSTEM).commit("alice", groups=["club"])
    assert bound.cubes("club")
    store.export("alice", tmp_path / "member.memcube")
    bound.commit("alice", groups=["club"])
    bound.commit("alice", groups=[])
    with pytest.raises(NotFoundError, match="is open to"):
        bound.rollback("alice", 1)
    assert store.groups("alice") == ()
    bound.forget_everything("alice")
    with pytest.raises(NotFoundError, match="is open to"):
        bound.import_archive(tmp_path / "member.memcube", keep_groups=True)
    bound.import_archive(tmp_path / "member.memcube")
    assert store.groups("alice", revision=1) == ()
    assert store.groups("alice") == ()


def test_a_removal_that_comes_in_between_is_not_undone(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the check of the groups and the commit, the system takes the membership away."""
    store.commit("alice", groups=["club"])
    real = BoundStore._check_groups

    def raced(bound: BoundStore, *arguments: Any) -> Any:
        decided = real(bound, *arguments)
        store.commit("alice", groups=[])
        return decided

    monkeypatch.setattr(BoundStore, "_check_groups", raced)
    with pytest.raises(RevisionConflictError):
        BoundStore(store, ALICE).commit("alice", groups=["club"])
    assert store.groups("alice") == ()


def test_a_grant_is_for_one_cube_and_one_right(store: MemoryStore, note: Maker, retriever: Recaller) -> None:
    shown, other = store.commit("bob", add=[note("shown to alice"), note("not shown")]).added
    bob, alice = BoundStore(store, BOB), BoundStore(store, ALICE)
    bob.grant("bob", shown, ALICE)
    assert {o: [c.id for c in cubes] for o, cubes in alice.shared().items()} == {"bob": [shown]}
    assert [cube.id for cube in alice.cubes("bob")] == [shown]
    assert [p.id for p in alice.recall(retriever, "not shown")] == [shown]
    assert bob.grants("bob") == [(shown, "user:alice", "read")]
    with pytest.raises(NotFoundError):
        alice.archive("bob", [shown])
    with pytest.raises(NotFoundError):
        alice.get("bob", other)
    bob.grant("bob", shown, ALICE, "write")
    assert bob.grants("bob") == [(shown, "user:alice", "write")]
    with pytest.raises(NotFoundError):
        alice.archive("bob", [shown, other])
    assert store.get("bob", shown).state == "generated"
    alice.archive("bob", [shown])
    assert alice.shared() == {}, "what is archived is for its owner"
    with pytest.raises(NotFoundError):
        alice.record_uses("bob", [shown], NOW)
    alice.activate("bob", [shown])
    for refused in ("forget", "grant", "freeze", "rollback", "snapshot", "merge", "add_vectors", "history"):
        with pytest.raises(NotFoundError):
            CALLS[refused](alice, "bob", shown, "", retriever, Path())
    bob.revoke("bob", shown, ALICE)
    with pytest.raises(NotFoundError):
        alice.get("bob", shown)
    with pytest.raises(NotFoundError):
        bob.revoke("bob", shown, ALICE)
    assert store.verify_audit("bob") == []


def test_whoever_may_write_a_cube_may_replace_it_and_no_more(store: MemoryStore) -> None:
    mine, other = store.commit("bob", add=[CubeDraft.of("tea"), CubeDraft.of("other")], message="m").added
    store.grant("bob", mine, ALICE, "write")
    alice = BoundStore(store, ALICE)
    newer = CubeDraft.of("green tea", parents=(mine,), trust="confirmed")
    for options in (
        {"add": [newer]},
        {"add": [CubeDraft.of("planted")], "retire": [mine]},
        {"add": [CubeDraft.of("planted", parents=(mine, other))], "retire": [mine]},
        {"add": [newer], "retire": [mine, other]},
        {"add": [newer], "retire": [mine], "groups": ["club"]},
        {"add": [newer], "retire": [mine], "message": "planted"},
    ):
        with pytest.raises(NotFoundError):
            alice.commit("bob", **options)
    assert store.head("bob") == 1
    revision = alice.commit("bob", add=[newer], retire=[mine])
    made = store.get("bob", revision.added[0])
    assert (made.text, made.header.trust) == ("green tea", "import"), "it is not what bob said"
    with pytest.raises(NotFoundError):
        alice.get("bob", made.id)


def test_a_grant_to_a_group_is_for_its_members(store: MemoryStore) -> None:
    (shown,) = store.commit("bob", add=[CubeDraft.of("for the club")]).added
    store.grant("bob", shown, CLUB)
    alice = BoundStore(store, ALICE)
    assert alice.shared() == {}
    store.commit("alice", groups=["club"])
    assert list(alice.shared()) == ["bob"]
    store.commit("alice", groups=[])
    assert alice.shared() == {}
    store.commit("bob", groups=["club"])
    assert BoundStore(store, BOB).shared() == {}, "what is one's own is not shared with one"


def test_special_cubes_are_shared_only_when_the_grant_says_so(store: MemoryStore) -> None:
    (cube_id,) = store.commit("bob", add=[CubeDraft.of("diagnosis", sensitivity="special")]).added
    with pytest.raises(InvalidInputError, match="special"):
        store.grant("bob", cube_id, ALICE)
    assert BoundStore(store, ALICE).shared() == {}
    store.grant("bob", cube_id, ALICE, special=True)
    assert BoundStore(store, ALICE).get("bob", cube_id).text == "diagnosis"


def test_grants_that_make_no_sense_are_refused(store: MemoryStore) -> None:
    (cube_id,) = store.commit("bob", add=[CubeDraft.of("one")]).added
    for to, right in ((BOB, "read"), (SYSTEM, "read"), (ALICE, "erase"), (ALICE, "share"), (ALICE, "*")):
        with pytest.raises((InvalidInputError, Exception)) as refused:
            store.grant("bob", cube_id, to, right)  # type: ignore[arg-type]
        assert not isinstance(refused.value, NotFoundError)
    for unknown in ("0" * 32, "*", ""):
        with pytest.raises(NotFoundError):
            store.grant("bob", unknown, ALICE)
    assert BoundStore(store, BOB).grants("bob") == []
    assert len(store.audit("bob")) == 1


def test_the_next_persona_of_an_id_inherits_no_grant_and_no_membership(store: MemoryStore) -> None:
    (cube_id,) = store.commit("bob", add=[CubeDraft.of("one")]).added
    for to in (ALICE, CLUB):
        store.grant("bob", cube_id, to)
    store.commit("alice", groups=["club"])
    store.commit("club", kind="group", add=[CubeDraft.of("two")])
    store.forget_everything("alice")
    store.forget_everything("club")
    store.commit("alice", groups=["club"])
    store.commit("club", kind="group", add=[CubeDraft.of("three")])
    alice = BoundStore(store, ALICE)
    assert alice.shared() == {}
    assert BoundStore(store, BOB).grants("bob") == []
    assert store.verify_audit("bob") == []


def test_sources_that_may_not_be_read_cannot_be_named(store: MemoryStore) -> None:
    """Naming one would tell whether its content was guessed."""
    (cube_id,) = store.commit("bob", add=[CubeDraft.of("pin 1234")]).added
    right = Source.of(store.get("bob", cube_id))
    wrong = right.model_copy(update={"sha256": "0" * 64})
    alice, said = BoundStore(store, ALICE), []
    for guess in (right, wrong, right.model_copy(update={"cube_id": "f" * 32})):
        with pytest.raises(NotFoundError) as refused:
            alice.commit("alice", add=[CubeDraft.of("mine", sources=(guess,))])
        said.append(str(refused.value).replace(cube_id, "*").replace("f" * 32, "*"))
    assert len(set(said)) == 1
    store.grant("bob", cube_id, ALICE)
    assert alice.commit("alice", add=[CubeDraft.of("mine", sources=(right,))]).number == 1


def test_legal_holds_are_the_systems(store: MemoryStore) -> None:
    (cube_id,) = store.commit("bob", add=[CubeDraft.of("contract")]).added
    bob, system = BoundStore(store, BOB), BoundStore(store, SYSTEM)
    with pytest.raises(FrozenError):
        bob.freeze("bob", cube_id, "mine", legal_basis="mine")
    bob.freeze("bob", cube_id, "keep")
    assert bob.unfreeze("bob", cube_id, "enough") == "generated"
    system.freeze("bob", cube_id, "lawsuit", legal_basis="law")
    for attempt in (
        lambda: bob.unfreeze("bob", cube_id, "no"),
        lambda: bob.forget("bob", [cube_id]),
        lambda: bob.forget_everything("bob"),
    ):
        with pytest.raises(FrozenError):
            attempt()
    system.unfreeze("bob", cube_id, "settled")
    assert bob.forget_everything("bob").verify(store)


def test_archives_come_in_as_oneself_and_as_what_one_is(store: MemoryStore, tmp_path: Path) -> None:
    store.commit("club", kind="group", add=[CubeDraft.of("one")])
    store.commit("bob", add=[CubeDraft.of("two")])
    for owner in ("club", "bob"):
        store.export(owner, tmp_path / owner)
    alice = BoundStore(store, ALICE)
    with pytest.raises(InvalidInputError, match="group"):
        alice.import_archive(tmp_path / "club")
    with pytest.raises(NotFoundError):
        alice.import_archive(tmp_path / "bob", as_id="mallory")
    with pytest.raises(NotFoundError):
        BoundStore(store, SERVICE).import_archive(tmp_path / "bob")
    assert alice.import_archive(tmp_path / "bob") == "alice"
    assert [cube.text for cube in alice.cubes("alice")] == ["two"]
    assert BoundStore(store, SYSTEM).import_archive(tmp_path / "bob", as_id="dora") == "dora"


def test_a_user_does_not_become_a_group(store: MemoryStore) -> None:
    for principal, kind in ((ALICE, "group"), (CLUB, "user")):
        with pytest.raises(InvalidInputError):
            BoundStore(store, principal).commit(principal.id, kind=kind, add=[CubeDraft.of("x")])
        BoundStore(store, principal).commit(principal.id, add=[CubeDraft.of("x")])
    assert (store.kind_of("alice"), store.kind_of("club")) == ("user", "group")
    store.commit("dora", kind="group", add=[CubeDraft.of("secret")])
    with pytest.raises(NotFoundError):
        BoundStore(store, Principal("dora")).cubes("dora")


@pytest.mark.parametrize(
    "name",
    [
        "",
        " ",
        ".",
        "..",
        "../bob",
        "bob\n",
        "bob\0",
        "a" * 129,
        "bób",
        "user:bob",
        "*",
        "b/b",
        "-bob",
        7,
        None,
    ],
)
def test_bad_ids_name_nobody(store: MemoryStore, name: Any) -> None:
    """Section 6: whole match, bounded length, one spelling."""
    with pytest.raises(Exception, match=r"id|str") as refused:
        Principal(name)
    assert isinstance(refused.value, InvalidInputError) or not isinstance(name, str)
    if isinstance(name, str):
        with pytest.raises(InvalidInputError):
            store.commit(name, add=[CubeDraft.of("x")])
        with pytest.raises(NotFoundError):
            BoundStore(store, ALICE).cubes(name)
    with pytest.raises(Exception, match="kind"):
        Principal("bob", "root")  # type: ignore[arg-type]


# Section 1.6 ------------------------------------------------------------------------------------------


def test_defect_11_deleting_a_persona_deletes_its_rows(store: MemoryStore, folder: Path) -> None:
    """In the anchor, deleting a user or a cube flips a flag."""
    store.commit("other", add=[CubeDraft.of("x")])
    (cube_id,) = store.commit("cxnary-bob", add=[CubeDraft.of("cxnary")], groups=["club"]).added
    store.snapshot("cxnary-bob", "cxnary")
    store.grant("cxnary-bob", cube_id, Principal("other"))
    store.freeze("cxnary-bob", cube_id, "cxnary")
    BoundStore(store, Principal("cxnary-bob")).record_uses("cxnary-bob", [cube_id], NOW)
    BoundStore(store, Principal("cxnary-bob")).forget_everything("cxnary-bob")
    with store.reading() as connection:
        for name, table in metadata.tables.items():
            left = select(func.count()).where(table.c.owner == "cxnary-bob").select_from(table)
            assert connection.execute(left).scalar() == 0, name
    assert not [f for f in folder.rglob("*") if f.is_file() and b"cxnary" in f.read_bytes()]


def test_defect_12_writes_to_what_is_not_there_are_refused(store: MemoryStore) -> None:
    """In the anchor they succeed, and are found by no search."""
    store.commit("alice", add=[CubeDraft.of("one")])
    unknown = "0" * 32
    attempts: list[Callable[[BoundStore], object]] = [
        lambda s: s.archive("alice", [unknown]),
        lambda s: s.activate("alice", [unknown]),
        lambda s: s.freeze("alice", unknown, "x"),
        lambda s: s.record_uses("alice", [unknown], NOW),
        lambda s: s.merge("alice", [unknown], CubeDraft.of("x")),
        lambda s: s.add_vectors("alice", "e", {unknown: torch.ones(2)}),
        lambda s: s.grant("alice", unknown, BOB),
        lambda s: s.forget("alice", [unknown]),
        lambda s: s.commit("alice", retire=[unknown]),
    ]
    before = rows(store)
    for principal in (ALICE, SYSTEM):
        for attempt in attempts:
            with pytest.raises(NotFoundError):
                attempt(BoundStore(store, principal))
    with pytest.raises(NotFoundError):
        BoundStore(store, ALICE).commit("nobody", add=[CubeDraft.of("x")])
    assert rows(store) == before


# Random operations ------------------------------------------------------------------------------------

PRINCIPALS = (ALICE, BOB, CLUB, SERVICE)
OWNERS = ("alice", "bob", "club")


class IsolationMachine(RuleBasedStateMachine):
    """Two users, a group and a service do random things. The model keeps who owns what, what is live and
    special, who is a member and what was granted; what is seen must be what follows from that.
    """

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = MemoryStore.open(Path(self.folder.name) / "store")
        self.bound = {principal: BoundStore(self.store, principal) for principal in PRINCIPALS}
        self.live: dict[str, set[str]] = {owner: set() for owner in OWNERS}
        self.all: dict[str, set[str]] = {owner: set() for owner in OWNERS}
        self.special: set[str] = set()
        self.members: set[str] = set()
        self.grants: dict[tuple[str, str], str] = {}  # (cube, principal) -> right
        for owner in OWNERS:
            self.store.commit(owner, kind="group" if owner == "club" else "user")

    def teardown(self) -> None:
        if hasattr(self, "store"):
            assert [self.store.verify_audit(owner) for owner in OWNERS] == [[], [], []]
            self.store.close()
            self.folder.cleanup()

    def names(self, who: Principal) -> set[str]:
        return {who.name} | ({"group:club"} if who.id in self.members and who.kind == "user" else set())

    def sees(self, who: Principal, owner: str) -> set[str]:
        if who.id == owner:
            return self.live[owner]
        granted = {cube for cube, name in self.grants if name in self.names(who)} & self.live[owner]
        joined = owner == "club" and "group:club" in self.names(who)
        return granted | (self.live[owner] - self.special if joined else set())

    def writes(self, who: Principal, owner: str) -> set[str]:
        if who.id == owner:
            return self.all[owner]
        held = {
            cube
            for (cube, name), right in self.grants.items()
            if name in self.names(who) and right == "write"
        }
        return held & self.all[owner]

    def cube(self, data: st.DataObject, owner: str) -> str:
        return data.draw(st.sampled_from([*sorted(self.all[owner]), "0" * 32]))

    @rule(who=st.sampled_from(PRINCIPALS), owner=st.sampled_from(OWNERS), special=st.booleans())
    def add(self, who: Principal, owner: str, special: bool) -> None:
        draft = CubeDraft.of(f"secret of {owner}", sensitivity="special" if special else "normal")
        if who.id != owner:
            with pytest.raises(NotFoundError):
                self.bound[who].commit(owner, add=[draft])
            return
        (cube_id,) = self.bound[who].commit(owner, add=[draft]).added
        self.live[owner].add(cube_id)
        self.all[owner].add(cube_id)
        self.special |= {cube_id} if special else set()

    @rule(
        who=st.sampled_from(PRINCIPALS),
        owner=st.sampled_from(OWNERS),
        archive=st.booleans(),
        data=st.data(),
    )
    def archive_or_activate(self, who: Principal, owner: str, archive: bool, data: st.DataObject) -> None:
        cube_id = self.cube(data, owner)
        verb = self.bound[who].archive if archive else self.bound[who].activate
        if cube_id not in self.writes(who, owner):
            with pytest.raises(NotFoundError):
                verb(owner, [cube_id])
            return
        if archive and self.store.get(owner, cube_id).state == "archived":
            return
        verb(owner, [cube_id])
        self.live[owner] = self.live[owner] - {cube_id} if archive else self.live[owner] | {cube_id}

    @rule(
        who=st.sampled_from(PRINCIPALS),
        owner=st.sampled_from(OWNERS),
        to=st.sampled_from(PRINCIPALS),
        right=st.sampled_from(["read", "write"]),
        data=st.data(),
    )
    def grant(self, who: Principal, owner: str, to: Principal, right: Any, data: st.DataObject) -> None:
        cube_id = self.cube(data, owner)
        if who.id != owner or to.id == owner or cube_id not in self.all[owner]:
            with pytest.raises((NotFoundError, InvalidInputError)):
                self.bound[who].grant(owner, cube_id, to, right, special=True)
            return
        self.bound[who].grant(owner, cube_id, to, right, special=True)
        self.grants[cube_id, to.name] = right

    @rule(owner=st.sampled_from(OWNERS), to=st.sampled_from(PRINCIPALS), data=st.data())
    def revoke(self, owner: str, to: Principal, data: st.DataObject) -> None:
        cube_id = self.cube(data, owner)
        owning = next(p for p in PRINCIPALS if p.id == owner)
        if self.grants.pop((cube_id, to.name), None) is None:
            with pytest.raises(NotFoundError):
                self.bound[owning].revoke(owner, cube_id, to)
        else:
            self.bound[owning].revoke(owner, cube_id, to)

    @rule(who=st.sampled_from((ALICE, BOB)), member=st.booleans(), by_system=st.booleans())
    def join_or_leave(self, who: Principal, member: bool, by_system: bool) -> None:
        groups = ["club"] if member else []
        if not by_system and member and who.id not in self.members:
            with pytest.raises(NotFoundError):
                self.bound[who].commit(who.id, groups=groups)
            return
        (self.store if by_system else self.bound[who]).commit(who.id, groups=groups)
        self.members = self.members | {who.id} if member else self.members - {who.id}

    @rule(who=st.sampled_from(PRINCIPALS), owner=st.sampled_from(OWNERS), data=st.data())
    def rollback(self, who: Principal, owner: str, data: st.DataObject) -> None:
        target = data.draw(st.integers(0, self.store.head(owner)))
        joins = set(self.store.groups(owner, revision=target)) - set(self.store.groups(owner))
        if who.id != owner or joins:
            with pytest.raises(NotFoundError):
                self.bound[who].rollback(owner, target)
            return
        self.bound[who].rollback(owner, target)
        self.live[owner] = {cube.id for cube in self.store.cubes(owner)}
        if owner != "club" and not self.store.groups(owner):
            self.members -= {owner}

    @rule(who=st.sampled_from(PRINCIPALS), owner=st.sampled_from(OWNERS), data=st.data())
    def forget(self, who: Principal, owner: str, data: st.DataObject) -> None:
        cube_id = self.cube(data, owner)
        if who.id != owner or cube_id not in self.all[owner]:
            with pytest.raises(NotFoundError):
                self.bound[who].forget(owner, [cube_id])
            return
        self.bound[who].forget(owner, [cube_id])
        self.live[owner].discard(cube_id)
        self.all[owner].discard(cube_id)
        self.grants = {key: right for key, right in self.grants.items() if key[0] != cube_id}

    @invariant()
    def nobody_sees_what_is_not_theirs(self) -> None:
        for who, bound in self.bound.items():
            shared = {owner: {c.id for c in cubes} for owner, cubes in bound.shared().items()}
            for owner in OWNERS:
                allowed = self.sees(who, owner)
                everything = [*self.all[owner], "0" * 32]
                if who.id == owner:
                    assert {c.id for c in bound.cubes(owner)} == allowed
                    assert set(bound.lookup(owner, everything)) == self.all[owner]
                    continue
                assert set(bound.lookup(owner, everything)) == allowed
                assert shared.get(owner, set()) <= allowed
                if allowed:
                    assert {c.id for c in bound.cubes(owner)} == allowed
                    assert {c.id for c in bound.cubes(owner, revision=bound.head(owner))} == allowed
                else:
                    with pytest.raises(NotFoundError):
                        bound.cubes(owner)
                for read in (bound.history, bound.all_cubes, bound.audit, bound.groups, bound.grants):
                    with pytest.raises(PersonaError):
                        read(owner)


IsolationMachine.TestCase.settings = settings(
    max_examples=6, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestIsolation = IsolationMachine.TestCase
