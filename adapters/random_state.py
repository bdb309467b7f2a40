"""The random state of a process: Python's, NumPy's and torch's, seeded, kept, and as tensors.

As tensors the state can be stored without pickle and gathered from several processes, since every part has
a fixed shape:

| name           | what                                            | shape             |
|----------------|-------------------------------------------------|-------------------|
| "python"       | words of the Mersenne twister, and its position | int64 [625]       |
| "python_gauss" | is there a kept normal number, and which        | float64 [2]       |
| "numpy"        | words of the Mersenne twister                   | int64 [624]       |
| "numpy_rest"   | its position, and the kept normal number        | float64 [3]       |
| "torch"        | torch's generator on the CPU                    | uint8 [n]         |
| "device"       | torch's generator on a CUDA device, if one is used | uint8 [n]      |
"""

import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy
import torch
from torch import Tensor

_PYTHON_VERSION = 3  # of the layout of random.getstate()


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch; call it inside `same_random_state`, which restores their state."""
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


@contextmanager
def same_random_state() -> Iterator[None]:
    """Put the random state back at the end of the block, whatever was drawn or seeded in it."""
    python, arrays = random.getstate(), numpy.random.get_state()
    devices = list(range(torch.cuda.device_count()))
    with torch.random.fork_rng(devices=devices):
        try:
            yield
        finally:
            random.setstate(python)
            numpy.random.set_state(arrays)


def random_state(device: torch.device) -> dict[str, Tensor]:
    """The random state as tensors on the CPU.

    Args:
        device: its generator is included where it is a CUDA device.
    """
    _, words, gauss = random.getstate()
    arrays: Any = numpy.random.get_state()
    state = {
        "python": torch.tensor(words, dtype=torch.int64),
        "python_gauss": torch.tensor([gauss is not None, gauss or 0.0], dtype=torch.float64),
        "numpy": torch.from_numpy(arrays[1].astype(numpy.int64)),
        "numpy_rest": torch.tensor(arrays[2:], dtype=torch.float64),
        "torch": torch.get_rng_state(),
    }
    if device.type == "cuda":
        state["device"] = torch.cuda.get_rng_state(device)
    return state


def set_random_state(state: Mapping[str, Tensor], device: torch.device) -> None:
    """Put back what `random_state` gave."""
    kept, gauss = state["python_gauss"].tolist()
    random.setstate((_PYTHON_VERSION, tuple(state["python"].tolist()), gauss if kept else None))
    position, has_gauss, cached = state["numpy_rest"].tolist()
    words = state["numpy"].numpy().astype(numpy.uint32)
    numpy.random.set_state(("MT19937", words, int(position), int(has_gauss), cached))
    torch.set_rng_state(state["torch"].clone())  # torch reads past views of larger tensors
    if device.type == "cuda" and "device" in state:
        torch.cuda.set_rng_state(state["device"].clone(), device)
