"""Sampling against transformers' own warpers, as distributions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from persona_sdk.config import GenerationOptions
from persona_sdk.engine.sampling import TokenChooser, penalize_repetition, sample, uniforms
from persona_sdk.plan import DecodingRule


def histogram(logits: torch.Tensor, draws: int, temperature: float, top_k: int, top_p: float) -> torch.Tensor:
    """Frequencies of tokens when the unit interval is swept evenly: the distribution itself."""
    sweep = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    tokens = sample(
        logits.expand(draws, -1),
        sweep,
        temperature=torch.full((draws, 1), temperature),
        top_k=torch.full((draws, 1), top_k),
        top_p=torch.full((draws, 1), top_p),
    )
    return torch.bincount(tokens, minlength=logits.shape[1]) / draws


@given(
    seed=st.integers(0, 100),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
)
def test_distribution_is_that_of_transformers(seed, temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    found = histogram(logits, 4000, temperature, top_k, top_p)
    torch.testing.assert_close(found, scores.softmax(dim=1)[0], atol=6e-4, rtol=0)


def test_repetition_penalty_is_that_of_transformers():
    logits, prompt = torch.randn(2, 30), torch.randint(0, 30, (2, 6))
    seen = torch.zeros(2, 30, dtype=torch.bool).scatter_(1, prompt, True)
    found = penalize_repetition(logits, seen, torch.tensor([[1.5], [1.5]]))
    torch.testing.assert_close(found, RepetitionPenaltyLogitsProcessor(1.5)(prompt, logits.clone()))


def test_bias_comes_before_the_penalty_as_in_transformers():
    logits, prompt = torch.randn(1, 30), torch.tensor([[3, 4]])
    bias = {(3,): 2.0, (5,): -1.0}
    scores = SequenceBiasLogitsProcessor([[list(k), v] for k, v in bias.items()])(prompt, logits.clone())
    expected = RepetitionPenaltyLogitsProcessor(1.5)(prompt, scores)
    chooser = TokenChooser(
        [GenerationOptions(repetition_penalty=1.5)],
        [[DecodingRule(bias=tuple((k[0], v) for k, v in bias.items()), origin="bias")]],
        [0],
        [[3, 4]],
        vocab=30,
        device=torch.device("cpu"),
    )
    torch.testing.assert_close(chooser.adjusted(logits), expected)


@pytest.mark.parametrize("randn", [torch.randn, lambda *shape: torch.randn(*shape).round()], ids=["", "ties"])
def test_a_row_does_not_depend_on_what_its_neighbours_ask_for(randn):
    logits, draws = randn(3, 500), torch.tensor([0.1, 0.5, 0.999], dtype=torch.float64)
    settings = {
        "temperature": torch.tensor([[1.0], [2.0], [0.5]]),
        "top_k": torch.tensor([[3], [0], [50]]),
        "top_p": torch.tensor([[1.0], [0.9], [0.5]]),
    }
    together = sample(logits, draws, **settings)
    for row in range(3):
        alone = sample(
            logits[row : row + 1], draws[row : row + 1], **{k: v[row : row + 1] for k, v in settings.items()}
        )
        assert alone.item() == together[row].item()


def test_a_longer_stream_starts_like_a_shorter_one():
    assert torch.equal(uniforms(7, 10), uniforms(7, 1000)[: len(uniforms(7, 10))])
    assert not torch.equal(uniforms(7, 10), uniforms(8, 10))


@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_extreme_draws_stay_inside(draw):
    token = sample(
        torch.tensor([[0.0, 1.0, -50.0]]),
        torch.tensor([draw], dtype=torch.float64),
        temperature=torch.ones(1, 1),
        top_k=torch.zeros(1, 1, dtype=torch.long),
        top_p=torch.full((1, 1), 0.9),
    )
    assert token.item() in (0, 1)
