"""Many threads, one store: exactly one commit wins a parent, and readers see whole revisions."""

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_sdk.errors import RevisionConflictError
from persona_sdk.memory import CubeDraft, MemoryStore, Retriever, VectorIndex
from persona_sdk.testing import HashEmbedder


@pytest.mark.parametrize("stores", [1, 2])
def test_exactly_one_of_two_commits_with_the_same_parent_wins(
    open_store: Callable[[], MemoryStore], stores: int
) -> None:
    one, two = open_store(), open_store()
    handles = [one, two if stores == 2 else one]
    for parent in range(8):
        barrier = threading.Barrier(2)

        def commit(handle: MemoryStore, parent: int = parent, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            try:
                handle.commit("alice", add=[CubeDraft.of(f"after {parent}")], parent=parent)
                return True
            except RevisionConflictError:
                return False

        with ThreadPoolExecutor(2) as pool:
            assert sorted(pool.map(commit, handles)) == [False, True]
        assert one.head("alice") == parent + 1
    assert len(one.cubes("alice")) == 8


def test_readers_see_whole_revisions_while_others_write(
    store: MemoryStore, note: Callable[..., CubeDraft], embedder: HashEmbedder
) -> None:
    """Each commit replaces both halves of a pair, so that a torn read would see an odd one."""
    retriever = Retriever(store, VectorIndex(store), embedder)
    store.commit("alice", add=[note("dogs 0"), note("cats 0")])
    done = threading.Event()

    def write() -> None:
        try:
            for number in range(1, 30):
                live = [cube.id for cube in store.cubes("alice")]
                revision = store.commit(
                    "alice", add=[note(f"dogs {number}"), note(f"cats {number}")], retire=live
                )
                if number % 5 == 0:
                    store.forget("alice", store.history("alice")[number - 3].added or revision.retired)
                if number % 7 == 0:
                    store.rollback("alice", store.head("alice"))
        finally:
            done.set()

    def read() -> int:
        count = 0
        while not done.is_set() or not count:
            for cubes in (store.cubes("alice"), retriever.recall(("alice",), "dogs", 10)):
                assert len({cube.text.split()[1] for cube in cubes if cube.text}) == 1
                assert len(cubes) == 2
            count += 1
        return count

    with ThreadPoolExecutor(4) as pool:
        writer, *readers = pool.submit(write), *[pool.submit(read) for _ in range(3)]
        writer.result()
        assert all(reader.result() for reader in readers)


def test_threads_that_write_different_owners_lose_nothing(store: MemoryStore) -> None:
    def write(owner: str) -> None:
        for number in range(8):
            store.commit(owner, add=[CubeDraft.of(f"{owner} {number}")], parent=number)

    owners = [f"user{n}" for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(write, owners))
    for owner in owners:
        assert [cube.text for cube in store.cubes(owner)] == [f"{owner} {n}" for n in range(8)]
