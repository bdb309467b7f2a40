"""Memory as keys and values: time to the first token against memory:prompt ratio, exactness, cost.

kept        the memory's keys and values are in the engine's memory; the prompt behind it is computed
computed    all is computed, in one step
difference  largest |Δlogit| over the prompt's positions, with stored keys and values against a full prefill
build       seconds to compute and to commit the memory as an activation cube; load: to read it back, verified

Every prompt is another one, so that nothing but the memory can be reused.
"""

import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.harness import Bar, BenchmarkError, Row
from benchmarks.memory import Part, Run
from benchmarks.subjects import prompts, smollm2
from benchmarks.timing import CLAIM, Timing, compare, interleave
from persona_sdk.config import GenerationOptions
from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.engine.prefix.keys import composition_key
from persona_sdk.memory import CubeDraft, MemoryStore
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, KVPrefix
from persona_sdk.tensors import digest, size_bytes

MEMORIES, PROMPTS = (64, 256, 1000), (16, 128, 512)
QUICK = ((64, 256), (16, 64))
EXACT = 1e-4


def first_token(model: LanguageModel, memory: int, prompt: int, *, iterations: int) -> dict[str, Any]:
    """Seconds to the first token with the memory kept and computed, in turns; as a cell.

    Raises:
        BenchmarkError: a memory that should have been kept was computed again, or the other way round.
    """
    known = prompts(model, rows=1, width=memory, seed=0)[0].tolist()
    draw, vocab = np.random.default_rng(0), int(model.module.config.vocab_size)

    def ask(engine: Engine, *, keep: bool) -> int:
        said = draw.integers(vocab, size=prompt).tolist()
        (done,) = engine.generate([_request(model, [*known, *said], keep=keep)])
        if done.error is not None:
            raise BenchmarkError(f"A request failed: {done.error!r}.")
        return int(done.cached_tokens)

    # Room for all in one step: the side without kept keys and values is at its best.
    with Engine(model, EngineOptions(prefill_tokens=2 * (memory + prompt))) as engine:
        ask(engine, keep=True)
        reused = {"kept": ask(engine, keep=True), "computed": ask(engine, keep=False)}
        if reused["computed"] or reused["kept"] < 0.9 * memory:
            raise BenchmarkError(f"Tokens taken from kept keys and values: {reused}, of {memory}.")
        calls = {"kept": lambda: ask(engine, keep=True), "computed": lambda: ask(engine, keep=False)}
        timing = interleave(calls, iterations=iterations, warmups=1)
    return {"timing": asdict(timing), "memory": memory, "prompt": prompt, "reused": reused["kept"]}


def exactness(model: LanguageModel, memory: int, prompt: int, *, repeats: int) -> dict[str, Any]:
    """Largest difference of logits behind a memory that was stored and read back, and what storing took."""
    known = prompts(model, rows=1, width=memory, seed=0)[0].tolist()
    said = prompts(model, rows=1, width=prompt, seed=1)[0].tolist()
    plain = CompositionPlan(model.fingerprint, (), GenerationOptions(max_new_tokens=1))
    seconds: dict[str, list[float]] = {"compute": [], "commit": [], "load": []}
    with (
        tempfile.TemporaryDirectory(prefix="persona-kv-") as folder,
        MemoryStore.open(Path(folder)) as store,
        Engine(model, EngineOptions(prefill_tokens=2 * (memory + prompt))) as engine,
    ):
        engine.ready()
        for number in range(repeats):
            started = time.perf_counter()
            bundle = engine.keys_values(Request(prompt=tuple(known), plan=plain, keep_prefix=False))
            computed = time.perf_counter()
            # Of another owner every time, and not the same bytes: nothing is found in place.
            payload = {**bundle, "number": bundle["keys"].new_tensor([float(number)])}
            draft = CubeDraft.of(kind="activation", payload=payload)
            (cube_id,) = store.commit(f"owner{number}", add=[draft]).added
            committed = time.perf_counter()
            blob = store.get(f"owner{number}", cube_id).blob
            assert blob is not None
            loaded = store.load_blob(f"owner{number}", blob)
            seconds["compute"].append(computed - started)
            seconds["commit"].append(committed - computed)
            seconds["load"].append(time.perf_counter() - committed)
        kept = {name: loaded[name] for name in ("keys", "values")}
        part = KVPrefix(
            cache=digest(kept), length=memory, composition=composition_key(plain), origin="memory"
        )
        plan = CompositionPlan(model.fingerprint, (part,), plain.options)
        behind = Request(prompt=tuple(said), plan=plan, tensors={part.cache: kept})
        (short,) = engine.logits([behind])
        (whole,) = engine.logits([Request(prompt=(*known, *said), plan=plain)])
    difference = float((short - whole[memory:]).abs().max())
    return {
        "memory": memory,
        "prompt": prompt,
        "difference": difference,
        "bytes": size_bytes(kept),
        **{name: float(np.median(values)) for name, values in seconds.items()},
    }


def measure(run: Run) -> Part:
    """Run or read all cells; see `benchmarks.memory`."""
    memories, lengths = QUICK if run.quick else (MEMORIES, PROMPTS)
    iterations, repeats = (5, 1) if run.quick else (CLAIM, 5)
    loaded: list[LanguageModel] = []

    def model() -> LanguageModel:
        if not loaded:
            loaded.append(smollm2()[0])
        return loaded[0]

    curve, exact = [], []
    for memory in memories:
        key = f"kv-exact-m{memory}-n{repeats}-t{run.threads}"
        run.tell(f"kv: {memory} tokens of memory, stored and read back")
        exact.append(run.cells.run(key, lambda m=memory: exactness(model(), m, 64, repeats=repeats)))
        for length in lengths:
            run.tell(f"kv: {memory} tokens of memory before {length} of prompt")
            key = f"kv-m{memory}-p{length}-n{iterations}-t{run.threads}"
            curve.append(
                run.cells.run(
                    key, lambda m=memory, p=length: first_token(model(), m, p, iterations=iterations)
                )
            )
    return summarise(curve, exact)


def summarise(curve: Sequence[dict[str, Any]], exact: Sequence[dict[str, Any]]) -> Part:
    """Bars and tables from cells."""
    rows: list[Row] = []
    ratios = {}
    part = Part()
    for cell in sorted(curve, key=lambda cell: cell["memory"] / cell["prompt"]):
        timing = Timing(**cell["timing"])
        ratio = compare([timing], "kept", "computed")
        ratios[cell["memory"], cell["prompt"]] = ratio
        if ratio.suspicious:
            part.notes.append(
                f"KV, {cell['memory']} before {cell['prompt']} tokens: median and minima disagree; repeat it."
            )
        rows.append(
            {
                "memory": cell["memory"],
                "prompt": cell["prompt"],
                "memory:prompt": cell["memory"] / cell["prompt"],
                "kept, ms": 1000 * float(np.median(timing.wall["kept"])),
                "computed, ms": 1000 * float(np.median(timing.wall["computed"])),
                "kept / computed": ratio.median,
                "low": ratio.low,
                "high": ratio.high,
            }
        )
    worst = max(ratios.values(), key=lambda ratio: ratio.median)
    middle = min(ratios, key=lambda cell: abs(np.log(cell[0] / cell[1] / 8)))
    eight = ratios[middle]
    difference = max(cell["difference"] for cell in exact)
    part.bars = {
        "kv: max |Δlogit| in exact mode": Bar.of(difference, "<=", EXACT),
        f"kv: first token, kept / computed, memory {middle[0]} and prompt {middle[1]}": Bar.of(
            eight.median, "<=", 0.3, interval=(eight.low, eight.high)
        ),
        "kv: worst kept / computed of the curve": Bar.of(
            worst.median, "<=", 1.05, interval=(worst.low, worst.high)
        ),
    }
    costs: list[Row] = []
    for cell in exact:
        saved = [
            float(np.median(c["timing"]["wall"]["computed"])) - float(np.median(c["timing"]["wall"]["kept"]))
            for c in curve
            if c["memory"] == cell["memory"]
        ]
        build = cell["compute"] + cell["commit"]
        costs.append(
            {
                "memory": cell["memory"],
                "compute, ms": 1000 * cell["compute"],
                "commit, ms": 1000 * cell["commit"],
                "load, ms": 1000 * cell["load"],
                "bytes": cell["bytes"],
                "bytes a token": cell["bytes"] / cell["memory"],
                "uses that pay": build / max(float(np.median(saved)), 1e-9),
                "max |Δlogit|": cell["difference"],
            }
        )
    part.tables = {"memory as keys and values: first token": rows, "memory as keys and values: cost": costs}
    return part


def _request(model: LanguageModel, prompt: Sequence[int], *, keep: bool) -> Request:
    options = GenerationOptions(max_new_tokens=1, ignore_eos=True)
    return Request(
        prompt=tuple(prompt), plan=CompositionPlan(model.fingerprint, (), options), keep_prefix=keep
    )
