"""Fixtures and settings shared by all tests. Nothing here reaches a model hub."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before the hub client is imported: it reads this once
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from persona_sdk import PersonaModel
from persona_sdk.models import LanguageModel, SentenceEmbedder
from persona_sdk.testing import HashEmbedder, tiny_language_model

# Tiny tensors gain nothing from threads, and one thread makes sums repeatable from run to run.
torch.set_num_threads(1)

# Deadlines fail on a busy machine, not on a bug. CI replays the same examples; at home they are new ones.
settings.register_profile("default", deadline=None, max_examples=50)
settings.register_profile("ci", parent=settings.get_profile("default"), derandomize=True)
settings.load_profile("ci" if os.environ.get("CI") else "default")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked ``gpu`` are skipped, visibly, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def tiny() -> LanguageModel:
    """A random two-layer llama with a real tokenizer and chat template."""
    return tiny_language_model()


@pytest.fixture(scope="session")
def hash_embedder() -> HashEmbedder:
    """An embedder without weights."""
    return HashEmbedder()


@pytest.fixture
def model(tmp_path: Path, tiny: LanguageModel, hash_embedder: HashEmbedder) -> Iterator[PersonaModel]:
    """A `PersonaModel` on the tiny model and an empty store."""
    with PersonaModel.from_pretrained(tiny, store=tmp_path / "store", embedder=hash_embedder) as opened:
        yield opened


@pytest.fixture(scope="session")
def smollm2() -> LanguageModel:
    """The embedded default base model. Mark tests that use it with ``model``."""
    return LanguageModel.from_pretrained("smollm2-135m", device="cpu")


@pytest.fixture(scope="session")
def minilm() -> SentenceEmbedder:
    """The embedded default embedder. Mark tests that use it with ``model``."""
    return SentenceEmbedder("minilm")
