"""What one user waits for: the first token after a long memory, and a neighbour's long prompt.

first token   a 1,000-token memory in front of a short question: its keys and values kept, or computed anew
stall         the longest gap between tokens of running rows while a 1,000-token prompt joins them, computed
              in chunks, or in one piece
"""

import time
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from typing import Any

import numpy as np

from benchmarks.harness import BenchmarkError
from benchmarks.subjects import prompts
from benchmarks.timing import interleave
from persona_sdk.config import GenerationOptions
from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan

MEMORY, QUESTION = 1000, 16
CHUNK = 64
_ROOM = MEMORY + QUESTION


def first_token(model: LanguageModel, *, memory: int = MEMORY, iterations: int) -> dict[str, Any]:
    """Seconds to the first token with the memory kept and without, in turns.

    Every question is another one, so that nothing but the memory can be reused.

    Raises:
        BenchmarkError: a memory that should have been kept was computed again, or the other way round.
    """
    known = prompts(model, rows=1, width=memory, seed=0)[0].tolist()
    draw = np.random.default_rng(0)
    vocab = int(model.module.config.vocab_size)

    def ask(engine: Engine, *, keep: bool) -> int:
        question = draw.integers(vocab, size=QUESTION).tolist()
        (done,) = engine.generate([_request(model, [*known, *question], tokens=1, keep=keep)])
        if done.error is not None:
            raise BenchmarkError(f"A request failed: {done.error!r}.")
        return int(done.cached_tokens)

    # Room for the prompt in one step: the side without kept keys and values is at its best.
    with Engine(model, EngineOptions(prefill_tokens=2 * _ROOM)) as engine:
        ask(engine, keep=True)
        reused = {"kept": ask(engine, keep=True), "computed": ask(engine, keep=False)}
        if reused["computed"] or reused["kept"] < 0.9 * memory:
            raise BenchmarkError(f"Tokens taken from kept keys and values: {reused}, of {memory}.")
        calls = {"kept": lambda: ask(engine, keep=True), "computed": lambda: ask(engine, keep=False)}
        timing = interleave(calls, iterations=iterations, warmups=1)
    return {"timing": asdict(timing), "reused": reused["kept"], "memory": memory, "question": QUESTION}


def stall(
    model: LanguageModel, *, rows: int = 8, prompt: int = MEMORY, tokens: int = 40, turns: int
) -> dict[str, Any]:
    """Longest gap between tokens of running rows, of each turn: chunked, whole, and without a newcomer."""
    long = prompts(model, rows=1, width=prompt, seed=1)[0].tolist()
    short = prompts(model, rows=rows, width=QUESTION, seed=2).tolist()
    sizes = {"chunked": CHUNK, "whole": 2 * _ROOM, "alone": CHUNK}
    found: dict[str, list[float]] = {name: [] for name in sizes}
    joined: dict[str, list[float]] = {name: [] for name in sizes if name != "alone"}
    for _ in range(turns):
        for name, size in sizes.items():
            newcomer = [] if name == "alone" else long
            with Engine(model, EngineOptions(prefill_tokens=size)) as engine:
                engine.generate([_request(model, short[0], tokens=2)])
                gap, wait = _longest_gap(model, engine, short, newcomer, tokens)
            found[name].append(gap)
            if wait is not None:
                joined[name].append(wait)
    return {"gaps": found, "newcomer": joined, "chunk": CHUNK, "rows": rows, "prompt": prompt}


def _longest_gap(
    model: LanguageModel,
    engine: Engine,
    running: Sequence[Sequence[int]],
    newcomer: Sequence[int],
    tokens: int,
) -> tuple[float, float | None]:
    marks: list[list[float]] = [[] for _ in running]
    generations = [engine.submit(_request(model, row, tokens=tokens)) for row in running]
    for generation, mine in zip(generations, marks, strict=True):
        generation.listen(lambda mine=mine: mine.append(time.perf_counter()))
    while any(len(generation.tokens) < tokens // 4 for generation in generations):
        time.sleep(0.001)
    joined, wait = time.perf_counter(), None
    if newcomer:
        late = engine.submit(_request(model, newcomer, tokens=1))
        late.result()
        assert late.first_token is not None
        wait = late.first_token - late.submitted
    for generation in generations:
        if (done := generation.result()).error is not None:
            raise BenchmarkError(f"A running row failed: {done.error!r}.")
    gaps = [max(b - a for a, b in pairwise(mine) if b > joined) for mine in marks]
    return max(gaps), wait


def _request(model: LanguageModel, prompt: Sequence[int], *, tokens: int, keep: bool = False) -> Request:
    options = GenerationOptions(max_new_tokens=tokens, ignore_eos=True)
    plan = CompositionPlan(model.fingerprint, (), options)
    return Request(prompt=tuple(prompt), plan=plan, keep_prefix=keep)
