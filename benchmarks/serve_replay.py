"""Replaying a request trace through the engine by its public API, with more adapters than fit its tiers.

Adapters are read from files when the engine asks for them. To keep 2,000 of them off the disk, adapter i
has the content of file ``i % FILES`` under a name of its own: the engine, which goes by names, loads and
keeps them all apart.
"""

import hashlib
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.contenders import random_factors
from benchmarks.harness import BenchmarkError
from benchmarks.traces import Arrival, TraceConfig, distinct, trace
from persona_sdk.config import GenerationOptions
from persona_sdk.engine import Engine, EngineOptions, Request
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, LowRankPatch
from persona_sdk.tensors import Digest, TensorBundle, freeze, size_bytes

RANK = 8
FILES = 8
ROWS = 32
_PATIENCE = 900.0  # seconds after which a request counts as lost
DEVICE_SLOTS, HOST_BLOCKS = 64, 128  # adapters that fit each tier; 2,000 do not


@dataclass(frozen=True)
class AdapterFiles(Mapping[Digest, TensorBundle]):
    """All adapters of a trace by name, read when asked for."""

    names: Mapping[Digest, int]
    files: Sequence[Path]

    @classmethod
    def write(cls, folder: Path, model: LanguageModel, count: int) -> "AdapterFiles":
        """Random adapters on every linear, in `FILES` files."""
        from safetensors.torch import save_file

        files = []
        for index in range(min(FILES, count)):
            files.append(folder / f"{index}.safetensors")
            bundle = random_factors(model.linear_shapes(), rank=RANK, seed=index)
            save_file(dict(bundle), files[-1])
        return cls({name_of(index): index for index in range(count)}, files)

    def __getitem__(self, name: Digest) -> TensorBundle:
        from safetensors.torch import load_file

        return freeze(load_file(self.files[self.names[name] % len(self.files)]))

    def __contains__(self, name: object) -> bool:
        return name in self.names

    def __iter__(self) -> Iterator[Digest]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def name_of(adapter: int) -> Digest:
    """The name under which the engine knows adapter number `adapter`."""
    return hashlib.sha256(f"adapter {adapter}".encode()).hexdigest()


def request_of(model: LanguageModel, arrival: Arrival, tensors: Mapping[Digest, TensorBundle]) -> Request:
    """One row of a trace: random tokens, one adapter, a fixed number of new tokens."""
    patch = LowRankPatch(
        factors=name_of(arrival.adapter), rank=RANK, gate=(1.0,) * RANK, origin=f"adapter {arrival.adapter}"
    )
    options = GenerationOptions(max_new_tokens=arrival.output, ignore_eos=True)
    draw = np.random.default_rng([arrival.adapter, arrival.prompt, int(1e6 * arrival.time)])
    vocab = int(model.module.config.vocab_size)
    return Request(
        prompt=tuple(draw.integers(vocab, size=arrival.prompt).tolist()),
        plan=CompositionPlan(model.fingerprint, (patch,), options),
        tensors=tensors,
        scope=(f"adapter {arrival.adapter}",),
        keep_prefix=False,
    )


def replay(model: LanguageModel, config: TraceConfig, *, branch_precision: str = "auto") -> dict[str, Any]:
    """Serve a trace with a fresh engine; throughput and latencies.

    Raises:
        BenchmarkError: a request failed.
    """
    requests = trace(config)
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        # One more than the trace has: it warms the engine up and is not asked for again.
        tensors = AdapterFiles.write(place, model, config.adapters + 1)
        block = size_bytes(tensors[name_of(0)]) // (2 if branch_precision == "bfloat16" else 1)
        options = EngineOptions(
            max_rows=ROWS,
            queue_limit=max(len(requests), 1),
            device_bytes=DEVICE_SLOTS * block,
            host_bytes=HOST_BLOCKS * block,
            disk_bytes=4 * HOST_BLOCKS * block,
            flat_folder=place / "flat",
            branch_precision=branch_precision,
        )
        with Engine(model, options) as engine:
            warm = Arrival(0.0, config.adapters, config.prompt[1], 4)
            engine.generate([request_of(model, warm, tensors)])
            found = _serve(engine, [request_of(model, one, tensors) for one in requests], requests)
    touched = len({one.adapter for one in requests})
    return {**found, "distinct": distinct(requests, ROWS), "touched": touched}


def _serve(engine: Engine, requests: Sequence[Request], arrivals: Sequence[Arrival]) -> dict[str, Any]:
    start = time.perf_counter()
    generations = []
    for request, arrival in zip(requests, arrivals, strict=True):
        time.sleep(max(start + arrival.time - time.perf_counter(), 0))
        generations.append(engine.submit(request))
    completions = [generation.result(_PATIENCE) for generation in generations]
    seconds = time.perf_counter() - start
    if failed := [one.error for one in completions if one.finish_reason != "length"]:
        raise BenchmarkError(
            f"{len(failed)} of {len(completions)} requests failed, first with {failed[0]!r}."
        )
    waits = [one.first_token - one.submitted for one in generations if one.first_token is not None]
    return {
        "seconds": seconds,
        "requests_per_second": len(completions) / seconds,
        "tokens_per_second": sum(len(one.tokens) for one in completions) / seconds,
        "offered_per_second": len(arrivals) / arrivals[-1].time,
        "first_token_median": float(np.median(waits)),
        "first_token_p99": float(np.quantile(waits, 0.99)),
    }
