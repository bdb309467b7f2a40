"""From what the serving benchmark measured to its bars, tables and notes. Pure: no clock, no model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks import floor
from benchmarks.harness import Bar, Row, number
from benchmarks.serve_replay import DEVICE_SLOTS, HOST_BLOCKS
from benchmarks.serve_scene import GROUPS, RANK, SOFT
from benchmarks.serve_step import NARROW, Cell
from benchmarks.timing import CLAIM, Timing, compare, kept, median_interval
from benchmarks.traces import TraceConfig

FEW, MANY = 5, 2000
OVER_BASE = (NARROW, "base", "eager", "peft", "switching", "vllm", "vllm compiled", "vllm lora")


@dataclass(frozen=True)
class Target:
    """A bar on a ratio of two contenders in one phase, taken where most personas and tokens are."""

    key: str
    phase: str
    above: str
    below: str
    op: Any
    value: float


TARGETS = (
    Target("decode_over_base", "decode", "ours", "base", "<=", 1.25),
    Target("peft_over_ours_decode", "decode", "peft", "ours", ">=", 4.0),
    Target("vllm_lora_over_ours_decode", "decode", "vllm lora", "ours", ">=", 1.5),
    Target("prefill_over_base", "prefill", "ours", "base", "<=", 1.15),
    Target("decode_over_base_bfloat16_adapters", "decode", NARROW, "base", "<=", 1.25),
    Target("peft_over_ours_decode_bfloat16_adapters", "decode", "peft", NARROW, ">=", 4.0),
    Target("prefill_over_base_bfloat16_adapters", "prefill", NARROW, "base", "<=", 1.15),
    Target("base_over_vllm_decode", "decode", "base", "vllm", "<=", 1.0),
    Target("base_over_compiled_vllm_decode", "decode", "base", "vllm compiled", "<=", 1.0),
)


@dataclass
class Findings:
    """What a run has measured so far."""

    steps: list[tuple[Cell, dict[str, Any]]] = field(default_factory=list)
    agreement: dict[str, float] = field(default_factory=dict)
    continuous: dict[str, Any] = field(default_factory=dict)
    replays: list[tuple[TraceConfig, dict[str, Any]]] = field(default_factory=list)
    narrow_replays: list[tuple[TraceConfig, dict[str, Any]]] = field(default_factory=list)
    first_token: dict[str, Any] = field(default_factory=dict)
    stall: dict[str, Any] = field(default_factory=dict)


def summarise(found: Findings) -> tuple[dict[str, Bar], dict[str, list[Row]], list[str]]:
    """Bars, tables and notes of a run; parts that were not measured are left out."""
    bars: dict[str, Bar] = {}
    notes = _general_notes(found)
    tables: dict[str, list[Row]] = {}
    for phase in ("decode", "prefill"):
        cells = [pair for pair in found.steps if pair[0].phase == phase]
        tables[phase] = [row for pair in cells for row in _step_rows(*pair, notes)]
        tables[f"{phase} milliseconds"] = [_time_row(*pair) for pair in cells]
    bars |= _step_bars(found.steps)
    tables["continuous batching"] = _continuous_rows(found.continuous)
    tables["agreement"] = [{"pair": pair, "rows equal": share} for pair, share in found.agreement.items()]
    tables["trace replay"] = [_replay_row(*pair) for pair in found.replays]
    tables["trace replay, bfloat16 adapters"] = [_replay_row(*pair) for pair in found.narrow_replays]
    bars |= _replay_bars(found.replays)
    bars |= {f"{key}_bfloat16_adapters": bar for key, bar in _replay_bars(found.narrow_replays).items()}
    if found.first_token:
        bars["first_token_computed_over_kept"], tables["first token"] = _first_token(found.first_token)
    tables["longest gap between tokens"] = _stall_rows(found.stall)
    tables["conditions"] = [_condition_row(*pair) for pair in found.steps]
    return bars, {title: rows for title, rows in tables.items() if rows}, notes


# One step -----------------------------------------------------------------------------------------------


def _point(cell: Cell) -> Row:
    return {"model": cell.model, "rows x tokens": f"{cell.rows}x{cell.width}", "personas": cell.personas}


def floor_over_base(cell: Cell, data: Mapping[str, Any], base_seconds: float) -> float:
    """Least cost of the branch over the base step on this machine.

    Bytes: every user's adapter once and every group's once. Operations: both of every token.
    """
    shape, rates = floor.Shape(**data["shape"]), floor.Rates(**data["rates"])
    tokens = 1 if cell.phase == "decode" else cell.width + SOFT

    def least(rank: int, distinct: int) -> float:
        return floor.roofline_ratio(
            shape,
            rates,
            rank=rank,
            rows=cell.rows,
            tokens=tokens,
            distinct=distinct,
            base_seconds=base_seconds,
        )

    return max(least(RANK, cell.personas + min(cell.personas, GROUPS)), least(2 * RANK, 0))


def _step_rows(cell: Cell, data: Mapping[str, Any], notes: list[str]) -> list[Row]:
    timing = Timing(**data["timing"])
    least = floor_over_base(cell, data, _median(timing, "base"))
    rows: list[Row] = []
    names = [name for name in OVER_BASE if name in timing.wall]
    pairs = [("ours", name) for name in names if name != NARROW]
    pairs += [(NARROW, name) for name in ("base", "peft") if {NARROW, name} <= set(names)]
    pairs += [("base", name) for name in names if name in ("eager", "vllm", "vllm compiled")]
    for above, below in pairs:
        ratio = compare([timing], above, below)
        rows.append(
            {
                **_point(cell),
                "pair": f"{above} / {below}",
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "of minima": ratio.of_minima,
                "floor": least if (above, below) == ("ours", "base") else None,  # of float32
                "times faster": 1 / ratio.median,
            }
        )
        if ratio.suspicious:
            notes.append(
                f"{cell.phase} {cell.rows}x{cell.width}, {cell.personas} personas: {above}/{below} is "
                f"{number(ratio.median)} by medians and {number(ratio.of_minima)} by minima. Repeat on a "
                "quieter machine."
            )
    return rows


def _time_row(cell: Cell, data: Mapping[str, Any]) -> Row:
    timing = Timing(**data["timing"])
    row = _point(cell)
    for name in timing.wall:
        row[name] = 1000 * _median(timing, name)
    return row


def _median(timing: Timing, name: str) -> float:
    return float(np.median([timing.wall[name][index] for index in kept(timing.switches)]))


def _step_bars(steps: Sequence[tuple[Cell, dict[str, Any]]]) -> dict[str, Bar]:
    bars = {}
    for target in TARGETS:
        fitting = [
            (cell, data)
            for cell, data in steps
            if cell.phase == target.phase and {target.above, target.below} <= set(data["timing"]["wall"])
        ]
        if fitting:
            _, data = max(fitting, key=lambda pair: (pair[0].personas, pair[0].rows * pair[0].width))
            ratio = compare([Timing(**data["timing"])], target.above, target.below)
            interval = (ratio.low, ratio.high)
            bars[target.key] = Bar.of(ratio.median, target.op, target.value, interval=interval)
    return bars


def _condition_row(cell: Cell, data: Mapping[str, Any]) -> Row:
    timing = Timing(**data["timing"])
    return {
        "step": cell.phase,
        **_point(cell),
        "load before": timing.load[0],
        "load after": timing.load[1],
        "steal": timing.steal,
        "switches (median)": float(np.median(timing.switches)),
        "iterations": len(kept(timing.switches)),
        "dropped": len(timing.switches) - len(kept(timing.switches)),
    }


def _continuous_rows(found: Mapping[str, Any]) -> list[Row]:
    rows: list[Row] = []
    for phase, data in found.items():
        timing = Timing(**data)
        for name in ("continuous", "loop"):
            ratio = compare([timing], name, "base")
            rows.append(
                {
                    "step": phase,
                    "contender": {"continuous": "transformers", "loop": "our base, by its public API"}[name],
                    "ms": 1000 * _median(timing, name),
                    "our base, passes alone ms": 1000 * _median(timing, "base"),
                    "ratio": ratio.median,
                    "low": ratio.low,
                    "high": ratio.high,
                }
            )
    return rows


# Traces -------------------------------------------------------------------------------------------------


def _replay_row(config: TraceConfig, data: Mapping[str, Any]) -> Row:
    return {
        "law": config.law,
        "cv": config.cv,
        "adapters": config.adapters,
        "draw": config.seed,
        "adapters used": data["touched"],
        "distinct in 32": data["distinct"],
        "offered req/s": data["offered_per_second"],
        "req/s": data["requests_per_second"],
        "tokens/s": data["tokens_per_second"],
        "first token s": data["first_token_median"],
        "99 % s": data["first_token_p99"],
    }


def _replay_bars(replays: Sequence[tuple[TraceConfig, dict[str, Any]]]) -> dict[str, Bar]:
    """How much throughput falls from `FEW` to `MANY` adapters, by law; paired by draw."""
    speed = {
        (config.law, config.seed, config.adapters): data["tokens_per_second"]
        for config, data in replays
        if config.cv == 1
    }
    bars = {}
    for law in sorted({law for law, _, _ in speed}):
        draws = sorted({seed for found, seed, _ in speed if found == law})
        falls = [
            1 - speed[law, seed, MANY] / speed[law, seed, FEW]
            for seed in draws
            if {(law, seed, FEW), (law, seed, MANY)} <= set(speed)
        ]
        if falls:
            interval = median_interval(falls) if len(falls) > 1 else None
            bars[f"throughput_fall_{law}"] = Bar.of(float(np.median(falls)), "<=", 0.1, interval=interval)
    return bars


# Waiting ------------------------------------------------------------------------------------------------


def _first_token(found: Mapping[str, Any]) -> tuple[Bar, list[Row]]:
    timing = Timing(**found["timing"])
    ratio = compare([timing], "computed", "kept")
    total = found["memory"] + found["question"]
    row: Row = {
        "memory tokens": found["memory"],
        "of them reused": found["reused"],
        "kept ms": 1000 * _median(timing, "kept"),
        "computed ms": 1000 * _median(timing, "computed"),
        "ratio": ratio.median,
        "ceiling (tokens computed)": total / (total - found["reused"]),
    }
    return Bar.of(ratio.median, ">=", 5.0, interval=(ratio.low, ratio.high)), [row]


def _stall_rows(found: Mapping[str, Any]) -> list[Row]:
    if not found:
        return []
    labels = {
        "alone": "nobody joins",
        "chunked": f"{found['prompt']} tokens in chunks of {found['chunk']}",
        "whole": f"{found['prompt']} tokens in one piece",
    }
    return [
        {
            "rows": found["rows"],
            "newcomer": label,
            "longest gap ms": 1000 * float(np.median(found["gaps"][name])),
            "worst turn ms": 1000 * max(found["gaps"][name]),
            "its first token ms": (
                1000 * float(np.median(found["newcomer"][name])) if name in found["newcomer"] else None
            ),
        }
        for name, label in labels.items()
    ]


def _general_notes(found: Findings) -> list[str]:
    notes = [
        f"A persona is a user adapter of rank {RANK}, one of {GROUPS} group adapters of rank {RANK} under "
        f"its own gate, on all linears of the blocks, and a soft prefix of {SOFT} vectors. peft and vLLM get "
        f"the exact concatenation of rank {2 * RANK}, since they take one adapter a row.",
        f"Contenders without a soft prefix get {SOFT} more prompt tokens; a step includes its inputs, the "
        "head and the greedy choice.",
        "vLLM runs in its own process and idles while others are timed; it is timed around the pipe, "
        "which adds under a millisecond.",
        "Floors: every adapter's bytes once a step, or its operations, whichever takes this machine longer, "
        "over the measured base step.",
        f"Traces: Gamma gaps, whole-number lengths, a rate above capacity, {DEVICE_SLOTS} adapters in device "
        f"slots and {HOST_BLOCKS} in host memory; adapters of rank {RANK}, read from files. Replays of one "
        "draw differ in whose adapter a request has and in nothing else.",
    ]
    if found.steps:
        cell = found.steps[0][0]
        notes.insert(0, f"{cell.threads} thread(s), {cell.dtype}.")
        fewest = min(len(kept(data["timing"]["switches"])) for _, data in found.steps)
        if fewest < CLAIM:
            notes.insert(0, f"Smoke run: {fewest} iterations, where a claim needs {CLAIM}. Claims nothing.")
    return notes
