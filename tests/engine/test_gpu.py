"""The engine on CUDA: the same code, the same answers. Runs only where there is a device."""

import copy

import pytest
import torch

from persona_sdk.engine import Engine, EngineOptions
from persona_sdk.models import LanguageModel

from .support import merged, patch, random_factors, request, soft_prefix

pytestmark = pytest.mark.gpu
PROMPT = (5, 60, 99, 130)


def on_cuda(model: LanguageModel, dtype: torch.dtype) -> LanguageModel:
    module = copy.deepcopy(model.module).to("cuda", dtype)
    return LanguageModel.from_module(model.name, module, model.tokenizer, fingerprint=model.fingerprint)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.2)])
def test_logits_are_those_of_merged_weights_on_the_cpu(tiny, dtype, tolerance):
    engine = Engine(on_cuda(tiny, dtype))
    factors = random_factors(tiny, 1)
    [logits] = engine.logits([request(tiny, PROMPT, (patch(factors),), (factors,))])
    with torch.inference_mode():
        expected = merged(tiny, [(factors, (1.0,) * 4)]).module(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(logits.float().cpu(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kernel", ["batched", "segments", "dense", "triton"])
def test_every_kernel_gives_the_logits_of_merged_weights(tiny, kernel):
    engine = Engine(on_cuda(tiny, torch.float32), EngineOptions(kernel=kernel))
    factors, other = random_factors(tiny, 1), random_factors(tiny, 2)
    rows = [
        request(tiny, PROMPT, (patch(factors), patch(other, (0.5, -1.0, 0.0, 2.0))), (factors, other)),
        request(tiny, PROMPT[:2], (patch(other),), (other,)),
        request(tiny, PROMPT),
    ]
    reference = merged(tiny, [(factors, (1.0,) * 4), (other, (0.5, -1.0, 0.0, 2.0))])
    with torch.inference_mode():
        expected = reference.module(torch.tensor([PROMPT])).logits[0]
    torch.testing.assert_close(engine.logits(rows)[0].cpu(), expected, atol=1e-4, rtol=1e-4)


def test_rows_of_a_mixed_batch_equal_their_solo_runs(tiny):
    engine = Engine(on_cuda(tiny, torch.float32))
    factors, (soft, vectors) = random_factors(tiny, 1), soft_prefix(tiny, 2)
    rows = [
        request(tiny, PROMPT),
        request(tiny, PROMPT[:2], (patch(factors),), (factors,), do_sample=True, seed=1),
        request(tiny, PROMPT * 2, (soft,), (vectors,)),
    ]
    assert engine.generate(rows) == [engine.generate([row])[0] for row in rows]
