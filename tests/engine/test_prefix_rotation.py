"""Turned keys are the keys of the new position; the choice of recomputed tokens is what it says."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from persona_sdk.engine.prefix.rotation import delta_cos_sin, key_deviation, pick_recomputed, rotate_keys
from persona_sdk.errors import InvalidInputError

LAYERS, TOKENS, HEADS, DIM = 2, 7, 3, 16
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
PLAIN = {"rope_type": "default", "rope_theta": 10000.0}


def rotary(parameters) -> LlamaRotaryEmbedding:
    config = LlamaConfig(
        hidden_size=HEADS * DIM,
        num_attention_heads=HEADS,
        head_dim=DIM,
        max_position_embeddings=8192,
        rope_parameters=dict(parameters),
    )
    return LlamaRotaryEmbedding(config)


def embedded(rope, raw, positions):
    """Keys as transformers rotates them, in our layout."""
    cos, sin = rope(raw, positions[None].expand(LAYERS, -1))
    heads_first = raw.transpose(1, 2)
    return apply_rotary_pos_emb(heads_first, heads_first, cos, sin)[1].transpose(1, 2)


@given(st.integers(0, 2000), st.integers(-2000, 4000), st.integers(0, 99), st.sampled_from([PLAIN, LLAMA3]))
def test_a_turned_key_is_the_key_of_the_new_position(start, delta, seed, parameters):
    delta = max(delta, -start)
    rope = rotary(parameters)
    raw = torch.randn(LAYERS, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    positions = torch.arange(start, start + TOKENS)
    kept, wanted = embedded(rope, raw, positions), embedded(rope, raw, positions + delta)
    cos, sin = delta_cos_sin(rope.inv_freq, torch.full((TOKENS,), delta))
    # transformers multiplies positions and frequencies in float32; that rounding is all that differs.
    torch.testing.assert_close(rotate_keys(kept, cos, sin), wanted, atol=2e-3, rtol=0)


@given(st.integers(0, 99), st.integers(-5000, 5000), st.integers(-5000, 5000))
def test_turns_add_up_and_none_changes_nothing(seed, one, two):
    keys = torch.randn(LAYERS, TOKENS, HEADS, DIM, generator=torch.Generator().manual_seed(seed))
    frequency = rotary(PLAIN).inv_freq

    def turned(keys, delta):
        return rotate_keys(keys, *delta_cos_sin(frequency, torch.full((TOKENS,), delta)))

    assert torch.equal(turned(keys, 0), keys)
    torch.testing.assert_close(turned(turned(keys, one), two), turned(keys, one + two), atol=1e-5, rtol=0)


def test_only_the_rotary_part_turns_and_the_precision_stays():
    keys = torch.randn(LAYERS, TOKENS, HEADS, DIM).bfloat16()
    cos, sin = delta_cos_sin(torch.tensor([1.0, 0.1]), torch.arange(TOKENS))
    turned = rotate_keys(keys, cos, sin)
    assert turned.dtype == torch.bfloat16
    assert torch.equal(turned[..., 4:], keys[..., 4:])
    assert not torch.equal(turned[:, 1:, :, :4], keys[:, 1:, :, :4])
    assert torch.equal(turned[:, 0], keys[:, 0])


def test_deviation_is_per_token():
    kept = torch.zeros(LAYERS, TOKENS, HEADS, DIM)
    fresh = kept.clone()
    fresh[:, 3] = 2.0
    assert key_deviation(kept, fresh).tolist() == [0, 0, 0, 2, 0, 0, 0]


lengths = st.lists(st.integers(0, 20), max_size=6)


@given(lengths, st.floats(0, 1), st.integers(0, 99))
def test_as_many_as_the_fraction_says_from_every_block_but_the_first(lengths, fraction, seed):
    deviation = torch.rand(sum(lengths), generator=torch.Generator().manual_seed(seed))
    for given_deviation in (None, deviation):
        parts = pick_recomputed(lengths, fraction, deviation=given_deviation).split(lengths)
        for index, part in enumerate(parts):
            expected = 0 if index == 0 else math.ceil(round(fraction * len(part), 6))
            assert int(part.sum()) == expected


def test_which_tokens_are_picked():
    assert pick_recomputed([2, 4, 3], 0.5).tolist() == [False] * 2 + [
        True,
        True,
        False,
        False,
        True,
        True,
        False,
    ]
    deviation = torch.tensor([9.0, 9, 0, 1, 5, 2])
    assert pick_recomputed([2, 4], 0.5, deviation=deviation).tolist() == [
        False,
        False,
        True,
        False,
        True,
        False,
    ]
    assert pick_recomputed([2, 4], 1.0).tolist() == [False, False, True, True, True, True]


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_fractions_that_cannot_be(fraction):
    with pytest.raises(InvalidInputError):
        pick_recomputed([2, 2], fraction)


def test_deviations_are_one_a_token():
    with pytest.raises(InvalidInputError):
        pick_recomputed([2, 2], 0.5, deviation=torch.zeros(3))
