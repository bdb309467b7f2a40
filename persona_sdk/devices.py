"""Which device and precision a name means on this machine."""

import torch

from persona_sdk.errors import InvalidInputError
from persona_sdk.precision import fastest_on_cpu

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}


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
    """The dtype of that name on a device. Raises `InvalidInputError`.

    ``"auto"`` is float32 on CPUs, where every row then equals its solo run, else bfloat16. ``"fastest"`` is
    the faster of the two on CPUs, by a measurement made once (precision.py), else bfloat16.
    """
    if name in ("auto", "fastest"):
        if device.type != "cpu":
            return torch.bfloat16
        return fastest_on_cpu() if name == "fastest" else torch.float32
    if name not in _DTYPES:
        raise InvalidInputError(
            f"{name!r} is no precision of a model.",
            hint=f"Use 'auto', 'fastest', {', '.join(map(repr, _DTYPES))}.",
        )
    return _DTYPES[name]
