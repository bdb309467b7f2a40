"""Objectives and aggregations: closed forms on tiny policies, each found by gradient ascent."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from persona_sdk.adapters.aggregation import aggregate
from persona_sdk.adapters.objectives import direct_preference, leave_one_out, log_likelihood, penalised
from persona_sdk.adapters.training_data import IGNORED
from persona_sdk.errors import AdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.testing import tiny_language_model

BOTH = torch.tensor([[0.7, 0.3]])


def ascend(parameter: Tensor, objective, steps: int = 3000, lr: float = 0.05) -> None:
    optimizer = torch.optim.Adam([parameter], lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (-objective()).backward()
        optimizer.step()


class TestClosedForms:
    def test_sft_with_the_linear_aggregation_finds_the_mixture(self) -> None:
        styles = torch.tensor([[0.6, 0.3, 0.1, 0.0], [0.0, 0.1, 0.2, 0.7]])
        policy = torch.zeros(4, requires_grad=True)

        def objective() -> Tensor:
            J = (styles * policy.log_softmax(0)).sum(1)[None]
            return aggregate(J, BOTH).mean()

        ascend(policy, objective)
        torch.testing.assert_close(
            policy.detach().softmax(0), 0.7 * styles[0] + 0.3 * styles[1], atol=1e-3, rtol=0
        )

    @pytest.mark.parametrize("weight", [0.2, 0.5, 0.7, 0.9])
    def test_dpo_with_the_linear_aggregation_finds_the_logit(self, weight: float) -> None:
        gap, beta, zero = torch.zeros(1, requires_grad=True), 0.5, torch.zeros(1)

        def objective() -> Tensor:
            agree = direct_preference(gap, zero, zero, zero, beta)
            disagree = direct_preference(zero, gap, zero, zero, beta)
            J = torch.stack([agree, disagree], dim=1)
            return aggregate(J, torch.tensor([[weight, 1 - weight]])).mean()

        ascend(gap, objective)
        assert beta * float(gap.detach()) == pytest.approx(math.log(weight / (1 - weight)), abs=1e-3)

    @pytest.mark.parametrize(("weight", "margin"), [(0.7, 0.589), (0.9, 1.546)])
    def test_dpo_with_tchebycheff_balances_the_two_losses(self, weight: float, margin: float) -> None:
        gap = torch.zeros(1, requires_grad=True)

        def objective() -> Tensor:
            J = torch.stack([F.logsigmoid(gap), F.logsigmoid(-gap)], dim=1)
            return aggregate(J, torch.tensor([[weight, 1 - weight]]), "tchebycheff").mean()

        ascend(gap, objective, steps=6000, lr=0.002)
        assert float(gap.detach()) == pytest.approx(margin, abs=5e-3)

    def test_sampled_rewards_find_the_tilted_reference(self) -> None:
        """π* ∝ ref exp(Σ λ_i r_i / κ), by the estimator that training uses."""
        torch.manual_seed(0)
        reference = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
        rewards, kl = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.2, 0.9]]), 0.5
        policy = reference.clone().requires_grad_()

        def objective() -> Tensor:
            log_p = policy.log_softmax(0)
            drawn = torch.multinomial(log_p.detach().exp(), 64 * 8, replacement=True)
            found = log_p[drawn].reshape(64, 8)
            scalar = (rewards @ BOTH[0])[drawn].reshape(64, 8)
            shaped = penalised(scalar, found, reference[drawn].reshape(64, 8), kl)
            return (leave_one_out(shaped) * found).mean()

        ascend(policy, objective, steps=2000, lr=0.01)
        expected = (reference + rewards @ BOTH[0] / kl).softmax(0)
        torch.testing.assert_close(policy.detach().softmax(0), expected, atol=0.03, rtol=0)


class TestAggregation:
    VALUES = torch.tensor([[-1.0, -3.0], [-2.0, -0.5]])

    def test_a_vertex_is_its_own_objective(self) -> None:
        for how in ("linear", "tchebycheff", "smooth_tchebycheff"):
            for i in range(2):
                at = torch.eye(2)[i].expand(2, 2)
                torch.testing.assert_close(aggregate(self.VALUES, at, how), self.VALUES[:, i])

    @given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
    def test_linear_is_linear_in_the_preference(self, a: float, one: float, two: float) -> None:
        first, second = (torch.tensor([[x, 1 - x]] * 2) for x in (one, two))
        mixed = aggregate(self.VALUES, a * first + (1 - a) * second)
        expected = a * aggregate(self.VALUES, first) + (1 - a) * aggregate(self.VALUES, second)
        torch.testing.assert_close(mixed, expected, atol=1e-5, rtol=1e-5)

    @given(
        st.lists(st.floats(-20, -0.01), min_size=4, max_size=4),
        st.lists(st.floats(0.01, 1), min_size=4, max_size=4),
    )
    def test_smooth_tchebycheff_approaches_the_minimum_from_below(self, values, weights) -> None:
        J, at = torch.tensor([values]), torch.tensor([weights]) / sum(weights)
        hard = float(aggregate(J, at, "tchebycheff"))
        assert hard <= 0
        for smoothing in (1.0, 0.1, 0.01):
            soft = float(aggregate(J, at, "smooth_tchebycheff", smoothing=smoothing))
            assert hard - smoothing * math.log(4) - 1e-4 <= soft <= hard + 1e-4

    def test_the_gradient_of_tchebycheff_goes_through_the_worst_objective_only(self) -> None:
        J = self.VALUES.clone().requires_grad_()
        aggregate(J, torch.tensor([[0.5, 0.5]] * 2), "tchebycheff").sum().backward()
        assert J.grad.tolist() == [[0.0, 0.5], [0.5, 0.0]]

    def test_an_ideal_point_moves_the_objectives(self) -> None:
        ideal, half = torch.tensor([1.0, 2.0]), torch.tensor([[0.5, 0.5]] * 2)
        moved = aggregate(self.VALUES, half, "tchebycheff", ideal=ideal)
        assert moved.tolist() == [-2.5, -1.5]

    @pytest.mark.parametrize("how", ["tchebycheff", "smooth_tchebycheff"])
    def test_what_has_no_weight_does_not_count_whatever_it_is(self, how) -> None:
        J, ideal = torch.tensor([[-3.0, 0.0]]), torch.tensor([-1.0, -1.0])  # 0: the example was not run
        found = aggregate(J, torch.tensor([[1.0, 0.0]]), how, ideal=ideal)
        assert found.tolist() == pytest.approx([-2.0])

    @pytest.mark.parametrize("how", ["tchebycheff", "smooth_tchebycheff"])
    def test_an_objective_above_the_ideal_is_an_error_and_not_a_vertex_that_learns_nothing(self, how) -> None:
        with pytest.raises(AdapterError, match="above its ideal value"):
            aggregate(torch.tensor([[0.5, -1.0]]), torch.tensor([[1.0, 0.0]]), how)


def test_the_others_of_a_prompt_are_the_baseline() -> None:
    weights = leave_one_out(torch.tensor([[1.0, 2.0, 6.0], [4.0, 4.0, 4.0]]))
    assert weights.tolist() == [[-3.0, -1.5, 4.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
def test_the_likelihood_of_a_reply_is_the_sum_over_its_tokens(architecture) -> None:
    """Prompts are not counted, padding changes nothing, and rows of different lengths are each row alone."""
    base: LanguageModel = tiny_language_model(architecture=architecture)
    ids = torch.tensor([[5, 60, 99, 130, 7, 8], [17, 4, 9, 0, 0, 0]])
    mask = torch.tensor([[1] * 6, [1, 1, 1, 0, 0, 0]])
    labels = torch.tensor(
        [[IGNORED, IGNORED, IGNORED, 130, 7, 8], [IGNORED, 4, 9, IGNORED, IGNORED, IGNORED]]
    )
    with torch.no_grad():
        found = log_likelihood(base.module, ids, mask, labels)
        for row, (first, end) in enumerate([(3, 6), (1, 3)]):
            scores = base.module(input_ids=ids[row : row + 1, :end]).logits[0].log_softmax(-1)
            expected = sum(float(scores[place - 1, ids[row, place]]) for place in range(first, end))
            assert float(found[row]) == pytest.approx(expected, abs=1e-4)
