"""From what was measured to bars and tables, and a whole run on a tiny model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from benchmarks import harness, plots, serve, serve_latency, serve_replay, serve_step, serve_tables
from benchmarks.harness import BenchmarkError
from benchmarks.serve_scene import Scene
from benchmarks.serve_step import Cell, Stage
from benchmarks.serve_tables import Findings, summarise
from benchmarks.traces import TraceConfig

MILLISECONDS = {
    "ours": 12.0,
    "base": 10.0,
    "eager": 16.0,
    "ours bfloat16": 11.0,
    "peft": 60.0,
    "switching": 90.0,
    "vllm": 11.0,
    "vllm compiled": 9.0,
    "vllm lora": 24.0,
}


def cell(**changes) -> Cell:
    names = tuple(changes.pop("contenders", MILLISECONDS))
    plain = Cell("tiny", "float32", "decode", 32, 64, 32, 31, 1, names)
    return replace(plain, **changes)


def measured(names, scale: float = 1.0) -> dict:
    """Every contender at its constant time."""
    wall = {name: [scale * MILLISECONDS[name] / 1000] * 31 for name in names}
    timing = {"wall": wall, "cpu": {}, "switches": [0] * 31, "load": (0.1, 0.2), "steal": 0.0}
    return {
        "source": "random",
        "shape": {"blocks": 10**8, "head": 10**7, "kappa": 3 * 10**5},
        "rates": {"bytes_per_second": 1e10, "flops_per_second": 1e11},
        "timing": timing,
        "vllm": "0",
    }


def step(**changes) -> tuple[Cell, dict]:
    point = cell(**changes)
    return point, measured(point.contenders)


def replayed(adapters: int, speed: float, **changes) -> tuple[TraceConfig, dict]:
    config = TraceConfig(**{"requests": 40, "adapters": adapters, "rate": 20.0, "law": "zipf"} | changes)
    names = ("requests_per_second", "offered_per_second", "first_token_median", "first_token_p99")
    return config, {**dict.fromkeys(names, 1.0), "tokens_per_second": speed, "distinct": 1.0, "touched": 1}


def test_bars_follow_from_the_times():
    bars, _, _ = summarise(Findings(steps=[step(), step(phase="prefill", contenders=("ours", "base"))]))
    expected = {
        "decode_over_base": (1.2, True),
        "peft_over_ours_decode": (5.0, True),
        "decode_over_base_bfloat16_adapters": (1.1, True),
        "peft_over_ours_decode_bfloat16_adapters": (60 / 11, True),
        "vllm_lora_over_ours_decode": (2.0, True),
        "prefill_over_base": (1.2, False),
        "base_over_vllm_decode": (10 / 11, True),
        "base_over_compiled_vllm_decode": (10 / 9, False),
    }
    assert {key: (pytest.approx(bar.value), bar.ok) for key, bar in bars.items()} == expected


def test_a_peer_that_is_absent_has_no_bar_and_no_row():
    bars, tables, _ = summarise(Findings(steps=[step(contenders=("ours", "base", "peft"))]))
    assert set(bars) == {"decode_over_base", "peft_over_ours_decode"}
    assert {row["pair"] for row in tables["decode"]} == {"ours / base", "ours / peft"}


def test_bars_are_taken_where_most_personas_are():
    few, data = step(personas=1)
    data["timing"]["wall"]["ours"] = [1.0] * 31
    bars, _, _ = summarise(Findings(steps=[(few, data), step()]))
    assert bars["decode_over_base"].value == pytest.approx(1.2)


def test_the_floor_stands_beside_the_ratio_over_base():
    point, data = step()
    _, tables, _ = summarise(Findings(steps=[(point, data)]))
    floors = {row["pair"]: row["floor"] for row in tables["decode"]}
    # 32 users and 4 groups of rank 8, read once, at 10 GB/s, over a base step of 10 ms
    read = 36 * 8 * 3e5 * 4 / 1e10
    assert floors.pop("ours / base") == pytest.approx(1 + read / 0.01)
    assert set(floors.values()) == {None}
    # a prefill of many tokens is bound by its operations: 64 + 8 entries of 32 rows at rank 16
    long = cell(phase="prefill")
    operations = 2 * 32 * 72 * 16 * 3e5 / 1e11
    assert serve_tables.floor_over_base(long, data, 0.01) == pytest.approx(1 + operations / 0.01)


def test_the_fall_of_throughput_is_paired_by_draw_and_leaves_bursts_out():
    replays = [
        replayed(5, 100.0),
        replayed(2000, 95.0),
        replayed(5, 50.0, seed=1),
        replayed(2000, 40.0, seed=1),
        replayed(5, 60.0, seed=2),
        replayed(2000, 54.0, seed=2),
        replayed(2000, 1.0, cv=4.0),
        replayed(5, 10.0, law="uniform"),
    ]
    bars, tables, _ = summarise(Findings(replays=replays, narrow_replays=replays[:2]))
    assert bars.pop("throughput_fall_zipf_bfloat16_adapters").value == pytest.approx(0.05)
    assert set(bars) == {"throughput_fall_zipf"}
    assert bars["throughput_fall_zipf"].value == pytest.approx(0.1)
    assert len(tables["trace replay"]) == len(replays)


def test_first_token_and_stall_become_rows():
    timing = {"wall": {"kept": [0.1] * 9, "computed": [0.8] * 9}, "cpu": {}, "switches": [0] * 9}
    timing |= {"load": (0.0, 0.0), "steal": 0.0}
    first = {"timing": timing, "reused": 992, "memory": 1000, "question": 16}
    gaps = {"alone": [0.01], "chunked": [0.03], "whole": [2.0]}
    stall = {"gaps": gaps, "newcomer": {"chunked": [3.0], "whole": [2.0]}, "chunk": 64, "rows": 8}
    bars, tables, _ = summarise(Findings(first_token=first, stall={**stall, "prompt": 1000}))
    assert bars["first_token_computed_over_kept"].value == pytest.approx(8.0)
    assert tables["first token"][0]["ceiling (tokens computed)"] == pytest.approx(1016 / 24)
    assert [row["longest gap ms"] for row in tables["longest gap between tokens"]] == [10.0, 30.0, 2000.0]


def test_few_iterations_are_called_a_smoke_run():
    point, data = step()
    data["timing"]["wall"] = {name: times[:9] for name, times in data["timing"]["wall"].items()}
    data["timing"]["switches"] = [0] * 9
    assert "Claims nothing" in summarise(Findings(steps=[(point, data)]))[2][0]
    assert not any("Claims nothing" in note for note in summarise(Findings(steps=[step()]))[2])


def test_grids_name_vllm_only_where_it_is_and_keys_differ():
    for quick in (True, False):
        without = serve.grid(quick=quick, dtype="float32", threads=1, with_vllm=False)
        assert not any("vllm" in name for one in without for name in one.contenders)
        with_it = serve.grid(quick=quick, dtype="float32", threads=1, with_vllm=True)
        assert {"vllm", "vllm lora"} <= set(with_it[0].contenders)
        keys = [one.key for one in (*without, *with_it)]
        assert len(set(keys)) == len(keys)


def test_traces_come_in_pairs_and_alternate():
    quick = serve.traces(quick=True, draws=2)
    assert [(one.adapters, one.seed) for one in quick if one.law == "zipf"] == [
        (5, 0),
        (2000, 0),
        (2000, 1),
        (5, 1),
    ]
    full = serve.traces(quick=False, draws=3)
    assert {one.adapters for one in full} == {5, 100, 1000, 2000}
    assert {one.cv for one in full} == {1.0, 4.0}
    keys = [(one.adapters, one.law, one.cv, one.seed) for one in full]
    assert len(set(keys)) == len(keys)


def test_the_figure_is_drawn_from_the_result_alone():
    pytest.importorskip("matplotlib")
    found = Findings(
        steps=[step(), step(phase="prefill", contenders=("ours", "base"))],
        replays=[replayed(5, 10.0), replayed(2000, 9.0)],
    )
    bars, tables, notes = summarise(found)
    result = harness.Result(
        name="serve",
        command="python -m benchmarks.serve",
        commit="f",
        machine={},
        versions={},
        bars=bars,
        tables=tables,
        notes=notes,
    )
    image = plots.png(result)
    assert image is not None
    assert image.startswith(b"\x89PNG")
    assert json.loads(result.model_dump_json())["bars"]


# With the engine ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def stage(tiny):
    with Stage.build(tiny, "random", rows=6, width=5, threads=1) as built:
        yield built


def test_contenders_agree(stage):
    shares = stage.check(6)
    assert set(shares) == {"ours = peft", "ours bfloat16 = ours", "switching = peft", "base = eager"}
    assert min(shares.values()) == 1.0


def test_adapters_that_do_nothing_are_refused(stage, monkeypatch):
    plain = Scene.base_requests
    monkeypatch.setattr(Scene, "requests", lambda scene, *, prefix=True: plain(scene))
    with pytest.raises(BenchmarkError, match="other tokens"):
        stage.check(6)


def test_our_rows_grow_as_everybodys_do(stage):
    batches = stage.batches(stage.scene.with_personas(3))
    assert serve_step.reply(batches["ours"], 6) == serve_step.reply(batches["peft"], 6)


@pytest.mark.parametrize("phase", ["decode", "prefill"])
def test_a_step_is_timed_for_every_contender(stage, phase):
    names = ("ours", "base", "eager", "peft", "switching")
    point = cell(phase=phase, rows=4, width=5, personas=2, iterations=3, contenders=names)
    data = stage.measure(point)
    assert set(data["timing"]["wall"]) == set(names)
    assert all(len(times) == 3 and min(times) > 0 for times in data["timing"]["wall"].values())
    json.dumps(data)


def test_continuous_batching_takes_turns_with_our_base(stage):
    found = stage.continuous(rows=3, width=5, tokens=4, turns=2)
    _, tables, _ = summarise(Findings(continuous=found))
    rows = tables["continuous batching"]
    assert [row["step"] for row in rows] == ["prefill", "prefill", "decode", "decode"]
    assert all(row["ms"] > 0 for row in rows)
    assert all(len(times) == 2 for phase in found.values() for times in phase["wall"].values())


def test_a_trace_is_served_whole(tiny):
    config = TraceConfig(requests=12, adapters=9, rate=500.0, prompt=(2, 5), output=(1, 4))
    found = serve_replay.replay(tiny, config)
    assert found["requests_per_second"] == pytest.approx(12 / found["seconds"])
    assert 0 < found["first_token_median"] <= found["first_token_p99"] <= found["seconds"]
    assert 1 < found["touched"] <= 9


def test_adapter_files_are_read_when_asked_for(tiny, tmp_path):
    files = serve_replay.AdapterFiles.write(tmp_path, tiny, 20)
    assert len(list(tmp_path.iterdir())) == serve_replay.FILES
    assert len(files) == 20
    first, again = files[serve_replay.name_of(1)], files[serve_replay.name_of(1 + serve_replay.FILES)]
    assert set(first) == set(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert serve_replay.name_of(20) not in files


def test_a_kept_memory_is_reused(tiny):
    found = serve_latency.first_token(tiny, memory=200, iterations=2)
    assert found["reused"] >= 180
    assert set(found["timing"]["wall"]) == {"kept", "computed"}


def test_gaps_are_measured_with_and_without_a_newcomer(tiny):
    found = serve_latency.stall(tiny, rows=2, prompt=150, tokens=12, turns=1)
    assert {name: len(gaps) for name, gaps in found["gaps"].items()} == {"chunked": 1, "whole": 1, "alone": 1}
    assert set(found["newcomer"]) == {"chunked", "whole"}


def test_what_is_stored_is_put_together_without_measuring(tmp_path, monkeypatch, capsys):
    def fails(*_, **__):
        raise AssertionError("nothing is to be measured")

    monkeypatch.setattr(serve, "load", fails)
    config, data = replayed(5, 10.0, requests=300, law="uniform", seed=0)
    key = f"trace-{config.law}-{config.adapters}-cv1-{config.requests}-seed0-float32-threads1"
    (tmp_path / f"{key}.json").write_text(json.dumps({"commit": "c", "cell": data}))
    target = tmp_path / "result.json"
    assert serve.main(["--stored", "--resume", str(tmp_path), "--json", str(target)]) == 0
    result = harness.read(target)
    assert [row["adapters"] for row in result.tables["trace replay"]] == [5]
    assert any("were not measured" in note for note in result.notes)
