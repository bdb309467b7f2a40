"""Weights that went because of one source can be trained again from the others."""

from collections.abc import Callable, Sequence

import torch

from persona_sdk.memory import CubeDraft, MemoryStore, Source
from persona_sdk.memory.derived import Derived, Retrainable

Maker = Callable[..., CubeDraft]


def train(store: MemoryStore, owner: str, sources: Sequence[Source]) -> str:
    """A trainer that is easy to check: its weights are the lengths of the texts they were made from."""
    cubes = [store.get(source.owner, source.cube_id) for source in sources]
    weights = torch.tensor([float(len(cube.text or "")) for cube in cubes])
    origin = {"kind": "derived", "reference": "lengths"}
    links = tuple(Source.of(cube) for cube in cubes)
    header = {"sources": links, "origin": origin, "semantic_type": "adapter"}
    draft = CubeDraft.of(kind="parametric", payload={"w": weights}, **header)
    return store.commit(owner, add=[draft]).added[0]


def weights_of(store: MemoryStore, owner: str) -> list[list[float]]:
    cubes = [cube for cube in store.cubes(owner, kind="parametric") if cube.blob]
    return [store.load_blob(owner, cube.blob)["w"].tolist() for cube in cubes if cube.blob]


def test_an_adapter_is_trained_again_from_what_remains(store: MemoryStore) -> None:
    texts = store.commit("alice", add=[CubeDraft.of("x" * n) for n in (1, 2, 3)]).added
    old = train(store, "alice", [Source.of(store.get("alice", name)) for name in texts])
    told: list[Derived] = []

    def retrain(derived: Sequence[Derived]) -> None:
        assert weights_of(store, "alice") == [], "what was erased is gone before anything is trained"
        told.extend(derived)
        for item in derived:
            if item.live and item.kind == "parametric" and item.origin.reference == "lengths":
                train(store, item.owner, item.sources)

    store.on_derived_erased(retrain)
    assert weights_of(store, "alice") == [[1.0, 2.0, 3.0]]
    receipt = store.forget("alice", [texts[1]])
    assert receipt.retrainable == (Retrainable(old, (texts[0], texts[2])),)
    assert weights_of(store, "alice") == [[1.0, 3.0]]
    assert [(item.owner, item.cube_id, item.semantic_type) for item in told] == [("alice", old, "adapter")]
    assert receipt.verify(store)
    store.forget("alice", [texts[0]])
    assert weights_of(store, "alice") == [[3.0]]
    assert store.forget("alice", [texts[2]]).retrainable == (), "there is nothing left to train from"
    assert weights_of(store, "alice") == [[]]  # the listener above asks no questions


def test_only_live_weights_with_a_source_left_are_named(store: MemoryStore, weights: Maker) -> None:
    one, two = store.commit("alice", add=[CubeDraft.of("one"), CubeDraft.of("two")]).added
    links = tuple(Source.of(store.get("alice", name)) for name in (one, two))
    told: list[Derived] = []
    store.on_derived_erased(told.extend)
    cache = CubeDraft.of(kind="activation", payload={"k": torch.ones(2)}, sources=links)
    live, retired, alone, _ = store.commit(
        "alice",
        add=[weights(1, sources=links), weights(2, sources=links), weights(3, sources=links[:1]), cache],
    ).added
    store.commit("alice", retire=[retired])
    second = train(store, "bob", [Source.of(store.get("alice", live)), links[1]])
    receipt = store.forget("alice", [one])
    assert {item.cube_id for item in receipt.retrainable} == {live, second}
    assert {item.sources for item in receipt.retrainable} == {(two,)}, "nor from weights that went as well"
    assert len(told) == 5
    assert {item.cube_id: item.live for item in told}[retired] is False
    assert {item.cube_id: item.sources for item in told}[alone] == ()
    assert "bob" not in receipt.canonical()


def test_nobody_is_told_when_nothing_was_derived_or_everything_failed(store: MemoryStore) -> None:
    told: list[object] = []
    store.on_derived_erased(told.append)
    (plain,) = store.commit("alice", add=[CubeDraft.of("plain")]).added
    store.forget("alice", [plain])
    assert told == []


def test_a_trainer_that_fails_does_not_cost_the_receipt(store: MemoryStore) -> None:
    texts = store.commit("alice", add=[CubeDraft.of("one"), CubeDraft.of("two")]).added
    train(store, "alice", [Source.of(store.get("alice", name)) for name in texts])

    def broken(_derived: Sequence[Derived]) -> None:
        raise ValueError("not our fault")

    store.on_derived_erased(broken)
    receipt = store.forget("alice", texts[:1])
    assert len(receipt.retrainable) == 1
    assert receipt.verify(store)
