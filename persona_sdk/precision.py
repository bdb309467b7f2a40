"""The faster precision of base weights on this CPU, by a measurement: float32 or bfloat16.

    speed-up = sqrt(step_float32 / step_bfloat16 * prompt_float32 / prompt_bfloat16)

    step      32 tokens through all layers: a decode step, bound by reading weights where arithmetic is fast
    prompt    256 tokens through one layer: a chunk of a prompt, bound by arithmetic

The layers are stacked linears of a small Llama, packed as the engine packs them (packed.py). Both phases
count equally, each by its ratio. bfloat16 is chosen from a speed-up of `_WORTH` on: below, exactness is worth
more. It is several times as fast with the instructions for it (AMX, AVX512-BF16), and slower where they are
emulated. Measured once per machine, torch and number of threads, in about a second, and kept.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from persona_sdk import files
from persona_sdk.machine import kept, machine_key, measured_once
from persona_sdk.packed import PackedLinear

_VERSION = 1  # of what is measured
_WORTH = 1.1
_SECONDS = 1.5  # no new repetition starts after this long
_REPEATS = 5
_LAYERS, _WIDTH, _QKV, _FF = 4, 768, 1280, 2048
_STEP, _PROMPT = 32, 256
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class PhaseSeconds:
    """Least times of the two phases in one precision."""

    step: float
    prompt: float


@dataclass(frozen=True)
class PrecisionTimes:
    """What was measured."""

    float32: PhaseSeconds
    bfloat16: PhaseSeconds

    @property
    def speed_up(self) -> float:
        """How many times as fast bfloat16 is, both phases counting equally."""
        steps = self.float32.step / self.bfloat16.step
        return math.sqrt(steps * self.float32.prompt / self.bfloat16.prompt)

    @property
    def fastest(self) -> torch.dtype:
        """The precision that is worth using."""
        return torch.bfloat16 if self.speed_up >= _WORTH else torch.float32

    def to_data(self) -> Mapping[str, Any]:
        """Inverse of `from_data`."""
        return asdict(self)

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> "PrecisionTimes":
        """Raises ValueError, TypeError, KeyError or AttributeError on anything else."""
        found = cls(PhaseSeconds(**data["float32"]), PhaseSeconds(**data["bfloat16"]))
        for seconds in (*asdict(found.float32).values(), *asdict(found.bfloat16).values()):
            if not (isinstance(seconds, float) and 0 < seconds < math.inf):
                raise ValueError("these are no times")
        return found


def fastest_on_cpu() -> torch.dtype:
    """The faster precision of base weights here; measures at most once."""
    return _times(torch.get_num_threads(), files.cache_dir() / "precision").fastest


def already_measured() -> PrecisionTimes | None:
    """What an earlier measurement found here; nothing is measured."""
    return kept(files.cache_dir() / "precision", _key(), PrecisionTimes.from_data)


@cache
def _times(threads: int, folder: Path) -> PrecisionTimes:
    return measured_once(
        folder,
        _key(),
        read=PrecisionTimes.from_data,
        write=PrecisionTimes.to_data,
        measure=measured,
    )


def _key() -> dict[str, str]:
    return machine_key(_CPU, precision=_VERSION)


def measured() -> PrecisionTimes:
    """Time both precisions in turns; of repeated times the least counts, as what is slower was disturbed."""
    deadline = time.perf_counter() + _SECONDS
    subjects = {dtype: _layers(dtype) for dtype in (torch.float32, torch.bfloat16)}
    least = {(dtype, tokens): math.inf for dtype in subjects for tokens in (_STEP, _PROMPT)}
    with torch.inference_mode():
        for repeat in range(_REPEATS + 1):  # the first does not count: kernels are made in it
            for (dtype, tokens), before in least.items():
                linears = subjects[dtype] if tokens == _STEP else subjects[dtype][:4]
                seconds = _pass(linears, tokens, dtype)
                least[dtype, tokens] = min(before, seconds) if repeat else math.inf
            if repeat and time.perf_counter() > deadline:
                break
    return PrecisionTimes(*(PhaseSeconds(least[dtype, _STEP], least[dtype, _PROMPT]) for dtype in subjects))


def _layers(dtype: torch.dtype) -> list[PackedLinear]:
    shapes = ((_WIDTH, _QKV), (_WIDTH, _WIDTH), (_WIDTH, 2 * _FF), (_FF, _WIDTH))
    return [PackedLinear.of(_linear(*shape, dtype)) for _ in range(_LAYERS) for shape in shapes]


def _linear(d_in: int, d_out: int, dtype: torch.dtype) -> nn.Linear:
    linear = nn.Linear(d_in, d_out, bias=False, dtype=dtype, device="meta").to_empty(device=_CPU)
    linear.weight.detach().fill_(0.01)  # drawing numbers would take longer than the measurement
    return linear


def _pass(linears: Sequence[PackedLinear], tokens: int, dtype: torch.dtype) -> float:
    inputs = {width: torch.full((tokens, width), 0.5, dtype=dtype) for width in (_WIDTH, _FF)}
    started = time.perf_counter()
    for place, linear in enumerate(linears):
        linear(inputs[_FF if place % 4 == 3 else _WIDTH])
    return time.perf_counter() - started
