"""What is compared is comparable: one set of tensors, equal logits, and no timing of a wrong contender."""

from contextlib import contextmanager

import pytest
import torch

from benchmarks.contenders import (
    TOLERANCE,
    Base,
    Ours,
    Peft,
    check_equal,
    count_ops,
    random_factors,
    shared_copy,
    step_inputs,
    two_steps,
)
from benchmarks.harness import BenchmarkError
from persona_sdk.models import fingerprint_of
from persona_sdk.tensors import low_rank_bundle, low_rank_pairs

ADAPTERS = [0, 1, 2, 0]
TOKENS = torch.randint(384, (4, 5), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def factors(tiny):
    return [random_factors(tiny.linear_shapes(), rank=4, seed=seed, scale=0.1) for seed in range(3)]


@pytest.fixture(scope="module")
def contenders(tiny, factors):
    return {"base": Base(tiny), "ours": Ours(tiny, factors), "peft": Peft(tiny, factors)}


def test_the_three_agree_and_the_adapters_matter(contenders):
    found = check_equal(contenders, ADAPTERS, TOKENS)
    assert found["adapters"] <= 1e-5
    assert found["none"] <= 1e-5
    assert found["effect"] >= 100 * TOLERANCE


def test_weights_and_factors_are_held_once(tiny, contenders, factors):
    own = {parameter.data_ptr() for parameter in tiny.module.parameters()}
    filled = {tensor.data_ptr() for bundle in factors for tensor in bundle.values()}
    assert {p.data_ptr() for p in contenders["base"]._module.parameters()} == own
    assert {p.data_ptr() for p in contenders["ours"].engine.model.module.parameters()} == own
    assert {p.data_ptr() for p in contenders["peft"]._module.parameters()} == own | filled


def test_copies_leave_the_model_as_it_was(tiny, contenders):
    assert fingerprint_of(tiny.module) == tiny.fingerprint
    assert fingerprint_of(shared_copy(tiny.module)) == tiny.fingerprint
    with torch.inference_mode(), contenders["base"].assigned(ADAPTERS) as forward:
        assert torch.equal(forward(TOKENS).logits, tiny.module(TOKENS).logits)


def test_two_steps_are_the_last_two_positions_of_one_pass(tiny):
    with torch.inference_mode():
        steps = two_steps(tiny.module, TOKENS)
        whole = tiny.module(TOKENS).logits[:, -2:].transpose(0, 1)
    torch.testing.assert_close(steps, whole, atol=1e-5, rtol=0)


def scaled(bundle, by: float):
    return low_rank_bundle({path: (A, by * B) for path, A, B in low_rank_pairs(bundle)})


def without_one_module(bundle):
    kept = list(low_rank_pairs(bundle))[1:]
    return low_rank_bundle({path: (A, B) for path, A, B in kept})


@pytest.mark.parametrize(
    "wrong",
    [
        lambda given: [given[1], given[0], given[2]],
        lambda given: [given[0], given[1], scaled(given[2], 1.01)],
        lambda given: [without_one_module(given[0]), *given[1:]],
    ],
    ids=["adapters swapped", "one adapter off by a hundredth", "one module forgotten"],
)
def test_a_contender_with_wrong_adapters_is_refused(tiny, contenders, factors, wrong):
    with pytest.raises(BenchmarkError, match=r"\(adapters\).*Nothing was timed"):
        check_equal({**contenders, "ours": Ours(tiny, wrong(factors))}, ADAPTERS, TOKENS)


class Altered:
    """A contender whose logits are changed after the fact."""

    def __init__(self, inner, change) -> None:
        self.inner, self.change = inner, change

    @contextmanager
    def assigned(self, adapters):
        with self.inner.assigned(adapters) as forward:

            def altered(**inputs):
                out = forward(**inputs)
                out.logits = self.change(out.logits)
                return out

            yield altered


def test_a_contender_without_numbers_is_refused(contenders):
    broken = Altered(contenders["ours"], lambda logits: logits * float("nan"))
    with pytest.raises(BenchmarkError, match="nan"):
        check_equal({**contenders, "ours": broken}, ADAPTERS, TOKENS)


def test_a_base_that_is_not_the_base_is_refused(contenders):
    shifted = Altered(contenders["base"], lambda logits: logits + 0.01 * logits.abs().max())
    with pytest.raises(BenchmarkError, match=r"\(none\)"):
        check_equal({**contenders, "base": shifted}, ADAPTERS, TOKENS)


def test_adapters_that_do_nothing_prove_nothing(tiny):
    idle = [random_factors(tiny.linear_shapes(), rank=4, seed=seed, scale=0.0) for seed in range(3)]
    group = {"base": Base(tiny), "ours": Ours(tiny, idle), "peft": Peft(tiny, idle)}
    with pytest.raises(BenchmarkError, match="equality says nothing"):
        check_equal(group, ADAPTERS, TOKENS)


def test_operations_are_counted():
    x = torch.ones(3)
    assert count_ops(lambda: x) == 0
    assert count_ops(lambda: (x + x) * x) == 2


def test_step_inputs_continue_where_the_cache_ends():
    inputs = step_inputs(TOKENS[:, :2], start=7)
    assert inputs["attention_mask"].shape == (4, 9)
    assert inputs["position_ids"].tolist() == [[7, 8]] * 4
