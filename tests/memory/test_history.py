"""History and rollback against a plain dictionary, over random sequences of writes."""

import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from persona_sdk.errors import InvalidInputError, NotFoundError, RevisionConflictError
from persona_sdk.memory import CubeDraft, MemoryStore

OWNERS = ("alice", "bob")
TEXTS = st.text(min_size=1, max_size=20).filter(lambda text: text.strip())


class HistoryMachine(RuleBasedStateMachine):
    """The model keeps, for each owner and revision, the live (id, text) pairs, what was forgotten of them
    since, and the groups.
    """

    texts = TEXTS

    @initialize()
    def start(self) -> None:
        self.folder = tempfile.TemporaryDirectory()
        self.store = self.opened(Path(self.folder.name) / "store")
        self.cubes: dict[str, list[dict[str, str]]] = {owner: [{}] for owner in OWNERS}
        self.gone: dict[str, list[set[str]]] = {owner: [set()] for owner in OWNERS}
        self.groups: dict[str, list[tuple[str, ...]]] = {owner: [()] for owner in OWNERS}

    def opened(self, folder: Path) -> MemoryStore:
        """An empty store whose files are in `folder`."""
        return MemoryStore.open(folder)

    def teardown(self) -> None:
        if hasattr(self, "store"):
            self.store.close()
            self.folder.cleanup()

    @rule(
        owner=st.sampled_from(OWNERS),
        data=st.data(),
        groups=st.none() | st.lists(st.sampled_from(["g1", "g2", "g3"]), max_size=3, unique=True),
    )
    def commit(self, owner: str, data: st.DataObject, groups: list[str] | None) -> None:
        texts = data.draw(st.lists(self.texts, max_size=3))
        live = self.cubes[owner][-1]
        retire = data.draw(st.lists(st.sampled_from(sorted(live)), unique=True, max_size=2)) if live else []
        revision = self.store.commit(
            owner,
            add=[CubeDraft.of(text) for text in texts],
            retire=retire,
            groups=groups,
            parent=len(self.cubes[owner]) - 1,
        )
        assert revision.number == len(self.cubes[owner])
        assert revision.parent == revision.number - 1
        assert set(revision.retired) == set(retire)
        kept = {name: text for name, text in live.items() if name not in retire}
        self.cubes[owner].append(kept | dict(zip(revision.added, texts, strict=True)))
        self.gone[owner].append(set())
        self.groups[owner].append(self.groups[owner][-1] if groups is None else tuple(groups))

    @rule(owner=st.sampled_from(OWNERS), data=st.data())
    def rollback(self, owner: str, data: st.DataObject) -> None:
        newest = len(self.cubes[owner]) - 1
        if newest == 0:
            with pytest.raises(NotFoundError):
                self.store.rollback(owner, 0)
            return
        target = data.draw(st.integers(0, newest))
        revision = self.store.rollback(owner, target)
        assert (revision.restores, set(revision.gone)) == (target, self.gone[owner][target])
        self.cubes[owner].append(self.cubes[owner][target])
        self.gone[owner].append(set())
        self.groups[owner].append(self.groups[owner][target])

    @rule(owner=st.sampled_from(OWNERS), data=st.data())
    def forget(self, owner: str, data: st.DataObject) -> None:
        live = self.cubes[owner][-1]
        if not live:
            return
        victim = data.draw(st.sampled_from(sorted(live)))
        assert self.store.forget(owner, [victim]).verify(self.store)
        for then, gone in zip(self.cubes[owner], self.gone[owner], strict=True):
            gone |= {victim} & set(then)
        past = [{name: text for name, text in then.items() if name != victim} for then in self.cubes[owner]]
        self.cubes[owner] = [*past, past[-1]]
        self.gone[owner].append(set())
        self.groups[owner].append(self.groups[owner][-1])

    @rule(owner=st.sampled_from(OWNERS), text=TEXTS)
    def refused(self, owner: str, text: str) -> None:
        """Writes that must fail and leave no trace; the invariants look for one."""
        draft = CubeDraft.of(text)
        with pytest.raises(NotFoundError):
            self.store.commit(owner, add=[draft], retire=["0" * 32], groups=["g9"])
        with pytest.raises(RevisionConflictError):
            self.store.commit(owner, add=[draft], parent=len(self.cubes[owner]))
        with pytest.raises(InvalidInputError):
            self.store.commit(owner, add=[draft], groups=["g9", owner])
        with pytest.raises(NotFoundError):
            self.store.rollback(owner, len(self.cubes[owner]))

    @invariant()
    def every_revision_is_as_it_was(self) -> None:
        for owner in OWNERS:
            assert self.store.head(owner) == len(self.cubes[owner]) - 1
            for number, expected in enumerate(self.cubes[owner]):
                found = self.store.cubes(owner, revision=number)
                assert {cube.id: cube.text for cube in found} == expected
                assert self.store.groups(owner, revision=number) == self.groups[owner][number]
            assert [r.number for r in self.store.history(owner)] == list(range(1, len(self.cubes[owner])))

    @invariant()
    def history_replays_to_the_live_set(self) -> None:
        for owner in OWNERS:
            live: set[str] = set()
            for revision in self.store.history(owner):
                assert live >= set(revision.retired)
                assert not live & set(revision.added)
                live = live - set(revision.retired) | set(revision.added)
            assert live == set(self.cubes[owner][-1])


HistoryMachine.TestCase.settings = settings(
    max_examples=8, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
TestHistory = HistoryMachine.TestCase


def test_ids_come_back_in_the_order_of_the_drafts(store: MemoryStore) -> None:
    texts = [f"text {n}" for n in range(20)]
    revision = store.commit("alice", add=[CubeDraft.of(text) for text in texts])
    assert [store.get("alice", cube_id).text for cube_id in revision.added] == texts
    assert [cube.text for cube in store.cubes("alice")] == texts


def test_a_retired_cube_is_still_readable_and_comes_back(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("old address")]).added
    store.commit("alice", retire=[cube_id])
    assert store.cubes("alice") == []
    assert store.get("alice", cube_id).revision == 1
    assert store.rollback("alice", 1).added == (cube_id,)
    assert [cube.id for cube in store.cubes("alice")] == [cube_id]


def test_rollback_restores_the_rest_and_reports_what_is_gone(store: MemoryStore) -> None:
    first = store.commit("alice", add=[CubeDraft.of("stays"), CubeDraft.of("goes"), CubeDraft.of("retired")])
    stays, goes, retired = first.added
    store.commit("alice", retire=[retired, goes])
    store.forget("alice", [goes])
    revision = store.rollback("alice", 1)
    assert revision.gone == (goes,)
    assert {cube.id for cube in store.cubes("alice")} == {stays, retired}
    assert store.history("alice")[0].added == (stays, retired, goes), "the past keeps naming what it added"
