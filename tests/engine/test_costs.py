"""The cost model: what it fits, what it chooses, and what it does with files that are not its own."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine.low_rank import calibration, costs
from persona_sdk.engine.low_rank.costs import DEFAULT, Coefficients, CostModel, fit, load, machine_key, work
from persona_sdk.engine.low_rank.lanes import LaneShape

CPU = torch.device("cpu")
SHAPE = LaneShape(
    tokens=32,
    all_tokens=32,
    slots=4,
    span=4,
    longest=8,
    runs=32,
    size=10_000,
    sites=10,
    modules=18,
    itemsize=4,
)
MEASURED = CostModel({name: Coefficients(1e-6, 2e-11, 3e-11) for name in DEFAULT.kernels}, "bfloat16")


def fails(device):
    raise AssertionError("measured although the file was good")


@settings(max_examples=50, deadline=None)
@given(st.tuples(*[st.floats(0.1, 10)] * 3), st.sets(st.integers(0, 2), max_size=2), st.integers(0, 99))
def test_the_fit_finds_the_costs_behind_exact_times(costs_, zeros, seed):
    truth = np.array([0 if place in zeros else cost for place, cost in enumerate(costs_)]) * [
        1e-5,
        1e-11,
        1e-11,
    ]
    works = np.random.default_rng(seed).uniform(0.1, 1, (8, 3)) * [100, 1e8, 1e8]
    found = fit(works, works @ truth)
    np.testing.assert_allclose(
        [found.fixed, found.per_byte, found.per_madd], truth, rtol=1e-5, atol=1e-5 * truth.max()
    )


def test_the_fit_has_no_negative_costs_where_plain_least_squares_would():
    works = np.array([[1.0, 1, 1], [1, 2, 1], [1, 3, 2], [1, 4, 2]])
    seconds = np.array([3.0, 2.0, 2.5, 1.5])
    assert (np.linalg.lstsq(works / seconds[:, None], np.ones(4), rcond=None)[0] < 0).any()
    optimize = pytest.importorskip("scipy.optimize")
    expected, _ = optimize.nnls(works / seconds[:, None], np.ones(4))
    found = fit(works, seconds)
    np.testing.assert_allclose([found.fixed, found.per_byte, found.per_madd], expected, atol=1e-9)


def test_the_cheapest_kernel_that_can_run_is_chosen():
    assert DEFAULT.choose(SHAPE, {"indexed", "batched", "segments"}) == "indexed"
    assert DEFAULT.choose(SHAPE, {"batched", "segments"}) == "batched"
    prompt = LaneShape(
        tokens=512,
        all_tokens=512,
        slots=1,
        span=1,
        longest=512,
        runs=1,
        size=2_000_000,
        sites=120,
        modules=210,
        itemsize=4,
    )
    assert DEFAULT.choose(prompt, {"indexed", "batched", "segments"}) == "segments"
    # equal costs: by name; kernels without costs: never
    assert MEASURED.choose(prompt, {"segments", "indexed"}) == "indexed"
    assert MEASURED.choose(prompt, {"segments", "indexed", "unknown"}) == "indexed"


def test_work_counts_what_the_formula_reads():
    assert work("indexed", SHAPE) == (10, 4 * 40_000, 320_000)
    assert work("segments", SHAPE) == (18 * 32, 32 * 40_000, 320_000)
    assert work("batched", SHAPE) == (18, 4 * 40_000, 8 * 4 * 10_000)
    assert work("dense", SHAPE) == (18, 4 * 40_000, 32 * 4 * 10_000)


def test_slots_far_apart_are_gathered_and_that_costs():
    spread = LaneShape(
        tokens=2, all_tokens=2, slots=2, span=100, longest=1, runs=2, size=10, sites=1, modules=1, itemsize=4
    )
    assert spread.gathers
    assert spread.blocks == 2
    assert work("batched", spread)[1] == 3 * 2 * 40


def test_costs_are_measured_once_and_kept(tmp_path):
    assert load(CPU, tmp_path / "kernels", lambda device: MEASURED) == MEASURED
    assert load(CPU, tmp_path / "kernels", fails) == MEASURED
    (file,) = (tmp_path / "kernels").iterdir()
    assert json.loads(file.read_text())["machine"] == machine_key(CPU)


def kept(data):
    return json.dumps(data).encode()


GOOD = {"machine": dict(machine_key(CPU)), "costs": json.loads(MEASURED.to_json())}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{",
        kept(GOOD)[:-20],
        kept({**GOOD, "machine": {**GOOD["machine"], "device": "another"}}),
        kept({**GOOD, "costs": {**GOOD["costs"], "kernels": {}}}),
        kept({**GOOD, "costs": {**GOOD["costs"], "kernels": []}}),
        kept({**GOOD, "costs": {**GOOD["costs"], "branch_precision": "int8"}}),
        kept({**GOOD, "costs": {**GOOD["costs"], "branch_precision": []}}),
        kept(
            {
                **GOOD,
                "costs": {
                    **GOOD["costs"],
                    "kernels": {
                        k: {"fixed": -1.0, "per_byte": 0.0, "per_madd": 0.0} for k in DEFAULT.kernels
                    },
                },
            }
        ),
        kept(
            {
                **GOOD,
                "costs": {
                    **GOOD["costs"],
                    "kernels": {k: {"fixed": "1", "per_byte": 0.0, "per_madd": 0.0} for k in DEFAULT.kernels},
                },
            }
        ),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_anew(tmp_path, content):
    load(CPU, tmp_path, lambda device: MEASURED)
    (file,) = tmp_path.iterdir()
    file.write_bytes(content)
    other = CostModel(MEASURED.kernels, "float32")
    assert load(CPU, tmp_path, lambda device: other) == other
    assert load(CPU, tmp_path, fails) == other


def test_what_a_busy_machine_could_not_measure_is_not_kept(tmp_path):
    partial = CostModel(DEFAULT.kernels, complete=False)
    assert load(CPU, tmp_path, lambda device: partial) is partial
    assert list(tmp_path.iterdir()) == []
    assert load(CPU, tmp_path, lambda device: MEASURED) == MEASURED


def test_a_measurement_that_runs_out_of_time_says_so(monkeypatch):
    monkeypatch.setattr(calibration, "_SECONDS", 0.0)
    model = calibration.measured(CPU)
    assert not model.complete
    assert model.kernels["indexed"] == DEFAULT.kernels["indexed"]


def test_without_a_place_to_write_it_works_uncached(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("a file where the folder should be")
    assert load(CPU, blocked / "kernels", lambda device: MEASURED) == MEASURED


@pytest.mark.parametrize("threads", ["1", "2"])
def test_another_thread_count_is_another_machine(tmp_path, monkeypatch, threads):
    load(CPU, tmp_path, lambda device: MEASURED)
    monkeypatch.setattr(costs.torch, "get_num_threads", lambda: 97 + int(threads))
    other = CostModel(MEASURED.kernels, "float32")
    assert load(CPU, tmp_path, lambda device: other) == other
    assert len(list(tmp_path.iterdir())) == 2


def test_without_calibration_nothing_is_measured_or_written(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
    monkeypatch.setattr(calibration, "measured", fails)
    assert calibration.cost_model(CPU, calibrate=False) is DEFAULT
    assert calibration.branch_dtype(CPU, torch.bfloat16, calibrate=False) == torch.float32
    assert list(tmp_path.iterdir()) == []


def test_this_machine_can_be_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path))
    model = calibration.cost_model(CPU)
    assert set(model.kernels) <= set(DEFAULT.kernels)
    assert all(model.seconds(kernel, SHAPE) > 0 for kernel in model.kernels)
    assert calibration.cost_model(CPU) is model
    assert CostModel.from_json(model.to_json()) == replace(model, complete=True)
    assert calibration.branch_dtype(CPU, torch.float32) == torch.float32
    assert calibration.branch_dtype(CPU, torch.bfloat16) in (torch.float32, torch.bfloat16)
    assert calibration.branch_dtype(CPU, torch.float32, "bfloat16") == torch.bfloat16
    fastest = {calibration.branch_dtype(CPU, base, "fastest") for base in (torch.float32, torch.bfloat16)}
    assert fastest == {calibration.branch_dtype(CPU, torch.bfloat16)}
