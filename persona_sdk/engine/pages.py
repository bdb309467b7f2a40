"""Large tensors that kernels stream through: on CPUs in huge pages, where the system grants them on request.

A decode step reads every adapter once, gigabytes apart; with pages of 4 KiB a quarter of that time went into
address translation (measured on Linux with transparent huge pages on ``madvise``, 14 ms against 18 to 22).
numpy asks for them when it allocates, torch does not.
"""

import numpy as np
import torch
from torch import Tensor


def empty(*shape: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of any numbers, never an inference tensor.

    Raises:
        MemoryError, RuntimeError: the device has no room.
    """
    with torch.inference_mode(False):
        if device.type == "cpu":
            size = torch.empty((), dtype=dtype).element_size()
            return torch.from_numpy(np.empty(shape, f"i{size}")).view(dtype)
        return torch.empty(shape, dtype=dtype, device=device)
