"""Which forward pass a model gets: the fused one where its claims hold, else the general one."""

import logging

import torch

from persona_sdk.engine.forward.architectures import blocks_of
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.models import LanguageModel

logger = logging.getLogger("persona_sdk.engine")

_TOKENS = 6
_TOLERANCE = {torch.float32: 1e-3}  # of the largest logit; wider in half precision


def forward_of(model: LanguageModel, *, fused: bool = True) -> Forward:
    """The fused pass, checked against the model itself on a few tokens, or the general pass."""
    general = GeneralForward(model)
    blocks = blocks_of(model.module) if fused else None
    if blocks is None:
        return general
    try:
        forward = FusedForward(blocks)
        difference = disagreement(forward, general, model)
    except BaseException:
        general.close()
        raise
    if not difference <= _TOLERANCE.get(model.dtype, 0.05):  # NaN is no agreement
        logger.warning("%s: the fused pass is off by %.2g, using the general one", model.name, difference)
        return general
    general.close()
    return forward


def disagreement(one: Forward, other: Forward, model: LanguageModel) -> float:
    """Largest difference of two passes' logits on a prompt and a decode step, over the largest logit."""
    vocab = int(model.module.config.get_text_config().vocab_size)
    tokens = [(7919 * place + 1) % vocab for place in range(_TOKENS)]
    outputs = []
    with torch.inference_mode():
        for forward in (one, other):
            pool = TokenPool(
                forward.layers, device=model.device, dtype=forward.cache_dtype, budget_bytes=2**24
            )
            table = pool.take(_TOKENS)
            assert table is not None
            prompt = RowTokens(tokens[:-1], range(_TOKENS - 1), table[:-1])
            last = RowTokens(tokens[-1:], [_TOKENS - 1], table)
            passes = [forward(pack([part], model.device), pool, None, every=True) for part in (prompt, last)]
            outputs.append(torch.cat(passes))
    return float((outputs[0] - outputs[1]).abs().max() / outputs[1].abs().max())
