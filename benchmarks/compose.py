"""Many adapters in one batch: what a step costs over the base model, and against peft's mixed batches.

A batch of 32 rows shares U = 1, 8 or 32 distinct rank-16 adapters on all linears of the blocks. One
decode step (32 tokens already cached) and one prefill are timed in isolation for the base model without
adapters, peft's ``adapter_names`` and this SDK's engine: same weights, same factors, same inputs, in one
process and in turns (`benchmarks.timing`). Tokenizer and sampling are outside the clock. Contenders that
do not agree on the logits are not timed (`benchmarks.contenders`).

Writing the rows' factors happens once per batch, not per step, and is reported on its own as admission.
"""

import gc
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from benchmarks import compose_tables, floor, harness
from benchmarks.compose_cell import Cell, Stage, Step
from benchmarks.harness import BenchmarkError, Cells
from benchmarks.subjects import SUBJECTS

NAME = "compose"
RANK = 16
DECODE = Step("decode", rows=32, tokens=1, cached=32)
SHORT, MIDDLE, LONG = (Step("prefill", rows, tokens) for rows, tokens in ((8, 8), (8, 32), (32, 32)))
DECODES = ((DECODE, 1), (DECODE, 8), (DECODE, 32))
QUICK = (*DECODES, (SHORT, 1), (SHORT, 8))
FULL = (*DECODES, (MIDDLE, 1), (MIDDLE, 8), (LONG, 32))
# Dropping disturbed iterations takes four of 35 at most, which leaves the 31 that a claim needs.
ITERATIONS = {True: 9, False: 35}


def grid(models: Sequence[str], *, quick: bool, seeds: int, threads: int) -> list[Cell]:
    """All cells of a run; those of one model and seed stand together."""
    return [
        Cell(model, step, distinct, RANK, seed, ITERATIONS[quick], threads)
        for model in models
        for seed in range(seeds)
        for step, distinct in (QUICK if quick else FULL)
    ]


def measure(
    cells: Sequence[Cell], store: Cells, report: Callable[[Cell | None], None]
) -> list[tuple[Cell, dict[str, Any]]]:
    """Measure the cells that are not stored. A model is loaded only if one of its cells needs it."""
    stage: Stage | None = None
    built_for: tuple[str, int] | None = None
    rates: floor.Rates | None = None
    measured = []
    for cell in cells:
        report(cell)

        def fresh(cell: Cell = cell) -> dict[str, Any]:
            nonlocal stage, built_for, rates
            if rates is None:
                rates = floor.measure_rates()
            if stage is None or built_for != (cell.model, cell.seed):
                stage = None  # let go of the last model before the next one is loaded
                gc.collect()
                model, source = SUBJECTS[cell.model]()
                adapters = max(c.distinct for c in cells)
                stage = Stage.build(
                    model, source, adapters=adapters, rank=cell.rank, seed=cell.seed, rates=rates
                )
                built_for = (cell.model, cell.seed)
            return stage.measure(cell)

        measured.append((cell, store.run(cell.key, fresh)))
    report(None)
    return measured


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status. A missed bar is a result, not a failure."""
    parser = harness.arguments(NAME, "Many adapters in one batch, against the base model and peft.")
    parser.add_argument("--model", choices=[*SUBJECTS, "both"], default="both")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    models = list(SUBJECTS) if options.model == "both" else [options.model]
    cells = grid(models, quick=options.quick, seeds=options.seeds, threads=options.threads)
    store = Cells(options.resume)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress:
        task = progress.add_task("starting", total=len(cells))

        def report(cell: Cell | None) -> None:
            text = "done" if cell is None else f"{cell.model} {cell.step.phase}, {cell.distinct} distinct"
            done = len(cells) if cell is None else cells.index(cell)
            progress.update(task, description=text, completed=done)

        try:
            measured = measure(cells, store, report)
        except BenchmarkError as error:
            progress.console.print(f"[red]Refused:[/red] {error}")
            return 2
    bars, tables, notes = compose_tables.summarise(measured)
    harness.conclude(
        NAME,
        argv,
        options,
        bars=bars,
        tables=tables,
        notes=notes,
        versions=harness.versions("peft", "numpy"),
        cells=store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
