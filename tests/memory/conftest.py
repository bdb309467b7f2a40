"""Fixtures of the memory tests: an open store, a small embedder and a maker of drafts.

A test that takes `store` or `open_store` runs on every kind of database. One that takes `folder` as well, by
itself or by a fixture, is about SQLite's files and runs on SQLite alone.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.testing import HashEmbedder
from tests.memory.postgres_server import NoServer, server

Draft = Callable[..., CubeDraft]
OpenStore = Callable[..., MemoryStore]

_numbers = itertools.count()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        kinds = ("sqlite",) if "folder" in metafunc.fixturenames else ("sqlite", "postgres")
        metafunc.parametrize("backend", kinds, scope="session")


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """URL of a server's database; the test is skipped where none can be started."""
    pytest.importorskip("psycopg", reason='psycopg is not installed: pip install "persona-sdk[scale]"')
    with ExitStack() as stack:
        try:
            url = stack.enter_context(server())
        except NoServer as error:
            pytest.skip(str(error))
        yield url


@pytest.fixture
def schema_url(postgres_url: str) -> Iterator[str]:
    """URL of an empty schema of that database."""
    from sqlalchemy import create_engine

    name = f"t{next(_numbers)}"
    engine = create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql(f"CREATE SCHEMA {name}")
        yield f"{postgres_url}&options=-csearch_path%3D{name}"
        connection.exec_driver_sql(f"DROP SCHEMA {name} CASCADE")
    engine.dispose()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def open_store(backend: str, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[OpenStore]:
    """Opens the test's one store, as often as it is called; each is closed at the end."""
    if backend == "postgres":
        place, where = request.getfixturevalue("schema_url"), {"blobs": tmp_path / "store"}
    else:
        place, where = request.getfixturevalue("folder"), {}
    with ExitStack() as stack:

        def opened(**options: Any) -> MemoryStore:
            return stack.enter_context(MemoryStore.open(place, **where, **options))

        yield opened


@pytest.fixture
def store(open_store: OpenStore) -> MemoryStore:
    return open_store()


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
