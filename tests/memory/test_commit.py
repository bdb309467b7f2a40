"""What a commit refuses, and that it refuses whole."""

import os
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.errors import InvalidInputError, NotFoundError, StoreError
from persona_sdk.memory import CubeDraft, CubeHeader, MemoryStore, Source

HALF = torch.ones(3, dtype=torch.float16)


@pytest.mark.parametrize(
    "parts",
    [
        {"text": ""},
        {"text": " \n"},
        {"text": "lone \ud800 surrogate"},
        {"text": "a", "payload": {"x": torch.ones(1)}},
        {"kind": "parametric"},
        {"kind": "parametric", "text": "a", "payload": {"x": torch.ones(1)}},
        {"kind": "activation", "payload": {}},
        {"text": "a", "vector": torch.ones(3)},
        {"text": "a", "encoder": "e"},
        {"text": "a", "encoder": "e", "vector": torch.ones(1, 3)},
        {"text": "a", "encoder": "e", "vector": HALF},
        {"text": "a", "encoder": "e", "vector": torch.tensor([1.0, float("nan")])},
        {"text": "a", "encoder": "line\nbreak", "vector": torch.ones(3)},
        {"text": "a", "colour": "red"},
        {"text": "a", "trust": "root"},
        {"text": "a", "semantic_type": "Fact; DROP"},
        {"text": "a", "attributes": {"x": float("nan")}},
        {"text": "a", "attributes": {"x": object()}},
        {"text": "a", "attributes": {"x": "\ud800"}},
        {"text": "a", "created_at": datetime(2024, 1, 1)},
    ],
)
def test_bad_drafts_are_refused(parts: dict[str, object]) -> None:
    with pytest.raises(InvalidInputError):
        CubeDraft.of(**parts)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["", "__metadata__", "nul\0"])
def test_tensors_with_unusable_names_are_refused(store: MemoryStore, name: str) -> None:
    with pytest.raises(InvalidInputError):
        store.commit("alice", add=[CubeDraft.of(kind="parametric", payload={name: torch.ones(1)})])
    assert store.head("alice") == 0


def test_a_commit_of_one_bad_draft_commits_nothing(store: MemoryStore) -> None:
    with pytest.raises(InvalidInputError):
        store.commit("alice", add=[CubeDraft.of("good"), CubeDraft(text=" ")])
    with pytest.raises(InvalidInputError):
        store.commit("alice", add=[CubeDraft.of("good")], message="\ud800")
    assert store.personas() == []


@pytest.mark.parametrize("owner", ["", "../x", "a b", "a\n", "-a", "x" * 129])
def test_owners_must_be_ids(store: MemoryStore, owner: str) -> None:
    with pytest.raises(InvalidInputError):
        store.commit(owner, add=[CubeDraft.of("text")])


def test_users_and_groups_never_mix(store: MemoryStore) -> None:
    store.commit("alice", groups=["nurses"])
    store.commit("doctors", kind="group")
    with pytest.raises(InvalidInputError, match="is a user"):
        store.commit("alice", kind="group")
    with pytest.raises(InvalidInputError, match="is a group"):
        store.commit("doctors")
    with pytest.raises(InvalidInputError, match="group of itself"):
        store.commit("bob", groups=["bob"])
    with pytest.raises(InvalidInputError, match="is a user"):
        store.commit("bob", groups=["alice"])
    with pytest.raises(InvalidInputError, match="in use as a group"):
        store.commit("nurses", kind="user")
    with pytest.raises(InvalidInputError, match="kind of persona"):
        store.commit("bob", kind="robot")
    assert [(p.id, p.kind, p.revision) for p in store.personas()] == [
        ("alice", "user", 1),
        ("doctors", "group", 1),
    ]
    assert (store.kind_of("alice"), store.kind_of("nobody")) == ("user", None)


def test_without_a_kind_the_persona_stays_what_it_is(store: MemoryStore) -> None:
    with pytest.raises(NotFoundError):
        store.commit("doctors", kind=None, add=[CubeDraft.of("good")])
    assert store.personas() == []
    for owner, kind in (("doctors", "group"), ("alice", "user")):
        store.commit(owner, kind=kind)
        assert store.commit(owner, kind=None, add=[CubeDraft.of("good")]).number == 2
        assert store.kind_of(owner) == kind


def test_a_source_must_exist_with_the_content_it_had(store: MemoryStore) -> None:
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("the source")]).added
    cube = store.get("alice", cube_id)
    good = Source.of(cube)
    store.commit("alice", add=[CubeDraft.of("derived", sources=(good,))])
    for bad in (good.model_copy(update={"sha256": "0" * 64}), good.model_copy(update={"cube_id": "0" * 32})):
        with pytest.raises(NotFoundError):
            store.commit("alice", add=[CubeDraft.of("derived", sources=(bad,))])
    store.forget("alice", [cube_id])
    with pytest.raises(NotFoundError):
        store.commit("alice", add=[CubeDraft.of("derived too late", sources=(good,))])


def test_times_are_kept_in_utc(store: MemoryStore) -> None:
    moment = datetime(2024, 5, 1, 12, 30, 15, 123456, tzinfo=timezone(timedelta(hours=5)))
    (cube_id,) = store.commit("alice", add=[CubeDraft.of("text", created_at=moment)]).added
    found = store.get("alice", cube_id).header.created_at
    assert found == moment
    assert found.tzinfo == UTC


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(
    text=st.text(min_size=1).filter(str.strip),
    attributes=st.dictionaries(st.text(), JSON, max_size=3),
    tag=st.text(),
)
@settings(max_examples=40, deadline=None)
def test_text_and_header_come_back_as_they_were(
    tmp_path_factory: pytest.TempPathFactory, text: str, attributes: dict[str, object], tag: str
) -> None:
    with MemoryStore.open(tmp_path_factory.getbasetemp() / "round_trip") as store:
        draft = CubeDraft.of(text, title=text, tags=(tag,), attributes=attributes)
        cube = store.get("alice", store.commit("alice", add=[draft], message=text).added[0])
        assert (cube.text, cube.header) == (text, draft.header)
        assert store.history("alice")[-1].message == text


def test_changing_what_was_handed_over_or_read_changes_nothing(
    store: MemoryStore, weights: Callable[..., CubeDraft]
) -> None:
    attributes: dict[str, object] = {"list": [1]}
    draft = CubeDraft.of("text", attributes=attributes)
    payload = weights()
    first, second = store.commit("alice", add=[draft, payload]).added
    attributes["list"] = "changed"
    cube = store.get("alice", first)
    cube.header.attributes["list"] = "changed"
    blob = store.get("alice", second).blob
    assert blob is not None
    store.load_blob("alice", blob)["m.A"].zero_()
    assert store.get("alice", first).header == CubeHeader(
        attributes={"list": [1]}, created_at=draft.header.created_at
    )
    assert payload.payload is not None
    assert torch.equal(store.load_blob("alice", blob)["m.A"], payload.payload["m.A"])


def test_a_closed_store_says_so(store: MemoryStore) -> None:
    store.close()
    with pytest.raises(StoreError, match="closed"):
        store.head("alice")
    with pytest.raises(StoreError, match="closed"):
        store.commit("alice")


@pytest.mark.parametrize("depth", [250, 600])
def test_what_could_not_be_read_again_is_not_written(store: MemoryStore, depth: int) -> None:
    deep: Any = 0
    for _ in range(depth):
        deep = [deep]
    store.commit("alice", add=[CubeDraft.of("before")])
    with pytest.raises(InvalidInputError):
        store.commit("alice", add=[CubeDraft.of("x", attributes={"deep": deep})])
    forged = CubeDraft.of("x").header.model_copy(update={"trust": "root"})
    with pytest.raises(InvalidInputError, match="read again"):
        store.commit("alice", add=[CubeDraft(text="x", header=forged)])
    assert [cube.text for cube in store.cubes("alice")] == ["before"]


def test_a_string_is_no_list_of_groups(store: MemoryStore) -> None:
    with pytest.raises(InvalidInputError, match="list"):
        store.commit("alice", groups="nurses")
    assert store.personas() == []


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_store_is_not_used_across_a_fork(folder: Path) -> None:
    script = f"""
import os
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.errors import StoreError
store = MemoryStore.open({str(folder)!r})
store.commit("alice", add=[CubeDraft.of("parent")])
child = os.fork()
if child == 0:
    try:
        store.commit("alice", add=[CubeDraft.of("child")])
    except StoreError:
        os._exit(7)
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert store.head("alice") == 1
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], check=True, timeout=60)
