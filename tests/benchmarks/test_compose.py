"""The composition benchmark end to end on a tiny model: cells, resuming, refusing, bars."""

import json

import pytest

from benchmarks import compose, compose_cell, compose_tables, harness
from benchmarks.compose_cell import Cell, Step
from benchmarks.harness import BenchmarkError

SMALL = ((Step("decode", 6, 1, cached=5), 1), (Step("decode", 6, 1, cached=5), 3), (Step("prefill", 4, 4), 2))


@pytest.fixture
def small(monkeypatch, tiny):
    """The real command on a tiny model and grid; the list counts how often the model was loaded."""
    loaded: list[int] = []

    def load():
        loaded.append(1)
        return tiny, "a test"

    monkeypatch.setattr(compose, "SUBJECTS", {"tiny": load})
    monkeypatch.setattr(compose, "QUICK", SMALL)
    monkeypatch.setattr(compose, "ITERATIONS", {True: 3, False: 35})
    return loaded


def run(*argv: str) -> int:
    return compose.main(["--quick", *argv])


def test_a_run_measures_writes_and_resumes(tmp_path, small, capsys):
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    assert run("--json", str(first), "--resume", str(tmp_path / "cells")) == 0
    assert len(small) == 1
    assert len(list((tmp_path / "cells").glob("*.json"))) == len(SMALL)
    assert "Smoke run" in capsys.readouterr().out

    result = harness.read(first)
    assert result.quick
    assert {row["source"] if "source" in row else row["weights"] for row in result.tables["models"]} == {
        "a test"
    }
    assert len(result.tables["ratios"]) == len(SMALL) * 3
    assert {row["distinct"] for row in result.tables["admission"]} == {1, 3}
    assert result.bars["ops_constant_in_distinct_adapters"].value == 0
    for row in result.tables["operations"]:
        # A compiled branch is no operator of torch; which kernel this machine takes, it decides itself.
        assert row["base"] <= row["ours"] <= row["peft"]
        assert row["ours"] < row["peft"] or row["distinct"] == 1

    # One cell is lost; only it is measured again, the others keep their numbers to the last digit.
    lost = next(p for p in (tmp_path / "cells").glob("*prefill*"))
    lost.unlink()
    assert run("--json", str(second), "--resume", str(tmp_path / "cells")) == 0
    assert len(small) == 2
    assert lost.exists()
    kept = [row for row in result.tables["ratios"] if "decode" in row["step"]]
    assert [row for row in harness.read(second).tables["ratios"] if "decode" in row["step"]] == kept

    assert run("--resume", str(tmp_path / "cells")) == 0
    assert len(small) == 2  # nothing left to measure: the model is not even loaded


def test_contenders_that_differ_stop_the_run(tmp_path, small, monkeypatch, capsys):
    def differ(*_: object) -> None:
        raise BenchmarkError("they differ")

    monkeypatch.setattr(compose_cell, "check_equal", differ)
    monkeypatch.setattr(compose_cell, "interleave", lambda *_, **__: pytest.fail("timed nevertheless"))
    assert run("--json", str(tmp_path / "x.json"), "--resume", str(tmp_path / "cells")) == 2
    assert "they differ" in capsys.readouterr().err
    assert list(tmp_path.rglob("*.json")) == []


def test_each_seed_is_a_cell_and_keys_differ_in_everything():
    cells = compose.grid(["smollm2", "wide"], quick=False, seeds=2, threads=1)
    assert len({cell.key for cell in cells}) == len(cells) == 2 * 2 * len(compose.FULL)
    assert {cell.iterations for cell in cells} == {35}
    other = compose.grid(["wide"], quick=False, seeds=1, threads=2)
    assert not {cell.key for cell in cells} & {cell.key for cell in other}


def cell(distinct: int, *, ops: int, ours: float, peft: float, model: str = "wide", seed: int = 0):
    """A finished cell in which the base takes one second."""
    wall = {"base": [1.0] * 9, "ours": [ours] * 9, "peft": [peft] * 9}
    data = {
        "source": "made up",
        "shape": {"blocks": 1000, "head": 100, "kappa": 50},
        "rates": {"bytes_per_second": 1e6, "flops_per_second": 1e6},
        "equality": {"adapters": 1e-6, "none": 0.0, "effect": 0.3},
        "ops": {"base": 100, "ours": ops, "peft": 200 * distinct},
        "timing": {"wall": wall, "cpu": wall, "switches": [0] * 9, "load": [0.5, 0.7], "steal": 0.0},
    }
    point = Cell(model, compose.DECODE, distinct, 16, seed, 9, 1)
    return point, json.loads(json.dumps(data))  # as it comes back from disk


def test_bars_say_hit_and_miss_and_misses_stay():
    bars, tables, notes = compose_tables.summarise(
        [cell(1, ops=150, ours=1.2, peft=1.2), cell(32, ops=152, ours=1.5, peft=3.0)]
    )
    assert {key: (bar.value, bar.ok) for key, bar in bars.items()} == {
        "decode_u32_over_base_wide": (1.5, True),
        "peft_over_ours_decode_u32_wide": (2.0, False),
        "ops_constant_in_distinct_adapters": (2, False),
    }
    assert bars["decode_u32_over_base_wide"].interval == (1.5, 1.5)
    assert len(tables["ratios"]) == 6
    assert any("Smoke run" in note for note in notes)


def test_operations_are_compared_within_a_model_only():
    bars, _, _ = compose_tables.summarise(
        [
            cell(u, ops=ops, ours=1, peft=1, model=m)
            for m, ops in (("wide", 150), ("smollm2", 900))
            for u in (1, 32)
        ]
    )
    assert bars["ops_constant_in_distinct_adapters"].value == 0


def test_seeds_of_one_point_share_a_row():
    pooled = [cell(32, ops=1, ours=ours, peft=4, seed=seed) for seed, ours in enumerate((1.0, 1.4, 1.8))]
    bars, tables, _ = compose_tables.summarise(pooled)
    assert bars["decode_u32_over_base_wide"].value == 1.4
    assert tables["ratios"][0]["iterations"] == 27
    assert len(tables["floors"]) == 1


def test_numbers_that_contradict_each_other_are_flagged():
    point, data = cell(32, ops=1, ours=2.0, peft=4.0)
    data["timing"]["wall"]["base"] = [2.0] * 8 + [1.0]
    _, _, notes = compose_tables.summarise([(point, data)])
    assert any("wide decode 32x1 U=32: ours/base" in note and "minima" in note for note in notes)
