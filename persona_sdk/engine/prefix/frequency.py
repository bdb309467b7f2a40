"""Whether a model's keys turn as rotary positions do, found by trying: what block reuse rests on."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.prefix.bundles import KEYS
from persona_sdk.engine.prefix.rotation import delta_cos_sin, rotate_keys
from persona_sdk.errors import DeviceMemoryError, ModelError
from persona_sdk.models import LanguageModel

_CHECKED = 8  # tokens


def rotary_frequency(model: LanguageModel, forward: Forward, pool: TokenPool) -> Float[Tensor, " half"]:
    """The model's rotary frequencies, checked: equal tokens in a row differ by nothing but their turn.

    Raises:
        ModelError: there are none, several, or ones that change with the length, or some layer's keys do
            not turn so.
    """

    def refuse(why: str) -> ModelError:
        return ModelError(
            f"{model.name}: {why}; memory blocks cannot be moved.", hint="Use kept prefixes, which stay."
        )

    rotary = [module for module in model.module.modules() if isinstance(_frequency(module), Tensor)]
    if not rotary:
        raise refuse("no rotary positions")
    frequency = _frequency(rotary[0]).detach()
    if any(not torch.equal(_frequency(other), frequency) for other in rotary[1:]):
        raise refuse("layers with different rotary positions")
    if getattr(rotary[0], "rope_type", "default") in ("dynamic", "longrope"):
        raise refuse("rotary positions that change with the length")
    if len(set(forward.layers)) != 1 or 2 * len(frequency) > forward.layers[0].key_dim:
        raise refuse("layers of different shapes")
    slots = pool.take(_CHECKED)
    if slots is None:
        raise DeviceMemoryError("There is no room for a check now.", hint="Ask again when rows are done.")
    try:
        with torch.inference_mode():
            forward(pack([RowTokens([1] * _CHECKED, range(_CHECKED), slots)], model.device), pool, None)
            keys = pool.export(slots)[KEYS].float().cpu()
    finally:
        pool.give(slots)
    cos, sin = delta_cos_sin(frequency.cpu(), torch.arange(_CHECKED))
    off = (rotate_keys(keys[:, :1].expand_as(keys), cos, sin) - keys).abs().max() / keys.abs().max()
    if not off <= (1e-3 if forward.cache_dtype == model.dtype == torch.float32 else 0.05):
        raise refuse(f"keys that turn otherwise (off by {float(off):.2g})")
    return torch.as_tensor(frequency)


def _frequency(module: nn.Module) -> Any:
    return getattr(module, "inv_freq", None)
