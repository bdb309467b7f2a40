"""Methods of the panacea benchmark on a tiny model: soups are exact, compute is equal, the prompt says λ."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.panacea_data import made_pairs, made_styles
from benchmarks.panacea_methods import (
    KINDS,
    Adapted,
    Fit,
    Mixture,
    Policy,
    Scorer,
    at_vector,
    changed,
    cost,
    served,
    soup,
    with_line,
    with_lines,
)
from benchmarks.panacea_scores import Base, Scores, evaluate
from persona_sdk.adapters import lowrank
from persona_sdk.adapters.panacea import Panacea
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.pareto import evaluate as measured
from persona_sdk.adapters.preferences import grid
from persona_sdk.tensors import low_rank_pairs

SFT = made_styles(["concise", "casual"], train=12, held_out=5)
DPO = made_pairs(agreeing=0.4, train=12, held_out=5)
PAIRS = [("Hello?", "Hi."), ("Who are you?", "I am a small model."), ("Why?", "Because.")]


def options(study=SFT, **more):
    fields = {"rank": 2, "max_steps": 4, "per_device_train_batch_size": 2, "learning_rate": 1e-2}
    return PanaceaConfig(dimensions=study.dimensions, objective=study.objective, **{**fields, **more})


def fitted(model, kind, study=SFT, **more):
    return KINDS[kind](Fit(model, study, options(study, **more), Scorer(model, batch=4), divisions=2))


@pytest.fixture(scope="module")
def adapter(tiny):
    return Panacea.random(tiny, options(), std=0.3)


def dense(bundle):
    return {module: lowrank.delta(A, B) for module, A, B in low_rank_pairs(bundle)}


def test_a_soup_is_the_weighted_sum_of_updates_and_not_of_factors(tiny):
    parts = [served(Panacea.random(tiny, options(seed=seed), std=0.3), (1.0, 0.0)) for seed in (1, 2)]
    whole, (first, second) = dense(soup(parts, (0.3, 0.7))), map(dense, parts)
    for module, delta in whole.items():
        assert torch.allclose(delta, 0.3 * first[module] + 0.7 * second[module], atol=1e-5)
    at_vertex = dense(soup(parts, (0.0, 1.0)))
    assert all(torch.allclose(at_vertex[module], second[module], atol=1e-6) for module in second)


def test_a_policy_equals_the_evaluation_of_the_sdk(tiny, adapter):
    score = Scorer(tiny, batch=3)
    fit = Fit(tiny, SFT, options(), score)
    found = evaluate(fit.adapted(adapter), grid(2, 2), SFT, Base(SFT, score, 0.1))
    expected = measured(tiny, adapter, SFT.held_out, grid(2, 2))
    for place, column in enumerate(expected.examples):
        assert np.allclose(found.values[:, :, place], column.numpy(), atol=1e-3)
    assert found.margins is None


def test_so_it_does_for_pairs(tiny):
    adapter = Panacea.random(tiny, options(DPO), std=0.3)
    score = Scorer(tiny, batch=3)
    base = Base(DPO, score, 0.1)
    found = evaluate(Fit(tiny, DPO, options(DPO), score).adapted(adapter), grid(2, 2), DPO, base)
    expected = measured(tiny, adapter, DPO.held_out, grid(2, 2))
    for place, column in enumerate(expected.examples):
        assert np.allclose(found.values[:, :, place], column.numpy(), atol=1e-4)
    assert np.allclose(base.scores.values, -np.log(2), atol=1e-6)
    assert np.allclose(found.values, np.log(1 / (1 + np.exp(-found.margins))))
    opposed = [
        place
        for place, (brief, formal) in enumerate(zip(*DPO.held_out.values(), strict=True))
        if brief["chosen"] != formal["chosen"]
    ]
    assert 0 < len(opposed) < 5
    assert np.allclose(found.margins[:, opposed, 0], -found.margins[:, opposed, 1], atol=1e-6)


def test_scores_survive_json():
    values = np.array([[[1.25, np.nan], [-2.5, 3.0]]])
    stored = Scores(np.array([[0.5, 0.5]]), values, None)
    again = Scores.from_dict(json.loads(json.dumps(stored.as_dict(), allow_nan=False)))
    assert np.array_equal(again.values, values, equal_nan=True)
    assert again.margins is None


class Tables(Policy):
    """Log-likelihoods by vertex."""

    def __init__(self, table):
        self.table = torch.tensor(table)

    def log_likelihood(self, preferences, pairs):
        return self.table[preferences.argmax(1)]


@given(weight=st.floats(0, 1))
def test_a_mixture_is_one_of_probabilities(weight):
    table = [[-1.0, -50.0, -3.0], [-40.0, -2.0, -3.0]]
    found = Mixture(Tables(table)).log_likelihood(torch.tensor([[weight, 1 - weight]]), PAIRS)
    p = np.exp(np.array(table))
    assert np.allclose(found.double().exp().numpy(), weight * p[0] + (1 - weight) * p[1], rtol=1e-5)


def test_a_mixture_at_a_vertex_is_its_part(tiny, adapter):
    policy = Fit(tiny, SFT, options(), Scorer(tiny)).adapted(adapter)
    vertices = torch.eye(2)
    assert torch.allclose(
        Mixture(policy).log_likelihood(vertices, PAIRS), policy.log_likelihood(vertices, PAIRS), atol=1e-5
    )


def test_a_bundle_that_stays_the_same_is_run_once(tiny, adapter):
    runs = []
    score = Scorer(tiny, tell=lambda: runs.append(1))
    bundle = served(adapter, (0.5, 0.5))
    found = Adapted(score, lambda _: bundle).log_likelihood(grid(2), PAIRS)
    assert len(runs) == 1
    assert (found == found[0]).all()
    changing = Adapted(score, lambda at: served(adapter, at)).log_likelihood(grid(2), PAIRS)
    assert len(runs) == 12
    assert torch.allclose(changing[5], found[5], atol=1e-5)


@given(
    m=st.integers(2, 4),
    p=st.integers(1, 2),
    vertex=st.floats(0, 1),
    sampled=st.booleans(),
    init=st.sampled_from(["normal", "orthonormal"]),
)
@settings(deadline=None)
def test_every_baseline_has_the_rank_the_multiplier_and_the_compute_of_panacea(m, p, vertex, sampled, init):
    names = tuple("abcd"[:m])
    own = PanaceaConfig(
        dimensions=names,
        preference_rank=p,
        vertex_probability=vertex,
        sampled_objective=sampled,
        init=init,
        max_steps=1200,
    )
    vertices = [tuple(each) for each in torch.eye(m).tolist()]
    centre = (1 / m,) * m
    for vectors in (vertices, [centre], [*vertices, centre]):
        spent = 0.0
        for vector in vectors:
            one = at_vector(own, vector, runs=len(vectors))
            used = one.rank + p * sum(weight > 0 for weight in vector)
            assert used == own.shape.total
            assert one.multiplier == pytest.approx(own.multiplier)
            spent += one.max_steps * cost(one, vector)
        assert spent == pytest.approx(own.max_steps * cost(own), rel=0.02)


@given(vertex=st.sampled_from([0.0, 0.3, 1.0]), concentration=st.sampled_from([0.5, 1.0]))
@settings(deadline=None, max_examples=6)
def test_lambda_in_the_prompt_is_drawn_for_its_dimension(vertex, concentration):
    own = changed(options(), vertex_probability=vertex, concentration=concentration)
    found = with_lines({name: [{"prompt": "Q?", "completion": "A."}] for name in own.dimensions}, own, 3000)
    for place, name in enumerate(own.dimensions):
        weights = []
        for row in found[name]:
            line, question = row["prompt"].split("\n")
            said = dict(part.split("=") for part in line.split())
            assert (question, row["completion"], list(said)) == ("Q?", "A.", list(own.dimensions))
            weights.append(float(said[name]))
        assert len(found[name]) == 3000
        # E[λ_i | i] of Dirichlet(a + e_i) is (a + 1) / (m a + 1)
        inner = (concentration + 1) / (2 * concentration + 1)
        assert np.mean(weights) == pytest.approx(vertex + (1 - vertex) * inner, abs=0.03), place


def test_the_line_says_every_weight():
    assert with_line("Why?", ("brief", "formal"), (0.25, 0.75)) == "brief=0.25 formal=0.75\nWhy?"


@pytest.mark.parametrize("study", [SFT, DPO], ids=["sft", "dpo"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_trains_and_is_evaluated(tiny, kind, study):
    made = fitted(tiny, kind, study)
    base = Base(study, Scorer(tiny), 0.1)
    for name, method in made.items():
        scores = evaluate(method.policy, method.preferences, study, base)
        assert scores.values.shape == (len(method.preferences), 5, 2), name
        assert np.isfinite(scores.values).all()
        assert not np.allclose(scores.values[0], base.scores.values[0], atol=1e-3)
        assert method.tokens > 0
        flat = np.ptp(scores.values, axis=0).max() < 1e-3
        assert flat == (kind in ("joint", "scale_at_0")), name
    runs = {"experts": 2, "oracle": 2, "one_per_vector": 3}.get(kind, 1)
    assert {method.runs for method in made.values()} == {runs}


def test_a_fixed_preference_is_the_only_one_trained(tiny):
    vertex = at_vector(options(), (1.0, 0.0), runs=1)
    other = {**SFT.train, "casual": [{"prompt": "No?", "completion": "Never."}] * 12}
    one, two = (Panacea.train(tiny, data, vertex, progress=False) for data in (SFT.train, other))
    reached = vertex.rank + 1  # columns of σ and of the first dimension
    scale = one.config.shape.multiplier
    for name, tensor in one.tensors.items():
        if name.endswith((".U", ".V")):
            start = Panacea.random(tiny, vertex, std=0.0).tensors[name]
            assert torch.equal(tensor[:, reached:], start[:, reached:]), (name, scale)
            assert not torch.equal(tensor[:, :reached], start[:, :reached])
    assert one.tensors.keys() == two.tensors.keys()


@pytest.mark.parametrize("fixed", [(1.0,), (0.5, 0.6), (-0.5, 1.5)])
def test_a_fixed_preference_must_be_one(fixed):
    with pytest.raises(ValueError, match="no preference vector"):
        options(fixed_preference=fixed)
