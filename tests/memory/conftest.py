"""Fixtures of the memory tests: an open store, a small embedder and a maker of drafts."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.testing import HashEmbedder

Draft = Callable[..., CubeDraft]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def store(folder: Path) -> Iterator[MemoryStore]:
    with MemoryStore.open(folder) as opened:
        yield opened


@pytest.fixture(scope="session")
def embedder() -> HashEmbedder:
    return HashEmbedder()


@pytest.fixture
def note(embedder: HashEmbedder) -> Draft:
    """Makes an embedded plaintext draft."""

    def make(text: str, **header: Any) -> CubeDraft:
        return CubeDraft.of(text, vector=embedder.encode([text])[0], encoder=embedder.fingerprint, **header)

    return make


@pytest.fixture
def weights() -> Draft:
    """Makes a parametric draft whose tensors follow from a seed."""

    def make(seed: int = 0, **header: Any) -> CubeDraft:
        values = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed))
        return CubeDraft.of(kind="parametric", payload={"m.A": values, "m.B": values.T}, **header)

    return make
