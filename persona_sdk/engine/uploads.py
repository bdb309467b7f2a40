"""Numbers from the host onto a device, without waiting for the device.

A copy from ordinary memory ends when everything queued before it has; one from page-locked memory is queued
like a kernel. `upload` makes a new tensor; `Staged` is one whose address never changes, for CUDA graphs.
"""

import torch
from jaxtyping import Shaped
from torch import Tensor


def upload(values: Shaped[Tensor, "*shape"], device: torch.device) -> Shaped[Tensor, "*shape"]:
    """A host tensor on `device`."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


class Staged:
    """A flat tensor at a fixed address, and the page-locked memory it is filled from.

    Attributes:
        host: what the next `send` copies, a numpy array; write to it after `wait` only.
        tensor: on the device.
    """

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        cuda = device.type == "cuda"
        self._staged = torch.zeros(size, dtype=dtype, pin_memory=cuda)
        self._copied = torch.cuda.Event() if cuda else None  # type: ignore[no-untyped-call]
        self.host = self._staged.numpy()
        self.tensor: Shaped[Tensor, " size"] = torch.zeros(size, dtype=dtype, device=device)

    def wait(self) -> None:
        """Wait until the copy before has read `host`. It was queued a step ago, so this is no wait."""
        if self._copied is not None:
            self._copied.synchronize()

    def send(self) -> None:
        """Queue one copy of `host` into `tensor`."""
        self.tensor.copy_(self._staged, non_blocking=True)
        if self._copied is not None:
            self._copied.record()
