"""What every adapter family promises, checked for each registered one."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from persona_sdk import registry
from persona_sdk.adapters import Adapter, AdapterRequest, State, Steerable
from persona_sdk.engine import Engine, Request
from persona_sdk.errors import IncompatibleAdapterError, InvalidInputError, NotFoundError, PersonaError
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan, Contribution, LowRankPatch, PlanPart
from persona_sdk.tensors import digest
from persona_sdk.testing import tiny_language_model

from .families import FAMILIES, Family, unknown_state

REQUEST = AdapterRequest(origin="nurses/tone", weight=0.75, text="How warm is it?")
PROMPTS = [(5, 60, 99, 130), (17,), (200, 201, 202, 203, 204, 205, 206)]


@pytest.fixture(params=sorted(FAMILIES))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(params=[name for name in sorted(FAMILIES) if issubclass(registry.family(name), Steerable)])
def steerable(request: pytest.FixtureRequest) -> Family:
    return FAMILIES[request.param]


@pytest.fixture
def family(name: str) -> Family:
    return FAMILIES[name]


@pytest.fixture(scope="module")
def engine(tiny: LanguageModel) -> Iterator[Engine]:
    engine = Engine(tiny)
    yield engine
    engine.close()


def request_of(model: LanguageModel, prompt: tuple[int, ...], *contributions: Contribution) -> Request:
    parts = tuple(part for contribution in contributions for part in contribution.parts)
    tensors = {key: bundle for contribution in contributions for key, bundle in contribution.tensors.items()}
    plan = CompositionPlan(base=model.fingerprint, parts=parts)
    return Request(prompt=prompt, plan=plan, tensors=tensors)


def named_digests(contribution: Contribution) -> set[str]:
    fields = ("factors", "vectors", "cache", "module")
    return {getattr(part, field) for part in contribution.parts for field in fields if hasattr(part, field)}


def same(one: Contribution, two: Contribution) -> bool:
    return one.parts == two.parts and set(one.tensors) == set(two.tensors)


def test_every_registered_family_is_under_contract() -> None:
    assert set(registry.families()) == set(FAMILIES)


def test_the_class_keeps_the_form(name: str, family: Family, tiny: LanguageModel) -> None:
    kind = registry.family(name)
    adapter = family.random(tiny, 0)
    assert type(adapter) is kind
    assert kind.family == name
    assert isinstance(adapter.config, kind.config_type)
    assert getattr(kind, "__final__", False)  # one family, one class


def test_zero_leaves_the_base_as_it_is(family: Family, tiny: LanguageModel, engine: Engine) -> None:
    contribution = family.zero(tiny).contribute(family.zero_state, REQUEST)
    requests = [request_of(tiny, prompt, contribution) for prompt in PROMPTS]
    for prompt, adapted in zip(PROMPTS, engine.logits(requests), strict=True):
        (alone,) = engine.logits([request_of(tiny, prompt)])
        torch.testing.assert_close(adapted, alone, rtol=0, atol=1e-5)
    base = engine.generate([request_of(tiny, prompt) for prompt in PROMPTS])
    assert [c.tokens for c in engine.generate(requests)] == [c.tokens for c in base]


def test_a_weight_of_zero_contributes_nothing(family: Family, tiny: LanguageModel) -> None:
    off = family.random(tiny, 0).contribute(family.state, AdapterRequest(origin="nurses/tone", weight=0.0))
    assert same(off, Contribution())


def test_a_row_in_a_mixed_batch_is_that_row_alone(
    family: Family, tiny: LanguageModel, engine: Engine
) -> None:
    one = family.random(tiny, 1).contribute(family.state, REQUEST)
    two = family.random(tiny, 2).contribute(family.state, REQUEST)
    rows = [(one,), (), (two,), (one, two)]
    requests = [request_of(tiny, PROMPTS[i % len(PROMPTS)], *row) for i, row in enumerate(rows)]
    mixed = engine.logits(requests)
    for request, together in zip(requests, mixed, strict=True):
        (alone,) = engine.logits([request])
        torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)
    tokens = [completion.tokens for completion in engine.generate(requests)]
    assert tokens == [engine.generate([request])[0].tokens for request in requests]


def test_it_changes_the_output(family: Family, tiny: LanguageModel, engine: Engine) -> None:
    """Without this, a family that contributes nothing at all would keep every other promise."""
    adapter = family.random(tiny, 1)
    adapted, plain = engine.logits(
        [
            request_of(tiny, PROMPTS[0], adapter.contribute(family.state, REQUEST)),
            request_of(tiny, PROMPTS[0]),
        ]
    )
    assert (adapted - plain).abs().max() > 1e-2


def test_contributing_is_pure_and_repeatable(family: Family, tiny: LanguageModel) -> None:
    adapter, state = family.random(tiny, 0), dict(family.state)
    content, random_state = digest(adapter.tensors), torch.get_rng_state()
    frozen = json.dumps(state)
    first, second = adapter.contribute(state, REQUEST), adapter.contribute(state, REQUEST)
    assert first.parts
    assert same(first, second)
    assert same(first, family.random(tiny, 0).contribute(state, REQUEST))
    assert json.dumps(state) == frozen
    assert digest(adapter.tensors) == content
    assert torch.equal(torch.get_rng_state(), random_state)


def test_parts_name_their_tensors_by_content(family: Family, tiny: LanguageModel) -> None:
    contribution = family.random(tiny, 0).contribute(family.state, REQUEST)
    assert named_digests(contribution) == set(contribution.tensors)
    for key, bundle in contribution.tensors.items():
        assert digest(bundle) == key


def test_parts_say_where_they_come_from_and_survive_json(family: Family, tiny: LanguageModel) -> None:
    contribution = family.random(tiny, 0).contribute(family.state, REQUEST)
    assert {part.origin for part in contribution.parts} == {REQUEST.origin}
    plan = CompositionPlan(base=tiny.fingerprint, parts=contribution.parts)
    again = CompositionPlan.from_json(plan.to_json())
    assert again == plan
    assert again.plan_id == plan.plan_id


def test_states_are_json_and_strange_ones_are_refused(family: Family, tiny: LanguageModel) -> None:
    assert json.loads(json.dumps(family.state)) == family.state
    with pytest.raises(InvalidInputError):
        family.random(tiny, 0).contribute(unknown_state(), REQUEST)


def test_saving_and_loading_changes_nothing(
    name: str, family: Family, tiny: LanguageModel, tmp_path: Path
) -> None:
    adapter = family.random(tiny, 0)
    adapter.save_pretrained(tmp_path / "a")
    for base in (tiny, None):
        again = registry.family(name).from_pretrained(tmp_path / "a", base=base)
        assert (again.digest, again.base, again.config) == (adapter.digest, adapter.base, adapter.config)
        assert same(again.contribute(family.state, REQUEST), adapter.contribute(family.state, REQUEST))
    again.save_pretrained(tmp_path / "a")  # over itself
    assert registry.family(name).from_pretrained(tmp_path / "a").digest == adapter.digest
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_it_is_rebuilt_from_what_a_store_keeps(name: str, family: Family, tiny: LanguageModel) -> None:
    adapter = family.random(tiny, 0)
    stored = json.dumps(adapter.config.model_dump(mode="json"))
    kind = registry.family(name)
    again = kind.from_tensors(adapter.base, dict(adapter.tensors), json.loads(stored))
    direct = kind(
        base=adapter.base, config=kind.config_type.parse(json.loads(stored)), tensors=adapter.tensors
    )
    for rebuilt in (again, direct):
        assert (rebuilt.digest, rebuilt.config) == (adapter.digest, adapter.config)
        assert same(rebuilt.contribute(family.state, REQUEST), adapter.contribute(family.state, REQUEST))


@pytest.mark.parametrize("other", [{"seed": 1}, {"hidden": 64}, {"architecture": "gpt2"}], ids=str)
def test_another_base_is_refused(
    other: dict[str, Any], name: str, family: Family, tiny: LanguageModel, tmp_path: Path
) -> None:
    wrong = tiny_language_model(**other)
    adapter = family.random(tiny, 0)
    adapter.save_pretrained(tmp_path / "a")
    with pytest.raises(IncompatibleAdapterError):
        registry.family(name).from_pretrained(tmp_path / "a", base=wrong)
    with pytest.raises(IncompatibleAdapterError):
        adapter.check_base(wrong.fingerprint)
    adapter.check_base(tiny.fingerprint)


def test_nothing_is_loaded_from_nowhere_or_from_damage(
    name: str, family: Family, tiny: LanguageModel, tmp_path: Path
) -> None:
    kind = registry.family(name)
    with pytest.raises(NotFoundError):
        kind.from_pretrained(tmp_path / "nowhere", base=tiny)
    family.random(tiny, 0).save_pretrained(tmp_path / "a")
    for file in sorted((tmp_path / "a").iterdir()):
        data = file.read_bytes()
        if file.suffix == ".md":
            continue
        for damage in (data[:-1], data[: len(data) // 2], b""):
            file.write_bytes(damage)
            with pytest.raises(PersonaError):
                kind.from_pretrained(tmp_path / "a", base=tiny)
        file.write_bytes(data)
    assert kind.from_pretrained(tmp_path / "a", base=tiny).digest == family.random(tiny, 0).digest


def test_it_refuses_to_save_over_somebody_elses_files(
    family: Family, tiny: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InvalidInputError):
        family.random(tiny, 0).save_pretrained(tmp_path)
    assert [path.read_text() for path in tmp_path.iterdir()] == ["mine"]


def test_adapters_are_values(family: Family, tiny: LanguageModel) -> None:
    one, other = family.random(tiny, 1), family.random(tiny, 2)
    assert one.digest == family.random(tiny, 1).digest != other.digest
    assert isinstance(one, Adapter)
    with pytest.raises(AttributeError):
        one.base = "x"  # type: ignore[misc]
    with pytest.raises(TypeError):
        one.tensors["x"] = torch.zeros(1)  # type: ignore[index]


def test_controls_are_numbers_and_steering_to_them_changes_nothing(
    steerable: Family, tiny: LanguageModel
) -> None:
    adapter: Any = steerable.random(tiny, 0)
    for state in (steerable.state, steerable.zero_state):
        controls = dict(adapter.controls(state))
        assert controls
        assert all(type(value) is float and math.isfinite(value) for value in controls.values())
        after = adapter.steered(state, controls)
        assert adapter.controls(after) == pytest.approx(controls)
        assert json.loads(json.dumps(after)) == after
        for old, new in zip(patches(adapter, state), patches(adapter, after), strict=True):
            assert new.gate == pytest.approx(old.gate)


def test_steering_is_pure_and_changes_gates_only(steerable: Family, tiny: LanguageModel) -> None:
    adapter: Any = steerable.random(tiny, 0)
    before = json.dumps(steerable.state)
    for name in adapter.controls(steerable.state):
        after = adapter.steered(steerable.state, {name: 0.5})
        assert adapter.controls(after)[name] == pytest.approx(0.5)
        assert after == adapter.steered(steerable.state, {name: 0.5})
        assert json.loads(json.dumps(after)) == after
        old, new = (adapter.contribute(state, REQUEST).parts for state in (steerable.state, after))
        assert list(map(ungated, new)) == list(map(ungated, old))
        assert new != old
    assert json.dumps(steerable.state) == before


def test_steering_refuses_strange_names_and_numbers_that_are_none(
    steerable: Family, tiny: LanguageModel
) -> None:
    adapter: Any = steerable.random(tiny, 0)
    first = next(iter(adapter.controls(steerable.state)))
    for controls in ({"no family has this control": 0.5}, {first: math.nan}, {first: math.inf}):
        with pytest.raises(InvalidInputError):
            adapter.steered(steerable.state, controls)


def patches(adapter: Adapter, state: State) -> list[LowRankPatch]:
    parts = adapter.contribute(state, REQUEST).parts
    return [part for part in parts if isinstance(part, LowRankPatch)]


def ungated(part: PlanPart) -> PlanPart:
    return replace(part, gate=(1.0,) * part.rank) if isinstance(part, LowRankPatch) else part
