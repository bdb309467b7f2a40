"""Memory as keys and values: cells on a tiny model, and bars that follow from them."""

import json
from pathlib import Path

import pytest

from benchmarks import memory_kv
from benchmarks.harness import BenchmarkError, Cells
from benchmarks.memory import Run
from benchmarks.memory_kv import exactness, first_token, summarise
from persona_sdk.memory import MemoryStore


def timed(memory, prompt, kept, computed):
    wall = {"kept": [kept] * 31, "computed": [computed] * 31}
    timing = {"wall": wall, "cpu": {}, "switches": [0] * 31, "load": (0.1, 0.2), "steal": 0.0}
    return {"timing": timing, "memory": memory, "prompt": prompt, "reused": memory}


def stored(memory, difference=1e-6):
    return {"memory": memory, "prompt": 64, "difference": difference, "bytes": 100 * memory} | {
        "compute": 1.0,
        "commit": 0.5,
        "load": 0.1,
    }


def test_bars_follow_from_the_cells():
    curve = [timed(64, 16, 0.5, 1.0), timed(1000, 128, 0.2, 1.0)]
    part = summarise(curve, [stored(64), stored(1000, difference=2e-4)])
    difference, eight, worst = part.bars.values()
    assert (difference.value, difference.ok) == (2e-4, False)
    assert eight.value == pytest.approx(0.2)
    assert eight.ok
    assert worst.value == pytest.approx(0.5)
    ratios = [row["memory:prompt"] for row in part.tables["memory as keys and values: first token"]]
    assert ratios == sorted(ratios)
    costs = {row["memory"]: row for row in part.tables["memory as keys and values: cost"]}
    assert costs[64]["uses that pay"] == pytest.approx(1.5 / 0.5)
    json.dumps(part.tables, allow_nan=False)


def test_a_cell_on_a_tiny_model(tiny):
    cell = first_token(tiny, 64, 16, iterations=2)
    assert cell["reused"] >= 0.9 * 64
    assert len(cell["timing"]["wall"]["kept"]) == 2


def test_stored_keys_and_values_are_exact(tiny):
    cell = exactness(tiny, 64, 32, repeats=1)
    assert cell["difference"] <= memory_kv.EXACT
    assert cell["bytes"] == 2 * 2 * 64 * 2 * 8 * 4  # keys and values, layers, tokens, heads, width, float32


def test_a_wrong_byte_shows_in_the_difference(tiny, monkeypatch):
    real = MemoryStore.load_blob

    def off(self, owner, blob):
        return {name: tensor + 0.01 for name, tensor in real(self, owner, blob).items()}

    monkeypatch.setattr(MemoryStore, "load_blob", off)
    assert exactness(tiny, 64, 32, repeats=1)["difference"] > memory_kv.EXACT


def test_a_memory_that_is_computed_again_is_no_measurement(tiny):
    with pytest.raises(BenchmarkError, match="kept"):
        first_token(tiny, 8, 16, iterations=1)  # less than a block


def test_a_whole_part(tiny, monkeypatch, tmp_path):
    monkeypatch.setattr(memory_kv, "smollm2", lambda: (tiny, "tiny"))
    run = Run(True, 1, 1, Path("nowhere"), Cells(tmp_path), lambda _: None)
    part = memory_kv.measure(run)
    assert len(part.tables["memory as keys and values: first token"]) == 4
    monkeypatch.setattr(memory_kv, "smollm2", lambda: pytest.fail("cells were to be read"))
    again = memory_kv.measure(Run(True, 1, 1, Path("nowhere"), Cells(tmp_path), lambda _: None))
    assert again.bars == part.bars
