"""One step of a batch of personas, by all contenders in turns: check that they agree, then time them.

| name      | what                                                          | adapters a row | soft prefix |
|-----------|---------------------------------------------------------------|----------------|-------------|
| ours      | the engine, user + group + prefix                             | 2, own gate    | 8 vectors   |
| ours bfloat16 | the same with ``branch_precision="bfloat16"``             | 2, own gate    | 8 vectors   |
| base      | the same engine on plans without parts                        | none           | 8 tokens    |
| eager     | transformers by hand                                          | none           | 8 tokens    |
| peft      | ``adapter_names``                                             | 1 of rank 16   | 8 vectors   |
| switching | peft, ``set_adapter`` and one call for every adapter          | 1 of rank 16   | 8 vectors   |
| vllm      | vLLM built without LoRA, in its own process, eager            | none           | 8 tokens    |
| vllm compiled | the same with vLLM's default, compiled graphs             | none           | 8 tokens    |
| vllm lora | vLLM built for 32 adapters of rank 16, in its own process     | 1 of rank 16   | 8 tokens    |
"""

import gc
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

import numpy as np
import torch

from benchmarks import floor
from benchmarks.contenders import NO_ADAPTER, Base, Peft
from benchmarks.harness import BenchmarkError
from benchmarks.peers.continuous import ContinuousBatching
from benchmarks.peers.eager import Eager, Switching
from benchmarks.peers.rows import Rows, agreement, reply
from benchmarks.peers.vllm_rows import Vllm, VllmRows, export, export_base
from benchmarks.serve_ours import OurRows
from benchmarks.serve_scene import RANK, Scene
from benchmarks.timing import Timing, interleave, turn
from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.models import LanguageModel

AGREE = {"float32": 0.9, "bfloat16": 0.0}  # least share of rows with equal tokens; bfloat16 rounds too much
NARROW = "ours bfloat16"
VLLM = {"vllm": 0, "vllm compiled": 0, "vllm lora": 2 * RANK}  # rank of the adapters each is built for
_CHECKED = 3  # tokens a row


@dataclass(frozen=True)
class Cell:
    """One point of the grid. `key` says everything its numbers depend on but the code.

    Args:
        width: prompt tokens after the soft prefix, or its stand-in.
        contenders: who takes part, in turn; those that are not there are left out.
    """

    model: str
    dtype: str
    phase: Literal["decode", "prefill"]
    rows: int
    width: int
    personas: int
    iterations: int
    threads: int
    contenders: tuple[str, ...]

    @property
    def key(self) -> str:
        """A file name."""
        names = "-".join(name.replace(" ", "") for name in self.contenders)
        return (
            f"{self.model}-{self.dtype}-{self.phase}-{self.rows}x{self.width}-personas{self.personas}"
            f"-n{self.iterations}-threads{self.threads}-{names}"
        )


@dataclass
class Stage:
    """A model and everything that runs on it. Use as a context manager."""

    model: LanguageModel
    source: str
    scene: Scene
    engine: Engine
    narrow: Engine  # with bfloat16 adapters
    peft: Peft
    switching: Peft  # a tree of its own on the same tensors: the hooks of a mixed batch stay on its modules
    rates: floor.Rates
    vllm: Mapping[str, Vllm] = field(default_factory=dict)
    folders: Sequence[Path] = ()
    _stack: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def build(
        cls,
        model: LanguageModel,
        source: str,
        *,
        rows: int,
        width: int,
        threads: int,
        contenders: Collection[str] = (),
        python: str | None = None,
    ) -> "Stage":
        """Load our engine and peft, and those of vLLM's engines that are contenders, by `python`."""
        scene = Scene.draw(model, rows=rows, personas=rows, width=width)
        merged = scene.concatenated()
        with ExitStack() as stack:
            # Twice the rows, so that the batch with personas and the one without stand side by side.
            engine = Engine(model, EngineOptions(max_rows=2 * rows))
            stack.callback(engine.close)
            narrow = Engine(model, EngineOptions(max_rows=rows, branch_precision="bfloat16"))
            stack.callback(narrow.close)
            engines: dict[str, Vllm] = {}
            folders: Sequence[Path] = ()
            if python is not None:
                place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
                base = export_base(model, place / "base")
                folders = export(model, base, merged, place / "adapters")
                dtype = str(model.dtype).removeprefix("torch.")
                for name, rank in VLLM.items():
                    if name not in contenders:
                        continue
                    engines[name] = Vllm(
                        python,
                        base,
                        dtype=dtype,
                        rows=rows,
                        rank=rank,
                        threads=threads,
                        log=place / f"{name}.log",
                        compile=name == "vllm compiled",
                    )
                    stack.callback(engines[name].worker.close)
            peft, switching = Peft(model, merged), Peft(model, merged)
            rates = floor.measure_rates()
            stage = cls(model, source, scene, engine, narrow, peft, switching, rates, engines, folders)
            stage._stack = stack.pop_all()
        return stage

    def __enter__(self) -> "Stage":
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, scene: Scene, *, prefix: bool = True) -> dict[str, Rows]:
        """Every contender's form of a scene. Without `prefix` all see the same tokens and no vectors."""
        rows, embeddings = len(scene.tokens), self.model.module.get_input_embeddings()
        tokens, vectors = (scene.after_prefix, scene.vectors) if prefix else (scene.tokens, None)
        plain = scene.tokens.tolist()
        batches: dict[str, Rows] = {
            "ours": OurRows(self.engine, scene.requests(prefix=prefix)),
            NARROW: OurRows(self.narrow, scene.requests(prefix=prefix)),
            "base": OurRows(self.engine, scene.base_requests()),
            "eager": Eager(Base(self.model), [NO_ADAPTER] * rows, scene.tokens),
            "peft": Eager(self.peft, scene.personas, tokens, vectors, embeddings),
            "switching": Switching(self.switching, scene.personas, tokens, vectors, embeddings),
        }
        for name, engine in self.vllm.items():
            folders = [self.folders[persona] if VLLM[name] else None for persona in scene.personas]
            batches[name] = VllmRows(engine, plain, folders)
        return batches

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Everything a cell reports, as JSON-able data.

        Raises:
            BenchmarkError: contenders do not agree; nothing was timed.
        """
        scene = self._scene(cell)
        with torch.inference_mode():
            batches = {name: rows for name, rows in self.batches(scene).items() if name in cell.contenders}
            timing = time_steps(batches, cell.phase, cell.iterations)
        vocab = int(self.model.module.config.vocab_size)
        shape = floor.Shape.of(self.model.linear_shapes(), vocab=vocab, d_model=self.model.d_model)
        return {
            "source": self.source,
            "shape": asdict(shape),
            "rates": asdict(self.rates),
            "timing": asdict(timing),
            "vllm": next((engine.version for engine in self.vllm.values()), None),
        }

    def _scene(self, cell: Cell) -> Scene:
        tokens = self.scene.tokens[:, : self.scene.tokens.shape[1] - self._width + cell.width]
        rows = Scene(**{**vars(self.scene), "tokens": tokens}).with_rows(cell.rows)
        return rows.with_personas(cell.personas)

    @property
    def _width(self) -> int:
        return int(self.scene.after_prefix.shape[1])

    def check(self, rows: int) -> dict[str, float]:
        """Share of rows whose first greedy tokens are equal, by pair of contenders.

        Raises:
            BenchmarkError: too few; nothing should be timed.
        """
        scene = self.scene.with_rows(rows)
        with torch.inference_mode():
            with_prefix = self._replies(self.batches(scene), ("ours", NARROW, "peft", "switching"))
            without = self._replies(self.batches(scene, prefix=False), ("ours", "base", "eager", *VLLM))
        pairs = {
            "ours = peft": (with_prefix["ours"], with_prefix["peft"]),
            f"{NARROW} = ours": (with_prefix[NARROW], with_prefix["ours"]),
            "switching = peft": (with_prefix["switching"], with_prefix["peft"]),
            "base = eager": (without["base"], without["eager"]),
        }
        for name in self.vllm:
            like = "ours" if VLLM[name] else "eager"
            pairs[f"{name} = {like}"] = (without[name], without[like])
        found = {pair: agreement(one, other) for pair, (one, other) in pairs.items()}
        least = AGREE[str(self.model.dtype).removeprefix("torch.")]
        if wrong := {pair: share for pair, share in found.items() if share < least}:
            raise BenchmarkError(f"Contenders give other tokens: {wrong}; at least {least} is asked for.")
        if agreement(without["ours"], without["base"]) > 0.5:
            raise BenchmarkError("The adapters change too few tokens; agreement says nothing.")
        return found

    @staticmethod
    def _replies(batches: Mapping[str, Rows], names: Sequence[str]) -> dict[str, list[tuple[int, ...]]]:
        return {name: reply(batches[name], _CHECKED) for name in names if name in batches}

    def continuous(self, *, rows: int, width: int, tokens: int, turns: int) -> dict[str, Any]:
        """Whole replies by loops: that of transformers and ours, against our passes alone, in turns."""
        scene = self._scene(Cell("", "", "decode", rows, width, 1, turns, 1, ()))
        peer = ContinuousBatching(Base(self.model)._module, scene.tokens.tolist(), tokens)
        ours = OurRows(self.engine, scene.base_requests())

        def peers_turn() -> tuple[float, float]:
            taken = peer.turn()
            return taken.prefill, float(np.median(taken.steps))

        runs: dict[str, Callable[[], tuple[float, float]]] = {
            "base": lambda: _timed_reply(ours, tokens),
            "loop": lambda: timed_loop(self.engine, scene.base_requests(), tokens),
            "continuous": peers_turn,
        }
        found: dict[str, dict[str, list[float]]] = {"prefill": {}, "decode": {}}
        for iteration in range(-1, turns):  # not in inference mode: its loop is in a thread that is not
            for name in turn(list(runs), iteration):
                first, step = runs[name]()
                if iteration >= 0:
                    found["prefill"].setdefault(name, []).append(first)
                    found["decode"].setdefault(name, []).append(step)
        return {
            phase: asdict(Timing(wall, {}, [0] * turns, (0.0, 0.0), 0.0)) for phase, wall in found.items()
        }


def time_steps(batches: Mapping[str, Rows], phase: str, iterations: int) -> Timing:
    """Time one phase of every batch in turns. A prefill starts afresh each time, a decode goes on."""
    for rows in batches.values():
        rows.start()
    try:
        if phase == "decode":
            for rows in batches.values():
                rows.prefill()
            return interleave({name: rows.decode for name, rows in batches.items()}, iterations=iterations)

        calls = {name: rows.prefill for name, rows in batches.items()}
        return interleave(calls, iterations=iterations, warmups=1, restore=lambda name: batches[name].again())
    finally:
        for rows in batches.values():
            rows.stop()
        gc.collect()


def timed_loop(engine: Engine, requests: Sequence[Request], tokens: int) -> tuple[float, float]:
    """Seconds until every row has its first token, and between its later ones, by the engine's public API."""
    marks: list[list[float]] = [[] for _ in requests]
    options = requests[0].plan.options.model_copy(update={"max_new_tokens": tokens})
    start = perf_counter()
    generations = [
        engine.submit(replace(request, plan=replace(request.plan, options=options))) for request in requests
    ]
    for generation, mine in zip(generations, marks, strict=True):
        generation.listen(lambda mine=mine: mine.append(perf_counter()))  # type: ignore[misc]
    for generation in generations:
        if (done := generation.result()).error is not None:
            raise BenchmarkError(f"A row failed: {done.error!r}.")
    first = max(generation.first_token or 0.0 for generation in generations)
    together = [mark for mark in marks[-1] if mark > first]  # the last row's, when all rows decode
    return first - start, float(np.median(np.diff(together)))


def _timed_reply(rows: Rows, tokens: int) -> tuple[float, float]:
    rows.start()
    try:
        marks = [perf_counter()]
        rows.prefill()
        marks.append(perf_counter())
        for _ in range(tokens - 1):
            rows.decode()
            marks.append(perf_counter())
    finally:
        rows.stop()
    gaps = np.diff(np.asarray(marks))
    return float(gaps[0]), float(np.median(gaps[1:]))
