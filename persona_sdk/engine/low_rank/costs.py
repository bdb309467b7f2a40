"""What each kernel costs on this machine, measured once, and the choice that follows.

    seconds = fixed * calls + per_byte * bytes of factors + per_madd * multiply-adds           (one pass)

    kernel     calls              bytes                    multiply-adds
    indexed    sites              slots size               tokens size
    dense      modules            blocks size [x 3]        tokens blocks size
    batched    modules            blocks size [x 3]        blocks longest size
    segments   modules runs       runs size                tokens size

``size`` is that of a block, ``blocks`` the blocks a torch kernel reads; [x 3] where it gathers them. A decode
step and a prompt are fitted apart, as one is bound by memory and the other by arithmetic: a kernel has one
entry for each. The coefficients are the non-negative least-squares fit to times on synthetic arenas
(calibration.py), weighted so that relative errors count. They are kept in the cache folder, and measured anew
when the file is damaged or of another machine, torch, numba, thread count, device or kernel version.
"""

import itertools
import json
import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import MappingProxyType

import numpy as np
import torch
from jaxtyping import Float

from persona_sdk import machine
from persona_sdk.engine.low_rank.lanes import LaneShape

KERNEL_VERSION = 4  # of the kernels' speed: raise it when one of them changes
PRECISIONS: Mapping[str, torch.dtype] = MappingProxyType(
    {"float32": torch.float32, "bfloat16": torch.bfloat16}
)


@dataclass(frozen=True)
class Coefficients:
    """Seconds per call, per byte of factors and per multiply-add of one kernel."""

    fixed: float
    per_byte: float
    per_madd: float


def entry(kernel: str, prompt: bool) -> str:
    """Name of a kernel's coefficients for prompts or for decode steps."""
    return f"{kernel} prompt" if prompt else kernel


@dataclass(frozen=True)
class CostModel:
    """Coefficients of all kernels, and the precision in which branches of a bfloat16 model are fastest.

    `complete` is false where the machine was too busy to measure all of it.
    """

    kernels: Mapping[str, Coefficients]
    branch_precision: str = "float32"
    complete: bool = True

    def seconds(self, kernel: str, shape: LaneShape) -> float:
        """Expected time of one pass."""
        found = self.kernels[entry(kernel, shape.prompt)]
        return float(np.dot(work(kernel, shape), (found.fixed, found.per_byte, found.per_madd)))

    def choose(self, shape: LaneShape, kernels: Collection[str]) -> str:
        """The kernel that is expected to take the least time; equal ones by name."""
        known = [kernel for kernel in sorted(kernels) if entry(kernel, shape.prompt) in self.kernels]
        return min(known, key=lambda kernel: self.seconds(kernel, shape))

    def to_json(self) -> str:
        """Inverse of `from_json`."""
        kernels = {name: asdict(found) for name, found in self.kernels.items()}
        return json.dumps({"kernels": kernels, "branch_precision": self.branch_precision}, indent=1)

    @classmethod
    def from_json(cls, text: str) -> "CostModel":
        """Raises ValueError, TypeError, KeyError or AttributeError on anything that is not a cost model."""
        data = json.loads(text)
        kernels = {name: Coefficients(**found) for name, found in data["kernels"].items()}
        numbers = [number for found in kernels.values() for number in asdict(found).values()]
        if not all(isinstance(number, float) and 0 <= number < math.inf for number in numbers):
            raise ValueError("coefficients are not times")
        if (
            not {name for name in DEFAULT.kernels if not name.startswith("indexed")} <= set(kernels)
            or data["branch_precision"] not in PRECISIONS
        ):
            raise ValueError("kernels or precision are not ours")
        return cls(kernels, data["branch_precision"])


# Of one core of an AVX-512 server (2.6 GHz, 24 GB/s).
DEFAULT = CostModel(
    MappingProxyType(
        {
            "indexed": Coefficients(4e-6, 4.5e-11, 4.5e-11),
            "dense": Coefficients(2.5e-5, 5e-11, 3e-11),
            "batched": Coefficients(3e-5, 5e-11, 4e-11),
            "segments": Coefficients(1.5e-5, 5e-11, 2e-11),
            "indexed prompt": Coefficients(4e-6, 1e-11, 8e-11),
            "dense prompt": Coefficients(2.5e-5, 5e-11, 4e-11),
            "batched prompt": Coefficients(3e-5, 5e-11, 8e-11),
            "segments prompt": Coefficients(1e-5, 0.0, 4e-11),
        }
    )
)


def work(kernel: str, shape: LaneShape) -> tuple[int, int, int]:
    """(calls, bytes, multiply-adds) of one pass; see the module's docstring."""
    block = shape.size * shape.itemsize
    if kernel == "indexed":
        return shape.sites, shape.slots * block, shape.tokens * shape.size
    if kernel == "segments":
        return shape.modules * shape.runs, shape.runs * block, shape.tokens * shape.size
    passes = 3 if shape.gathers else 1
    tokens = shape.all_tokens if kernel == "dense" else shape.longest
    return shape.modules, passes * shape.blocks * block, tokens * shape.blocks * shape.size


def fit(works: Float[np.ndarray, "times 3"], seconds: Float[np.ndarray, " times"]) -> Coefficients:
    """The non-negative coefficients with the least squared relative errors.

    With three unknowns every choice of which are zero can be tried: the best one that has no negative
    coefficient is the exact solution.
    """
    rows, best, least = works / seconds[:, None], np.zeros(3), math.inf
    for count in (1, 2, 3):
        for kept in itertools.combinations(range(3), count):
            part = rows[:, kept]
            scale = np.maximum(np.abs(part).max(axis=0), 1e-300)
            found = np.linalg.lstsq(part / scale, np.ones(len(rows)), rcond=None)[0] / scale
            error = float(((part @ found - 1) ** 2).sum())
            if (found >= 0).all() and error < least:
                best, least = np.zeros(3), error
                best[list(kept)] = found
    return Coefficients(*map(float, best))


def machine_key(device: torch.device) -> Mapping[str, str]:
    """What a measurement holds for."""
    return machine.machine_key(device, kernels=KERNEL_VERSION)


def load(
    device: torch.device,
    folder: Path,
    measure: Callable[[torch.device], CostModel],
) -> CostModel:
    """The costs kept in a folder, or measured now and kept there where it can be written."""
    return machine.measured_once(
        folder,
        machine_key(device),
        read=lambda data: CostModel.from_json(json.dumps(data["costs"])),
        write=lambda model: {"costs": json.loads(model.to_json())} if model.complete else None,
        measure=lambda: measure(device),
    )
