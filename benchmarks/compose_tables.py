"""From the composition benchmark's cells to its bars, tables and notes. Pure: no clock, no model."""

from collections.abc import Iterable, Sequence
from itertools import groupby
from typing import Any

import numpy as np

from benchmarks import floor
from benchmarks.compose_cell import Cell
from benchmarks.harness import Bar, Row, number
from benchmarks.timing import CLAIM, Timing, compare, kept

Measured = Sequence[tuple[Cell, dict[str, Any]]]

OVER_BASE, OVER_OURS = 1.6, 3.0
PAIRS = (("ours", "base"), ("peft", "base"), ("peft", "ours"))


def summarise(measured: Measured) -> tuple[dict[str, Bar], dict[str, list[Row]], list[str]]:
    """Bars, tables and notes of a run. Seeds of one cell are pooled."""
    bars: dict[str, Bar] = {}
    tables: dict[str, list[Row]] = {
        name: []
        for name in ("ratios", "floors", "milliseconds", "operations", "admission", "equality", "conditions")
    }
    notes: list[str] = []
    for cells in _by_point(measured):
        _add_ratios(cells, bars, tables["ratios"], notes)
        tables["floors"].append(_floor_row(cells))
        tables["milliseconds"].append(_time_row(cells))
        tables["operations"].append({**_point(cells), **cells[0][1]["ops"]})
        tables["equality"].append(_equality_row(cells))
        tables["conditions"].append(_condition_row(cells))
        if "admission" in cells[0][1]:
            tables["admission"].append(_admission_row(cells))
    tables["models"] = _model_rows(measured)
    counts: dict[str, list[int]] = {}
    for cell, data in measured:
        if cell.step.phase == "decode":
            counts.setdefault(cell.model, []).append(data["ops"]["ours"])
    if counts:
        spread = max(max(values) - min(values) for values in counts.values())
        bars["ops_constant_in_distinct_adapters"] = Bar.of(spread, "<=", 0)
    return bars, tables, notes + _general_notes(measured)


def _by_point(measured: Measured) -> Iterable[Measured]:
    """Cells that differ in nothing but the seed, grouped, in order of model, step and adapters."""

    def key(pair: tuple[Cell, dict[str, Any]]) -> tuple[Any, ...]:
        cell = pair[0]
        return (cell.model, cell.step.phase, cell.step.rows, cell.step.tokens, cell.distinct)

    return [list(cells) for _, cells in groupby(sorted(measured, key=key), key)]


def _point(cells: Measured) -> Row:
    cell = cells[0][0]
    step = f"{cell.step.phase} {cell.step.rows}x{cell.step.tokens}"
    return {"model": cell.model, "step": step, "distinct": cell.distinct}


def _timings(cells: Measured, key: str = "timing") -> list[Timing]:
    return [Timing(**data[key]) for _, data in cells]


def _add_ratios(cells: Measured, bars: dict[str, Bar], table: list[Row], notes: list[str]) -> None:
    cell, timings = cells[0][0], _timings(cells)
    iterations = sum(len(kept(timing.switches)) for timing in timings)
    for above, below in PAIRS:
        ratio = compare(timings, above, below)
        table.append(
            {
                **_point(cells),
                "pair": f"{above} / {below}",
                "ratio": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
                "of minima": ratio.of_minima,
                "iterations": iterations,
            }
        )
        where = "{model} {step} U={distinct}".format(**_point(cells))
        if ratio.suspicious:
            notes.append(
                f"{where}: {above}/{below} is {number(ratio.median)} by medians and "
                f"{number(ratio.of_minima)} by minima, more than 20 % apart. Repeat on a quieter machine."
            )
        if (cell.step.phase, cell.step.rows, cell.distinct) == ("decode", 32, 32):
            interval = (ratio.low, ratio.high)
            if (above, below) == ("ours", "base"):
                name = f"decode_u32_over_base_{cell.model}"
                bars[name] = Bar.of(ratio.median, "<=", OVER_BASE, interval=interval)
            if (above, below) == ("peft", "ours"):
                name = f"peft_over_ours_decode_u32_{cell.model}"
                bars[name] = Bar.of(ratio.median, ">=", OVER_OURS, interval=interval)


def _floor_row(cells: Measured) -> Row:
    cell, data = cells[0]
    step, shape = cell.step, floor.Shape(**data["shape"])
    timings = _timings(cells)
    base = float(np.median([timing.wall["base"][i] for timing in timings for i in kept(timing.switches)]))
    decode = step.phase == "decode"
    roofline = floor.roofline_ratio(
        shape,
        floor.Rates(**data["rates"]),
        rank=cell.rank,
        rows=step.rows,
        tokens=step.tokens,
        distinct=cell.distinct,
        base_seconds=base,
    )
    return {
        **_point(cells),
        "flops": floor.flops_ratio(shape, rank=cell.rank, rows=step.rows, tokens=step.tokens),
        "bytes": floor.bytes_ratio(shape, rank=cell.rank, copies=cell.distinct) if decode else None,
        "bytes ours reads": floor.bytes_ratio(shape, rank=cell.rank, copies=step.rows) if decode else None,
        "roofline": roofline,
        "ours / base": compare(timings, "ours", "base").median,
        "peft / roofline": compare(timings, "peft", "base").median / roofline,
    }


def _time_row(cells: Measured) -> Row:
    timings = _timings(cells)
    row = _point(cells)
    for name in timings[0].wall:
        for what in ("wall", "cpu"):
            values = [getattr(timing, what)[name][i] for timing in timings for i in kept(timing.switches)]
            row[f"{name} {what}"] = 1000 * float(np.median(values))
    return row


def _equality_row(cells: Measured) -> Row:
    found = [data["equality"] for _, data in cells]
    return {
        **_point(cells),
        "ours - peft": max(one["adapters"] for one in found),
        "without adapters": max(one["none"] for one in found),
        "adapters - base": min(one["effect"] for one in found),
    }


def _condition_row(cells: Measured) -> Row:
    timings = _timings(cells)
    return {
        **_point(cells),
        "load before": timings[0].load[0],
        "load after": timings[-1].load[1],
        "steal": max(timing.steal for timing in timings),
        "switches (median)": float(np.median([n for timing in timings for n in timing.switches])),
        "switches (max)": max(n for timing in timings for n in timing.switches),
        "dropped": sum(len(timing.switches) - len(kept(timing.switches)) for timing in timings),
    }


def _admission_row(cells: Measured) -> Row:
    timings = _timings(cells, "admission")
    ratio = compare(timings, "admission", "base")
    times = [timing.wall["admission"][i] for timing in timings for i in kept(timing.switches)]
    milliseconds = 1000 * float(np.median(times))
    rows = cells[0][0].step.rows
    return {
        **_point(cells),
        "batch ms": milliseconds,
        "row ms": milliseconds / rows,
        "base steps a batch": ratio.median,
        "low": ratio.low,
        "high": ratio.high,
        "base steps a row": ratio.median / rows,
    }


def _model_rows(measured: Measured) -> list[Row]:
    rows: dict[str, Row] = {}
    for cell, data in measured:
        shape, rates = floor.Shape(**data["shape"]), floor.Rates(**data["rates"])
        rows[cell.model] = {
            "model": cell.model,
            "weights": data["source"],
            "MB read a step": 4e-6 * (shape.blocks + shape.head),
            "MB an adapter": 4e-6 * cell.rank * shape.kappa,
            "machine GB/s": 1e-9 * rates.bytes_per_second,
            "machine GFLOP/s": 1e-9 * rates.flops_per_second,
        }
    return list(rows.values())


def _general_notes(measured: Measured) -> list[str]:
    cells = [cell for cell, _ in measured]
    fewest = min(len(kept(timing.switches)) for timing in _timings(measured))
    notes = [
        f"{cells[0].threads} torch thread(s), float32, rank {cells[0].rank} on all linears of the blocks.",
        "Ratios are medians of per-iteration ratios with 95 % bootstrap intervals; contenders take turns.",
        "peft's hooks are set once outside the clock, as its generate does; a bare forward call would pay "
        "for them each time.",
        "Floors: 'bytes' binds a step limited by memory, 'flops' one limited by arithmetic. A float32 step "
        "of 32 rows on a CPU is limited by arithmetic and its adapters by memory: there the floor is "
        "'roofline', the branch's least time at this machine's measured rates over the measured base step.",
        "'peft / roofline' is the most that peft / ours could be: peft against an engine at the floor.",
        "'bytes ours reads' exceeds 'bytes' when rows share adapters: the engine keeps factors per row.",
        "Both models are small, which is the worst case: at 8B parameters and this rank, 32 distinct "
        "adapters on all linears add 18 % to the bytes of a step.",
    ]
    if fewest < CLAIM:
        notes.insert(0, f"Smoke run: {fewest} iterations, where a claim needs {CLAIM}. Claims nothing.")
    return notes
