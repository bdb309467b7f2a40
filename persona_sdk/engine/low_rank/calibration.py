"""Times of the kernels on synthetic arenas: the measurement behind costs.py.

Arenas are larger than the caches, because a decode step never finds its factors there. Of repeated times the
least counts: what is slower was disturbed.
"""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from persona_sdk import files
from persona_sdk.engine import pages
from persona_sdk.engine.low_rank.batch import LowRankBatch
from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.costs import DEFAULT, PRECISIONS, CostModel, entry, fit, load, work
from persona_sdk.engine.low_rank.indexed import runs_on
from persona_sdk.engine.low_rank.lanes import BoundPatch, Factors, Lane, lanes_of
from persona_sdk.engine.low_rank.sites import Site, SiteModule

_SECONDS = 2.0  # no new measurement starts after this long
_REPEATS = 3
_SLOTS = 32

# (rows, tokens of each, distinct slots): decode steps of one and many adapters, and prompts.
_CASES = {
    False: ((1, 1, 1), (32, 1, 32), (32, 1, 4), (32, 1, 1), (8, 1, 8)),
    True: ((1, 128, 1), (1, 256, 1), (4, 64, 4), (8, 32, 8)),
}


@dataclass(frozen=True)
class SyntheticArena:
    """Blocks that hold no adapter."""

    layout: BlockLayout
    data: Tensor


@dataclass(frozen=True)
class SyntheticSlot:
    """A slot of such an arena."""

    arena: SyntheticArena
    index: int
    rank: int
    digest: str


def llama_sites(layers: int, d_model: int, d_kv: int, d_ff: int) -> tuple[Site, ...]:
    """The sites of a Llama-like model: q/k/v and gate/up fused."""
    widths = (
        (d_model, (d_model, d_kv, d_kv)),
        (d_model, (d_model,)),
        (d_model, (d_ff, d_ff)),
        (d_ff, (d_model,)),
    )
    sites = []
    for layer in range(layers):
        for place, (d_in, outs) in enumerate(widths):
            columns = np.cumsum((0, *outs)).tolist()
            modules = tuple(
                SiteModule(f"{layer}.{place}.{number}", d_out, columns[number])
                for number, d_out in enumerate(outs)
            )
            sites.append(Site(4 * layer + place, d_in, modules))
    return tuple(sites)


def synthetic(
    sites: Sequence[Site], rank: int, slots: int, dtype: torch.dtype, device: torch.device
) -> SyntheticArena:
    """An arena for all modules of these sites. Not zeros: the system maps those to one page."""
    layout = BlockLayout(
        rank, tuple(sites), frozenset(module.path for site in sites for module in site.modules)
    )
    return SyntheticArena(layout, pages.empty(slots, layout.size, dtype=dtype, device=device).fill_(0.01))


@cache
def _kept(device: torch.device, threads: int, folder: Path) -> CostModel:
    return load(device, folder, measured)


def cost_model(device: torch.device, *, calibrate: bool = True) -> CostModel:
    """The costs of this machine, measured at most once; the fixed `DEFAULT` without calibration."""
    if not calibrate:
        return DEFAULT
    return _kept(device, torch.get_num_threads(), files.cache_dir() / "kernels")


def branch_dtype(
    device: torch.device, base: torch.dtype, wanted: str = "auto", *, calibrate: bool = True
) -> torch.dtype:
    """The precision of factors beside a base model; `wanted` as in `EngineOptions.branch_precision`."""
    if wanted in PRECISIONS:
        return PRECISIONS[wanted]
    if device.type != "cpu":
        return base
    if wanted == "auto" and base != torch.bfloat16:
        return torch.float32
    return PRECISIONS[cost_model(device, calibrate=calibrate).branch_precision]


def measured(device: torch.device) -> CostModel:
    """Time every kernel that runs on a device and fit its costs."""
    sites = llama_sites(2 if device.type == "cpu" else 8, 768, 256, 2048)
    deadline = time.perf_counter() + _SECONDS
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    factors = Factors(synthetic(sites, 8, _SLOTS, dtype, device))
    kernels, complete = {}, True
    for kernel, prompt in itertools.product(("indexed", "segments", "batched", "dense"), _CASES):
        if kernel == "indexed" and not runs_on(factors.arena.data):
            continue
        works, seconds = [], []
        for rows, length, slots in _CASES[prompt]:
            lane = _lane(factors, rows, length, slots)
            if time.perf_counter() < deadline:
                batch = LowRankBatch([(kernel, lane)], device)
                works.append(work(kernel, lane.shape))
                seconds.append(min(times(batch, sites, rows * length, dtype, device, _REPEATS)))
        name = entry(kernel, prompt)
        enough = len(works) >= 3
        complete &= enough
        kernels[name] = (
            fit(np.array(works, dtype=float), np.array(seconds)) if enough else DEFAULT.kernels[name]
        )
    precision = _faster_precision(sites, device) if device.type == "cpu" else DEFAULT.branch_precision
    return CostModel(kernels, precision, complete)


def _lane(factors: Factors, rows: int, length: int, slots: int) -> Lane:
    rank = factors.rank
    patches = [
        [BoundPatch(SyntheticSlot(factors.arena, row * slots // rows, rank, str(row)), (1.0,) * rank)]  # type: ignore[arg-type]
        for row in range(rows)
    ]
    return lanes_of(factors, patches, [length] * rows)[0]


def _faster_precision(sites: Sequence[Site], device: torch.device) -> str:
    """The precision of the factors that are added fastest to a bfloat16 output.

    A decode step and a prompt count equally, each by the ratio of its times: the least product wins.
    """
    least = {}
    for name, dtype in PRECISIONS.items():
        factors = Factors(synthetic(sites, 8, _SLOTS, dtype, device))
        step, prompt = _lane(factors, _SLOTS, 1, _SLOTS), _lane(factors, 4, 64, 4)
        kernel = "indexed" if runs_on(factors.arena.data) else "batched"
        least[name] = 1.0
        for chosen, lane, tokens in ((kernel, step, _SLOTS), ("segments", prompt, 256)):
            batch = LowRankBatch([(chosen, lane)], device)
            least[name] *= min(times(batch, sites, tokens, torch.bfloat16, device, _REPEATS))
    return min(least, key=lambda name: least[name])


def times(
    batch: LowRankBatch,
    sites: Sequence[Site],
    tokens: int,
    dtype: torch.dtype,
    device: torch.device,
    repeats: int,
) -> Iterator[float]:
    """Seconds of passes over all sites, after one that does not count."""
    inputs = {site.d_in: torch.full((tokens, site.d_in), 0.5, dtype=dtype, device=device) for site in sites}
    outputs = {site.width: torch.zeros(tokens, site.width, dtype=dtype, device=device) for site in sites}
    with torch.inference_mode():
        for repeat in range(repeats + 1):
            started = time.perf_counter()
            for site in sites:
                batch.add(site, inputs[site.d_in], outputs[site.width])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:
                yield time.perf_counter() - started
