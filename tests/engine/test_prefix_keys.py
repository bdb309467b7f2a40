"""Equal keys mean equal compositions; a chain's hash means all tokens up to it."""

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.engine.prefix.keys import BLOCK, chain, composition_key, lead_length, root
from persona_sdk.plan import (
    CompositionPlan,
    DecodingRule,
    KVPrefix,
    LowRankPatch,
    PassageRef,
    Passages,
    SoftPrefix,
)
from persona_sdk.plan import composition_key as key_of_parts

ONE, TWO, THREE = "ab" * 32, "cd" * 32, "ef" * 32


def patch(factors=ONE, gate=(1.0, 0.5), origin="x"):
    return LowRankPatch(factors=factors, rank=len(gate), gate=gate, origin=origin)


def soft(vectors=TWO, length=2, origin="s"):
    return SoftPrefix(vectors=vectors, length=length, origin=origin)


def key(*parts, base="base"):
    return composition_key(CompositionPlan(base, parts))


def test_every_part_that_reaches_the_keys_and_values_changes_the_key():
    kept = KVPrefix(cache=THREE, length=4, composition=key_of_parts("base", [patch()]), origin="k")
    keys = [
        key(),
        key(base="other"),
        key(patch()),
        key(patch(THREE)),
        key(patch(gate=(1.0, 0.25))),
        key(patch(gate=(1.0,))),
        key(patch(), patch()),
        key(patch(), patch(THREE)),
        key(patch(THREE), patch()),
        key(soft()),
        key(soft(THREE)),
        key(soft(length=3)),
        key(soft(), soft(THREE)),
        key(soft(THREE), soft()),
        key(patch(), soft()),
        key(patch(), kept),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(one) == 64 for one in keys)


def test_what_only_chooses_or_names_does_not():
    items = (PassageRef(cube_id="c", owner="o", score=0.5, text_sha256=ONE),)
    rule = DecodingRule(bias=((1, 1.0),), origin="d")
    plain = CompositionPlan("base", (patch(), soft()))
    other = CompositionPlan("base", (rule, patch(origin="y"), Passages(items=items), soft(origin="t")))
    other = dataclasses.replace(other, options=other.options.model_copy(update={"max_new_tokens": 3}))
    assert composition_key(plain) == composition_key(other)
    assert key(patch(gate=(1, -0.0))) == key(patch(gate=(1.0, 0.0)))
    assert lead_length(other) == 2


def test_keys_are_the_same_in_every_process():
    """Hashes are stored; a change of this value orphans every stored prefix and must be meant."""
    assert key(patch(), soft())[:16] == "90f093389617876a"
    assert chain(key(patch(), soft()), range(16))[0][:16] == "af95bcc119b1efb6"


tokens = st.lists(st.integers(0, 3), max_size=70)


@given(tokens, tokens)
def test_a_hash_means_all_tokens_up_to_its_boundary(one, two):
    for place, (a, b) in enumerate(zip(chain(ONE, one), chain(ONE, two), strict=False)):
        end = (place + 1) * BLOCK
        assert (a == b) == (one[:end] == two[:end])
    assert len(chain(ONE, one)) == len(one) // BLOCK


@given(st.lists(st.integers(0, 3), min_size=16, max_size=40), st.integers(1, 16))
def test_compositions_and_block_sizes_share_no_hash(given_tokens, block):
    mine = {root(ONE, block), *chain(ONE, given_tokens, block)}
    assert mine.isdisjoint({root(TWO, block), *chain(TWO, given_tokens, block)})
    assert mine.isdisjoint({root(ONE, block + 1), *chain(ONE, given_tokens, block + 1)})
