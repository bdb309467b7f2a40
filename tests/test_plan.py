"""Plans are pure data: hashable, JSON round-trip, content ids, and refused when they cannot be."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.config import GenerationOptions
from persona_sdk.errors import CompositionError
from persona_sdk.plan import (
    COMBINATIONS,
    PART_TYPES,
    CompositionPlan,
    DecodingRule,
    KVPrefix,
    LowRankPatch,
    PassageRef,
    Passages,
    Scorer,
    SoftPrefix,
    composition_key,
)

MARK = "ab" * 32
digests = st.binary(min_size=32, max_size=32).map(bytes.hex)
names = st.text(min_size=1, max_size=12)
finite = st.floats(allow_nan=False, allow_infinity=False)

patches = st.lists(finite, min_size=1, max_size=6).flatmap(
    lambda gate: st.builds(
        LowRankPatch, factors=digests, rank=st.just(len(gate)), gate=st.just(tuple(gate)), origin=names
    )
)
softs = st.builds(SoftPrefix, vectors=digests, length=st.integers(1, 99), origin=names)
references = st.builds(PassageRef, cube_id=names, owner=names, score=finite, text_sha256=digests)
passages = st.builds(Passages, items=st.lists(references, max_size=3).map(tuple))
biases = st.tuples(st.integers(0, 10**6), finite | st.just(-math.inf))
rules = st.builds(DecodingRule, bias=st.lists(biases, max_size=3).map(tuple), origin=names)
options = st.builds(
    GenerationOptions,
    max_new_tokens=st.integers(1, 9),
    temperature=st.floats(0.1, 9),
    stop_strings=st.lists(names, max_size=2).map(tuple),
)
plans = st.builds(
    CompositionPlan,
    base=digests,
    parts=st.tuples(patches, softs, passages, rules),
    options=options,
)


@given(plans)
def test_json_round_trip_and_content_id(plan):
    text = plan.to_json()
    again = CompositionPlan.from_json(text)
    assert again == plan
    assert hash(again) == hash(plan)
    assert again.plan_id == plan.plan_id
    json.loads(text, parse_constant=lambda constant: pytest.fail(f"{constant} is not JSON"))


@given(plans, plans)
def test_ids_differ_when_content_differs(one, other):
    assert (one.plan_id == other.plan_id) == (one == other)


def test_equal_plans_have_equal_ids():
    one = CompositionPlan(MARK, (patch(gate=(1, 0)),))
    other = CompositionPlan(MARK, (patch(gate=(1.0, -0.0)),))
    assert one == other
    assert hash(one) == hash(other)
    assert one.plan_id == other.plan_id


def test_every_part_has_a_rule_in_the_table():
    assert set(COMBINATIONS) == set(PART_TYPES)


def patch(**changes):
    return LowRankPatch(**{"factors": MARK, "rank": 2, "gate": (1.0, 0.5), "origin": "x", **changes})


SOFT = SoftPrefix(vectors=MARK, length=2, origin="s")


def cache_for(*parts, base="base", **changes):
    given = {"cache": MARK, "length": 2, "composition": composition_key(base, parts), "origin": "k"}
    return KVPrefix(**{**given, **changes})


CACHE = cache_for()
SCORER = Scorer(module=MARK, candidates=2, origin="r")


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ((CACHE, SOFT), "cannot stand beside 'soft_prefix'"),
        ((SOFT, CACHE), "cannot stand beside 'soft_prefix'"),
        ((CACHE, CACHE), "at most 1"),
        ((SCORER, SCORER), "at most 1"),
        (tuple(patch() for _ in range(17)), "at most 16"),
    ],
)
def test_forbidden_combinations(parts, message):
    with pytest.raises(CompositionError, match=message) as caught:
        CompositionPlan("base", parts)
    assert caught.value.hint


@pytest.mark.parametrize(
    "parts", [(), (patch(), SOFT, SCORER), (patch(), cache_for(patch())), (SOFT, SOFT, patch())]
)
def test_allowed_combinations(parts):
    assert CompositionPlan("base", parts).parts == parts


@pytest.mark.parametrize(
    "parts",
    [
        (patch(), CACHE),
        (cache_for(patch()),),
        (patch(gate=(1.0, 0.25)), cache_for(patch())),
        (patch(factors="cd" * 32), cache_for(patch())),
        (patch(), patch(factors="cd" * 32), cache_for(patch(factors="cd" * 32), patch())),
        (cache_for(base="another base"),),
    ],
)
def test_a_kv_prefix_of_other_patches_is_refused(parts):
    with pytest.raises(CompositionError, match="computed under other patches") as caught:
        CompositionPlan("base", parts)
    assert caught.value.hint


def test_a_kv_prefix_stands_beside_its_own_patches_and_travels():
    rule = DecodingRule(bias=((1, 1.0),), origin="d")
    plan = CompositionPlan("base", (patch(), rule, cache_for(patch())))
    assert CompositionPlan.from_json(plan.to_json()) == plan
    other = plan.to_json().replace('"gate":[1.0,0.5]', '"gate":[1.0,0.25]')
    with pytest.raises(CompositionError, match="computed under other patches"):
        CompositionPlan.from_json(other)


@pytest.mark.parametrize(
    "build",
    [
        lambda: patch(gate=(1.0,)),
        lambda: patch(gate=(1.0, math.nan)),
        lambda: patch(rank=0, gate=()),
        lambda: patch(factors="not a digest"),
        lambda: SoftPrefix(vectors=MARK, length=0, origin="s"),
        lambda: cache_for(length=0),
        lambda: cache_for(composition="not a digest"),
        lambda: DecodingRule(bias=((-1, 0.0),), origin="d"),
        lambda: DecodingRule(bias=((1, math.inf),), origin="d"),
        lambda: DecodingRule(bias=((1, math.nan),), origin="d"),
        lambda: Scorer(module=MARK, candidates=1, origin="r"),
    ],
)
def test_parts_that_cannot_be(build):
    with pytest.raises(CompositionError):
        build()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"base":"b","parts":[{"kind":"nonsense"}],"options":{}}',
        '{"base":"b","parts":[{"kind":"soft_prefix","vectors":"zz","length":1,"origin":"s"}],"options":{}}',
        '{"base":"b","parts":[],"options":{"unknown_option":1}}',
        '{"base":5,"parts":[],"options":{}}',
        '{"base":"b","parts":[{"kind":"decoding_rule","bias":[[1e999,0]],"origin":"d"}],"options":{}}',
        f'{{"base":"b","parts":[{{"kind":"soft_prefix","vectors":"{MARK}","length":1.5,"origin":"s"}}],"options":{{}}}}',
        '{"base":"b","parts":[],"options":{"temperature":-1}}',
    ],
)
def test_text_that_is_no_plan(text):
    with pytest.raises(CompositionError):
        CompositionPlan.from_json(text)
