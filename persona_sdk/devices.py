"""Which device and precision a name means on this machine."""

import torch

from persona_sdk.errors import InvalidInputError


def pick_device(name: str) -> torch.device:
    """The torch device of that name; ``"auto"`` takes CUDA when there is one. Raises `InvalidInputError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # AssertionError: torch was built without CUDA
        raise InvalidInputError(
            f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}",
            hint="Use 'auto', 'cpu', or 'cuda' where there is a CUDA device.",
        ) from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of that name; ``"auto"`` is float32 on CPU, else bfloat16; raises `InvalidInputError`."""
    if name == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(
            f"{name!r} is no floating-point dtype.", hint="Use 'auto', 'float32', 'bfloat16' or 'float16'."
        )
    return dtype
