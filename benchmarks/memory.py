"""The memory system: what it finds, how fast, what survives, and what becomes of text.

    recall      evidence and needle recall against published encoders        memory_recall.py
    write       statements drawn from chats; what an update leaves behind    memory_write.py
    scale       a million memories of ten thousand personas; erasing one     memory_scale.py
    crash       kill -9 amid mixed writes                                    memory_crash.py
    kv          first token against memory:prompt ratio                      memory_kv.py
    promotion   text to weights: recall of facts, general ability            memory_promotion.py

Data, below ``--data``, published on GitHub: ``locomo`` (snap-research/locomo), ``lmeb_results`` (a table of
the scores in embeddings-benchmark/results), ``realtalk`` (danny911kr/REALTALK), ``synthetic_persona_chat``
(google-research-datasets/Synthetic-Persona-Chat). Nothing is downloaded. ``PERSONA_BENCH_MEM0`` names the
interpreter of an environment with mem0ai and faiss-cpu, for the peer in ``scale``.

A part is a module with ``measure(run) -> Part``. ``--part`` runs some only; with ``--resume`` their cells are
put together by the next run.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks import harness
from benchmarks.harness import Bar, BenchmarkError, Cells, Row

NAME = "memory"
PARTS = ("recall", "write", "scale", "crash", "kv", "promotion")


@dataclass(frozen=True)
class Run:
    """What a part is given: options, stored cells, and where to say what is being done."""

    quick: bool
    seeds: int
    threads: int
    data: Path
    cells: Cells
    tell: Callable[[str], None]


@dataclass
class Part:
    """What a part found. Bars and tables of all parts are put together, so their names must differ."""

    bars: dict[str, Bar] = field(default_factory=dict)
    tables: dict[str, list[Row]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status. A missed bar is a result, not a failure."""
    parser = harness.arguments(NAME, "What the memory system finds, keeps, loses and costs.")
    parser.add_argument(
        "--data", type=Path, default=Path("../shared/data"), metavar="DIR", help="holds the data sets"
    )
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    options: Any = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)

    def tell(text: str) -> None:
        console.print(f"{NAME}: {text}", highlight=False)

    cells = Cells(options.resume)
    run = Run(options.quick, max(options.seeds, 1), options.threads, options.data, cells, tell)
    whole = Part()
    try:
        for name in options.part or PARTS:
            part = importlib.import_module(f"benchmarks.memory_{name}").measure(run)
            whole.bars |= part.bars
            whole.tables |= part.tables
            whole.notes += part.notes
    except BenchmarkError as error:
        console.print(f"[red]Refused:[/red] {error}")
        return 2
    harness.conclude(
        NAME,
        argv,
        options,
        bars=whole.bars,
        tables=whole.tables,
        notes=whole.notes,
        versions=harness.versions("faiss-cpu", "numpy"),
        cells=cells,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
