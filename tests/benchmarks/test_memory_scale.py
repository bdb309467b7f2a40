"""The made-up personas of the scale benchmark, what is measured on them, and that a wrong store shows."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory_scale
from benchmarks.harness import BenchmarkError, Cells
from benchmarks.memory import Run
from benchmarks.memory_population import LARGEST, Population, build, owner
from persona_sdk.memory import MemoryStore

SMALL = Population(6, 300, seed=1)


def quiet(_: str) -> None:
    pass


@pytest.mark.parametrize("population", [Population(10_000, 1_000_000), Population(200, 20_000), SMALL])
def test_sizes_add_up_and_have_a_heavy_tail(population: Population) -> None:
    sizes = population.sizes
    assert sum(sizes) == population.memories
    assert min(sizes) >= 1
    assert max(sizes) <= LARGEST
    if population.users == 10_000:
        assert 25 <= np.median(sizes) <= 35
        assert max(sizes) == LARGEST


def test_personas_are_the_same_in_every_store_and_differ_from_each_other() -> None:
    few = SMALL.first(2)
    assert few.sizes == SMALL.sizes[:2]
    assert few.memories == sum(few.sizes)
    assert few.name != SMALL.name
    vectors = few.vectors(1)
    np.testing.assert_array_equal(vectors, SMALL.vectors(1))
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, rtol=1e-5)
    assert (vectors @ SMALL.vectors(0).T).max() < 0.5
    assert len(few.texts(1)) == len(vectors)
    words, query = SMALL.query(1, 0)
    assert set(words.split()) <= {word for text in SMALL.texts(1) for word in text.split()}
    assert query @ query == pytest.approx(1, rel=1e-5)


def test_a_store_that_was_begun_is_completed(tmp_path: Path) -> None:
    cells = Cells(None)
    assert build(SMALL.first(2), tmp_path, cells, quiet)[0] == sum(SMALL.sizes[:2])
    assert build(SMALL, tmp_path, cells, quiet)[0] == 300 - sum(SMALL.sizes[:2])
    with MemoryStore.open(tmp_path) as store:
        assert [persona.cubes for persona in store.personas()] == SMALL.sizes


def test_cells_without_their_store_are_refused(tmp_path: Path) -> None:
    cells = Cells(tmp_path / "cells")
    build(SMALL, tmp_path / "store", cells, quiet)
    with pytest.raises(BenchmarkError, match="0 memories, not 300"):
        build(SMALL, tmp_path / "other", cells, quiet)


def test_recall_is_against_brute_force_and_can_be_missed(tmp_path: Path) -> None:
    build(SMALL, tmp_path, Cells(None), quiet)
    with MemoryStore.open(tmp_path) as store:
        bench = memory_scale._Bench(SMALL, store, None)
        assert bench.recall(range(6), 0) == 1.0
        live = [cube.id for cube in store.cubes(owner(0))]
        best = SMALL.nearest(0, SMALL.query(0, 0)[1], memory_scale.K)
        store.commit(owner(0), retire=[live[max(best)]])
        assert bench.recall([0], 0) < 1.0


def test_filtering_after_a_search_over_everybody_loses_recall() -> None:
    population = Population(40, 4000, seed=2)
    found = memory_scale._global(population, range(40))
    assert found["recall"] < 0.5
    alone = Population(1, 100, seed=2)
    assert memory_scale._global(alone, [0])["recall"] == 1.0


def test_the_part_measures_all_it_promises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory_scale, "Population", lambda *_, **options: Population(12, 600, **options))
    monkeypatch.delenv(memory_scale.mem0_rows.VARIABLE, raising=False)
    run = Run(True, 1, 1, tmp_path, Cells(tmp_path / "cells"), quiet)
    part = memory_scale.measure(run)
    assert set(part.bars) == {
        "scale_open_s",
        "scale_retrieval_p50_ms",
        "scale_retrieval_p95_ms",
        "scale_recall",
        "scale_recall_worst",
        "scale_erase_1000_s",
    }
    assert part.bars["scale_recall"].value == part.bars["scale_recall_worst"].value == 1.0
    assert [row["tenants"] for row in part.tables["memory: the same ten personas among more"]] == [10, 12]
    assert part.tables["memory: storage"][0]["bytes_per_memory"] > 1536
    again = memory_scale.measure(run)
    assert again.bars == part.bars, "a second run takes the finished cells"
    assert again.tables == part.tables
