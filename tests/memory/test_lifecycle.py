"""States of life: the one table of moves, and what each verb does to state and live set."""

import itertools
import tempfile
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule
from sqlalchemy import insert, select, text

from persona_sdk.errors import FrozenError, InvalidInputError, LifecycleError, NotFoundError, StoreError
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, Source, VectorIndex, lifecycle, transitions
from persona_sdk.memory.cube import State
from persona_sdk.memory.expiry import expire
from persona_sdk.memory.schema import events, metadata, moves, tombstones
from persona_sdk.testing import HashEmbedder

Maker = Callable[..., CubeDraft]
STATES: tuple[State, ...] = get_args(State)
PAIRS = list(itertools.product(STATES, STATES))
NOW = datetime(2030, 1, 1, tzinfo=UTC)


def state_of(store: MemoryStore, cube_id: str, owner: str = "alice") -> str:
    return store.get(owner, cube_id).state


def live(store: MemoryStore, owner: str = "alice") -> list[str]:
    return [cube.id for cube in store.cubes(owner)]


def in_state(store: MemoryStore, state: State) -> str:
    """A cube that got into a state by the verbs."""
    one, two = store.commit("alice", add=[CubeDraft.of("one"), CubeDraft.of("two")]).added
    if state == "activated":
        store.activate("alice", [one])
    elif state == "archived":
        store.archive("alice", [one])
    elif state == "merged":
        transitions.merge(store, "alice", [one, two], CubeDraft.of("both"))
    elif state == "frozen":
        store.freeze("alice", one, "audit")
    assert state_of(store, one) == state
    return one


def test_the_table_and_the_database_hold_the_same_moves(store: MemoryStore) -> None:
    with store.reading() as connection:
        found = {(row.before, row.state) for row in connection.execute(select(moves))}
    assert found == {(before, after) for before, states in lifecycle.MOVES.items() for after in states}
    assert set(lifecycle.MOVES) == set(STATES)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_every_move_is_made_or_refused_as_the_table_says(
    store: MemoryStore, before: State, after: State
) -> None:
    cube_id = in_state(store, before)
    legal = {"generated"} if before == "frozen" else lifecycle.MOVES[before]
    with store.writing() as connection:
        if after in legal:
            lifecycle.move(connection, "alice", cube_id, after, reason="test")
        else:
            with pytest.raises(LifecycleError, match=before) as refused:
                lifecycle.move(connection, "alice", cube_id, after)
            assert refused.value.code == "illegal_move"
            assert all(state in refused.value.hint for state in legal)
    assert state_of(store, cube_id) == (after if after in legal else before)


@pytest.mark.parametrize(("before", "after"), PAIRS)
def test_sql_itself_refuses_an_illegal_move(store: MemoryStore, before: State, after: State) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    row = {"owner": "alice", "cube_id": cube_id, "before": before, "state": after, "since": "", "reason": ""}

    def write() -> None:
        with store.writing() as connection:
            connection.execute(insert(metadata.tables["states"]).values(**row))

    if after in lifecycle.MOVES[before]:
        write()
        assert state_of(store, cube_id) == after
    else:
        with pytest.raises(StoreError, match=r"FOREIGN KEY|ForeignKey"):
            write()
        assert state_of(store, cube_id) == "generated"


def test_an_owner_cannot_bring_moves_of_its_own(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    with store.writing() as connection:
        connection.execute(insert(moves).values(owner="alice", before="merged", state="generated"))
    row = {"owner": "alice", "cube_id": cube_id, "before": "merged", "state": "generated"}
    statement = insert(metadata.tables["states"]).values(**row, since="", reason="")
    with pytest.raises(StoreError, match=r"FOREIGN KEY|ForeignKey"), store.writing() as connection:
        connection.execute(statement)


def test_archived_is_out_of_search_and_in_history(
    store: MemoryStore, note: Maker, embedder: HashEmbedder
) -> None:
    retriever = Retriever(store, VectorIndex(store), embedder)
    old, new = store.commit("alice", add=[note("dogs"), note("dogs and cats")]).added
    assert [p.id for p in retriever.recall(["alice"], "dogs")] == [old, new]
    revision = store.archive("alice", [old], reason="long unused")
    assert (revision.retired, revision.message) == ((old,), "archive")
    assert [p.id for p in retriever.recall(["alice"], "dogs")] == [new]
    assert store.get("alice", old).state == "archived"
    with pytest.raises(LifecycleError):
        store.archive("alice", [old])
    revision = store.activate("alice", [old])
    assert (revision.added, state_of(store, old)) == ((old,), "activated")
    assert [p.id for p in retriever.recall(["alice"], "dogs")] == [old, new]


def test_merged_versions_name_their_parents_and_keep_the_worst_trust(store: MemoryStore) -> None:
    drafts = [CubeDraft.of("tea", trust="web"), CubeDraft.of("green tea", sensitivity="special")]
    ids = store.commit("alice", add=drafts).added
    revision = transitions.merge(store, "alice", ids, CubeDraft.of("likes green tea", trust="confirmed"))
    assert (set(revision.retired), len(revision.added)) == (set(ids), 1)
    merged = store.get("alice", revision.added[0])
    assert live(store) == [merged.id]
    assert [state_of(store, i) for i in ids] == ["merged", "merged"]
    assert merged.state == "generated"
    assert merged.header.parents == ids
    assert merged.header.sources == tuple(Source.of(store.get("alice", i)) for i in ids)
    assert (merged.header.trust, merged.header.sensitivity) == ("web", "special")
    store.rollback("alice", revision.parent)
    assert live(store) == list(ids)
    assert [state_of(store, i) for i in ids] == ["activated", "activated"]


def test_a_merge_that_fails_leaves_nothing(store: MemoryStore, weights: Maker, folder: Path) -> None:
    one, two, gone = store.commit("alice", add=[CubeDraft.of(t) for t in ("one", "two", "three")]).added
    store.commit("alice", retire=[gone])
    files = sorted(folder.rglob("*.safetensors"))
    for ids in ([one, "0" * 32], [one, gone], []):
        with pytest.raises((NotFoundError, InvalidInputError)):
            transitions.merge(store, "alice", ids, weights(5))
    assert (live(store), store.head("alice"), state_of(store, one)) == ([one, two], 2, "generated")
    assert sorted(folder.rglob("*.safetensors")) == files


def test_merging_tensors_works_as_well(store: MemoryStore, weights: Maker) -> None:
    ids = store.commit("alice", add=[weights(1), weights(2)]).added
    merged = store.get("alice", transitions.merge(store, "alice", ids, weights(3)).added[0])
    assert merged.blob is not None
    assert set(store.load_blob("alice", merged.blob)) == {"m.A", "m.B"}


# Frozen -----------------------------------------------------------------------------------------------


def test_a_frozen_cube_survives_everything(store: MemoryStore) -> None:
    past = NOW - timedelta(days=1)
    store.commit("alice", add=[CubeDraft.of("before")])
    frozen, other = store.commit(
        "alice", add=[CubeDraft.of("contract", expires_at=past), CubeDraft.of("other")]
    ).added
    store.freeze("alice", frozen, "audit")
    head, before = store.head("alice"), store.get("alice", frozen)
    attempts: list[Callable[[], object]] = [
        lambda: store.commit("alice", retire=[frozen], add=[CubeDraft.of("newer", parents=(frozen,))]),
        lambda: store.archive("alice", [other, frozen]),
        lambda: store.activate("alice", [frozen]),
        lambda: transitions.merge(store, "alice", [frozen, other], CubeDraft.of("both")),
        lambda: store.rollback("alice", 1),
        lambda: store.rollback("alice", 0),
    ]
    for attempt in attempts:
        with pytest.raises(FrozenError, match=frozen) as refused:
            attempt()
        assert refused.value.code == "frozen"
    assert expire(store, now=NOW) == []
    assert (store.head("alice"), store.get("alice", frozen)) == (head, before)
    assert state_of(store, other) == "generated"
    with pytest.raises(LifecycleError):
        store.freeze("alice", frozen, "again")
    assert store.unfreeze("alice", frozen, "over") == "generated"
    with pytest.raises(LifecycleError):
        store.unfreeze("alice", frozen, "again")
    assert expire(store, now=NOW)[0].cube_ids == (frozen,)


@pytest.mark.parametrize("state", ["generated", "activated", "merged", "archived"])
def test_unfreezing_gives_back_the_state_before(store: MemoryStore, state: State) -> None:
    cube_id = in_state(store, state)
    was_live = cube_id in live(store)
    store.freeze("alice", cube_id, "audit")
    assert state_of(store, cube_id) == "frozen"
    assert (cube_id in live(store)) == was_live
    assert store.unfreeze("alice", cube_id, "over") == state_of(store, cube_id) == state


def test_a_rollback_does_not_bring_a_frozen_cube_back_either(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    store.archive("alice", [cube_id])
    store.freeze("alice", cube_id, "audit")
    with pytest.raises(FrozenError):
        store.rollback("alice", 1)
    assert store.head("alice") == 2


def test_forgetting_a_frozen_cube_depends_on_the_legal_basis(store: MemoryStore, folder: Path) -> None:
    plain, held, source = store.commit(
        "alice", add=[CubeDraft.of(t) for t in ("plain", "held", "source")]
    ).added
    link = Source.of(store.get("alice", source))
    (bobs,) = store.commit("bob", add=[CubeDraft.of("derived by bob", sources=(link,))]).added
    store.freeze("alice", plain, "audit")
    store.freeze("alice", held, "lawsuit", legal_basis="Art. 17(3)(e) GDPR")
    store.freeze("bob", bobs, "lawsuit", legal_basis="Art. 17(3)(e) GDPR")
    store.forget("alice", [plain])
    for ids in ([held], [source], [held, source]):
        with pytest.raises(FrozenError) as refused:
            store.forget("alice", ids)
        assert bobs not in str(refused.value), "cubes of others are not named"
        assert (held in str(refused.value)) == (held in ids)
    with pytest.raises(FrozenError, match=held):
        store.forget_everything("alice")
    assert live(store) == [held, source]
    store.unfreeze("alice", held, "settled")
    with pytest.raises(FrozenError):
        store.forget_everything("alice")
    store.unfreeze("bob", bobs, "settled")
    assert store.forget_everything("alice").verify(store)
    assert not [f for f in folder.rglob("*") if f.is_file() and b"lawsuit" in f.read_bytes()]


def test_a_freeze_says_why(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    for reason, basis in (("", None), (" ", None), ("audit", " ")):
        with pytest.raises(InvalidInputError):
            store.freeze("alice", cube_id, reason, legal_basis=basis)
    for unknown in ("0" * 32, "../etc/passwd"):
        with pytest.raises(NotFoundError):
            store.freeze("alice", unknown, "audit")


# Expired ----------------------------------------------------------------------------------------------


def test_expiry_leaves_only_a_tombstone(store: MemoryStore, folder: Path, note: Maker) -> None:
    past, later = NOW - timedelta(seconds=1), NOW + timedelta(seconds=1)
    due, stays = store.commit(
        "alice", add=[note("cxnary due", expires_at=past), note("stays", expires_at=later)]
    ).added
    link = Source.of(store.get("alice", due))
    (derived,) = store.commit("bob", add=[note("cxnary derived", sources=(link,))]).added
    store.commit("carol", add=[note("cxnary too", expires_at=NOW)])
    receipts = expire(store, now=NOW)
    assert [receipt.owner for receipt in receipts] == ["alice", "carol"]
    assert set(receipts[0].cube_ids) == {due, derived}
    assert all(receipt.verify(store) and receipt.scrubbed for receipt in receipts)
    assert (live(store), live(store, "bob"), live(store, "carol")) == ([stays], [], [])
    assert not [f for f in folder.rglob("*") if f.is_file() and b"cxnary" in f.read_bytes()]
    with store.reading() as connection:
        reasons = connection.execute(select(tombstones.c.reason)).scalars().all()
        kept = connection.execute(text("SELECT count(*) FROM vectors")).scalar()
    assert (set(reasons), len(reasons), kept) == ({"expired"}, 3, 1)
    assert store.history("alice")[-1].message == "expire"
    assert expire(store, now=NOW) == []
    assert all(store.verify_audit(owner) == [] for owner in ("alice", "bob", "carol"))


def test_expiry_of_one_owner_leaves_the_others_and_needs_a_clock(store: MemoryStore) -> None:
    for owner in ("alice", "bob"):
        store.commit(owner, add=[CubeDraft.of("due", expires_at=NOW)])
    assert [r.owner for r in expire(store, "bob", now=NOW)] == ["bob"]
    assert expire(store, "nobody", now=NOW) == []
    assert (len(live(store)), len(live(store, "bob"))) == (1, 0)
    with pytest.raises(InvalidInputError):
        expire(store, now=datetime(2030, 1, 1))
    assert expire(store, now=NOW - timedelta(days=1)) == []


def test_what_a_frozen_cube_was_derived_from_does_not_expire(store: MemoryStore) -> None:
    due, free = store.commit("alice", add=[CubeDraft.of(t, expires_at=NOW) for t in ("due", "free")]).added
    link = Source.of(store.get("alice", due))
    (derived,) = store.commit("bob", add=[CubeDraft.of("derived", sources=(link,))]).added
    store.freeze("bob", derived, "audit")
    assert [set(r.cube_ids) for r in expire(store, now=NOW)] == [{free}]
    store.unfreeze("bob", derived, "over")
    assert [set(r.cube_ids) for r in expire(store, now=NOW)] == [{due, derived}]


# All verbs, in any order ------------------------------------------------------------------------------


class LifecycleMachine(RuleBasedStateMachine):
    """Random verbs. The model keeps the state of each cube, the live set of each revision, and what was
    forgotten; refused verbs must leave no trace, all others one event.
    """

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = MemoryStore.open(Path(self.folder.name) / "store")
        self.store.commit("a", add=[CubeDraft.of("first")])
        self.states: dict[str, str] = dict.fromkeys(self.store.history("a")[0].added, "generated")
        self.before: dict[str, str] = {}
        self.live: list[set[str]] = [set(), set(self.states)]
        self.events = 1

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    def some(self, data: st.DataObject) -> list[str]:
        return data.draw(st.lists(st.sampled_from(sorted(self.states)), min_size=1, max_size=3, unique=True))

    @rule(data=st.data(), expires=st.booleans())
    def commit(self, data: st.DataObject, expires: bool) -> None:
        header = {"expires_at": NOW} if expires else {}
        revision = self.store.commit("a", add=[CubeDraft.of("text", **header)])
        self.states[revision.added[0]] = "generated"
        self.live.append(self.live[-1] | set(revision.added))
        self.events += 1

    @rule(data=st.data(), verb=st.sampled_from(["archive", "activate", "merge", "retire"]))
    def change(self, data: st.DataObject, verb: str) -> None:
        if not self.states:
            return
        ids = self.some(data)
        states = {self.states[i] for i in ids}
        all_live = set(ids) <= self.live[-1]
        target = {"archive": "archived", "activate": "activated", "merge": "merged"}.get(verb)
        allowed = "frozen" not in states
        if verb in ("archive", "merge"):
            allowed &= all(target in lifecycle.MOVES[s] for s in states)  # type: ignore[index]
        allowed &= all_live or verb in ("archive", "activate")
        call: Callable[[], object] = {
            "archive": lambda: self.store.archive("a", ids),
            "activate": lambda: self.store.activate("a", ids),
            "merge": lambda: transitions.merge(self.store, "a", ids, CubeDraft.of("merged")),
            "retire": lambda: self.store.commit("a", retire=ids),
        }[verb]
        if not allowed:
            with pytest.raises((FrozenError, LifecycleError, NotFoundError)):
                call()
            return
        call()
        self.events += 1
        if target is not None:
            self.states |= dict.fromkeys(ids, target)
        now = self.live[-1] | set(ids) if verb == "activate" else self.live[-1] - set(ids)
        if verb == "merge":
            added = self.store.history("a")[-1].added
            self.states |= dict.fromkeys(added, "generated")
            now |= set(added)
        self.live.append(now)

    @rule(data=st.data())
    def freeze_or_not(self, data: st.DataObject) -> None:
        if not self.states:
            return
        (cube_id, *_) = self.some(data)
        if self.states[cube_id] == "frozen":
            self.states[cube_id] = self.before.pop(cube_id)
            assert self.store.unfreeze("a", cube_id, "over") == self.states[cube_id]
        else:
            self.store.freeze("a", cube_id, "why")
            self.before[cube_id], self.states[cube_id] = self.states[cube_id], "frozen"
        self.events += 1

    @rule(data=st.data())
    def rollback(self, data: st.DataObject) -> None:
        target = data.draw(st.integers(0, len(self.live) - 1))
        changed = self.live[target] ^ self.live[-1]
        if any(self.states[i] == "frozen" for i in changed):
            with pytest.raises(FrozenError):
                self.store.rollback("a", target)
            return
        self.store.rollback("a", target)
        self.events += 1
        for cube_id in self.live[target] - self.live[-1]:
            if self.states[cube_id] in ("archived", "merged"):
                self.states[cube_id] = "activated"
        self.live.append(set(self.live[target]))

    @rule(data=st.data(), expiry=st.booleans())
    def erase(self, data: st.DataObject, expiry: bool) -> None:
        if not self.states:
            return
        receipts = expire(self.store, now=NOW) if expiry else [self.store.forget("a", self.some(data)[:1])]
        gone = {i for receipt in receipts for i in receipt.cube_ids}
        if expiry:
            assert not any(self.states[i] == "frozen" for i in gone)
        if not receipts:
            return
        self.states = {i: s for i, s in self.states.items() if i not in gone}
        self.live = [*(then - gone for then in self.live), self.live[-1] - gone]
        self.events += 1

    @invariant()
    def states_and_live_sets_are_as_the_model_says(self) -> None:
        found = {cube.id: cube.state for cube in self.store.all_cubes("a")}
        assert found == self.states
        assert self.store.head("a") == len(self.live) - 1
        for number in {0, len(self.live) // 2, len(self.live) - 1}:
            assert {c.id for c in self.store.cubes("a", revision=number)} == self.live[number]

    @invariant()
    def every_write_appended_one_event_and_the_log_is_whole(self) -> None:
        assert self.store.verify_audit("a") == []
        assert len(self.store.audit("a")) == self.events


LifecycleMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=15, deadline=None, suppress_health_check=list(HealthCheck)
)
TestLifecycle = LifecycleMachine.TestCase


def test_a_verb_that_fails_halfway_changes_nothing(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event is written last: when it cannot be, the whole verb is undone."""
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("one")]).added
    monkeypatch.setattr(transitions.events, "append", lambda *a, **k: 1 / 0)
    for verb in (store.archive, store.activate):
        with suppress(ZeroDivisionError):
            verb("alice", [cube_id])
            pytest.fail("the fault was not injected")
    with pytest.raises(ZeroDivisionError):
        store.freeze("alice", cube_id, "audit")
    with pytest.raises(ZeroDivisionError):
        store.rollback("alice", 0)
    monkeypatch.undo()
    assert (live(store), state_of(store, cube_id), store.head("alice")) == ([cube_id], "generated", 1)
    with store.reading() as connection:
        assert len(connection.execute(select(events)).all()) == 1
