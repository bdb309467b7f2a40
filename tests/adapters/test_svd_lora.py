"""SVD-LoRA under a preference vector: algebra against dense matrices, and the layer against the algebra."""

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from persona_sdk.adapters import lowrank, svd_lora
from persona_sdk.adapters.panacea import initial_tensors
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.svd_layers import Preference, SVDLinear, svd_layers
from persona_sdk.adapters.svd_lora import Shape
from persona_sdk.errors import IncompatibleAdapterError, UnsupportedAdapterError
from persona_sdk.models import LanguageModel
from persona_sdk.tensors import low_rank_pairs
from persona_sdk.testing import tiny_language_model

from .support import IDS, logits, patched

D_IN, D_OUT = 7, 5


def shape_of(m: int = 3, k: int = 2, p: int = 1, per_dimension: bool = False) -> Shape:
    return Shape(rank=k, dimensions=m, preference_rank=p, scale_per_dimension=per_dimension, multiplier=1.5)


def random_sides(shape: Shape, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    sizes = ((D_OUT, shape.total), (D_IN, shape.total), (shape.rank,), (shape.scales,))
    return tuple(torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes)


def dense(sides: tuple[Tensor, ...], preference: Tensor, shape: Shape) -> Tensor:
    """ΔW by the paper's formula, one direction after the other."""
    U, V, sigma, s = sides
    total = torch.zeros(D_OUT, D_IN, dtype=torch.float64)
    for j in range(shape.rank):
        total += sigma[j] * torch.outer(U[:, j], V[:, j])
    for i in range(shape.dimensions):
        for q in range(shape.preference_rank):
            column = shape.rank + i * shape.preference_rank + q
            scale = s[i] if shape.scale_per_dimension else s[0]
            total += scale * preference[i] * torch.outer(U[:, column], V[:, column])
    return shape.multiplier * total


def served(sides: tuple[Tensor, ...], preference: Tensor, shape: Shape) -> Tensor:
    """ΔW of what the engine is given: folded factors and a gate."""
    names = {f"a.b.{side}": value for side, value in zip(svd_lora.SIDES, sides, strict=True)}
    ((_, A, B),) = low_rank_pairs(svd_lora.fold(names, shape))
    return lowrank.delta(A, B, svd_lora.gate(preference.tolist(), shape))


def layer(sides: tuple[Tensor, ...], shape: Shape, at: Preference) -> SVDLinear:
    inner = nn.Linear(D_IN, D_OUT, dtype=torch.float64)
    for parameter in inner.parameters():
        parameter.requires_grad_(False)
    return SVDLinear(inner, tuple(side.clone() for side in sides), shape, at)


SHAPES = [shape_of(), shape_of(2, 4, 1), shape_of(5, 1, 2), shape_of(10, 3, 1, True), shape_of(3, 2, 3, True)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_what_is_served_and_what_is_trained_are_the_formula(shape: Shape) -> None:
    sides = random_sides(shape)
    preference = torch.rand(shape.dimensions, dtype=torch.float64)
    expected = dense(sides, preference, shape)
    torch.testing.assert_close(served(sides, preference, shape), expected, atol=1e-12, rtol=0)

    at = Preference()
    module, x = layer(sides, shape, at), torch.randn(4, 6, D_IN, dtype=torch.float64)
    with at.at(preference):
        torch.testing.assert_close(module(x) - module.inner(x), x @ expected.T)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_preference_in_every_row_is_each_row_alone(shape: Shape) -> None:
    at = Preference()
    module, x = layer(random_sides(shape), shape, at), torch.randn(4, 6, D_IN, dtype=torch.float64)
    preferences = torch.rand(4, shape.dimensions, dtype=torch.float64)
    with at.at(preferences):
        together = module(x)
    for row in range(4):
        with at.at(preferences[row]):
            torch.testing.assert_close(together[row], module(x[row]))


@given(st.integers(0, 1000), st.floats(0, 1), st.sampled_from(SHAPES))
def test_the_update_is_affine_in_the_preference(seed: int, a: float, shape: Shape) -> None:
    draw = torch.Generator().manual_seed(seed)
    sides = random_sides(shape, seed)
    one, two = (torch.rand(shape.dimensions, generator=draw, dtype=torch.float64) for _ in range(2))
    mixed = served(sides, a * one + (1 - a) * two, shape)
    expected = a * served(sides, one, shape) + (1 - a) * served(sides, two, shape)
    torch.testing.assert_close(mixed, expected, atol=1e-10, rtol=0)
    vertex = torch.eye(shape.dimensions, dtype=torch.float64)[0]
    rank = int(torch.linalg.matrix_rank(served(sides, vertex, shape)))
    assert rank <= shape.rank + shape.preference_rank


def test_permuting_dimensions_permutes_their_directions() -> None:
    shape, order = shape_of(3, 2, 2, per_dimension=True), [2, 0, 1]
    U, V, sigma, s = random_sides(shape)
    columns = [0, 1, *(2 + 2 * i + q for i in order for q in range(2))]
    preference = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64)
    permuted = (U[:, columns], V[:, columns], sigma, s[order])
    torch.testing.assert_close(
        served(permuted, preference[order], shape), served((U, V, sigma, s), preference, shape)
    )


def test_gradients_of_the_first_step_are_those_of_the_closed_form() -> None:
    """σ = s = 0: dL/ds = c Σ λ_i u_iᵀ G v_i, dL/dσ_j = c u_jᵀ G v_j, and none at all for U and V."""
    shape, at = shape_of(), Preference()
    U, V, _, _ = random_sides(shape)
    zero = torch.zeros(shape.rank, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    module, x = layer((U, V, *zero), shape, at), torch.randn(9, D_IN, dtype=torch.float64)
    target = torch.randn(9, D_OUT, dtype=torch.float64)
    preference = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64)
    with at.at(preference):
        output = module(x)
    (output - target).square().sum().backward()
    G = 2 * (output.detach() - target).T @ x  # dL/dW
    projected = torch.einsum("oc,oi,ic->c", U, G, V)
    torch.testing.assert_close(module.sigma.grad, shape.multiplier * projected[:2])
    torch.testing.assert_close(module.s.grad, shape.multiplier * (preference @ projected[2:])[None])
    assert float(module.U.grad.abs().max()) == float(module.V.grad.abs().max()) == 0.0


def test_a_dimension_of_weight_0_gets_no_gradient_and_the_preference_never_moves() -> None:
    shape, at = shape_of(), Preference()
    module = layer(random_sides(shape), shape, at)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    preference = torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64, requires_grad=True)
    with at.at(preference):
        module(torch.randn(3, D_IN, dtype=torch.float64)).square().sum().backward()
        assert at.vector is not None
        assert not at.vector.requires_grad
    for factor in (module.U, module.V):
        assert float(factor.grad[:, 4].abs().max()) == 0.0
        assert float(factor.grad[:, :4].abs().min()) > 0.0
    optimizer.step()
    assert preference.grad is None
    assert preference.tolist() == [0.6, 0.4, 0.0]
    assert not any("preference" in name or "lambda" in name for name in module.state_dict())


def test_without_a_preference_the_layer_is_the_base_and_with_none_of_it_is_not() -> None:
    shape, at = shape_of(), Preference()
    module, x = layer(random_sides(shape), shape, at), torch.randn(3, D_IN, dtype=torch.float64)
    assert torch.equal(module(x), module.inner(x))
    with at.at(torch.zeros(3, dtype=torch.float64)):
        assert float((module(x) - module.inner(x)).detach().abs().max()) > 0.1  # σ is still on
    with pytest.raises(RuntimeError, match="inside"), at.at(torch.ones(3, dtype=torch.float64)):
        raise RuntimeError("inside")
    assert at.vector is None


@pytest.mark.parametrize("architecture", ["llama", "gpt2", "qwen2", "gemma"])
@pytest.mark.parametrize("init", ["normal", "orthonormal"])
def test_untrained_layers_give_the_logits_of_the_base_to_the_bit(architecture, init) -> None:
    base = tiny_language_model(architecture=architecture)
    options = PanaceaConfig(dimensions=("a", "b"), rank=2, init=init)
    expected = logits(base.module)
    with svd_layers(base, initial_tensors(base, options)[0], options.shape) as layers:
        for preference in (torch.tensor([1.0, 0.0]), torch.tensor([0.3, 0.7])):
            with layers.preference.at(preference):
                assert torch.equal(logits(base.module), expected)
    assert torch.equal(logits(base.module), expected)
    assert not any(isinstance(part, SVDLinear) for part in base.module.modules())


def test_layers_in_the_model_are_what_the_engine_is_given(tiny: LanguageModel) -> None:
    options = PanaceaConfig(dimensions=("a", "b", "c"), rank=2, alpha=3.0)
    tensors, draw = initial_tensors(tiny, options)
    tensors = {n: t + 0.3 * torch.randn(t.shape, generator=draw) for n, t in tensors.items()}
    preferences = torch.tensor([[0.2, 0.3, 0.5], [1.0, 0.0, 0.0]])
    with svd_layers(tiny, tensors, options.shape) as layers:
        with layers.preference.at(preferences):
            trained = logits(tiny.module)
        assert set(layers.tensors()) == set(tensors)
    for row, preference in enumerate(preferences.tolist()):
        with patched(tiny, svd_lora.fold(tensors, options.shape), svd_lora.gate(preference, options.shape)):
            alone = logits(tiny.module, IDS[row : row + 1])
        torch.testing.assert_close(trained[row : row + 1], alone, atol=1e-4, rtol=1e-4)


def test_a_preference_a_row_reaches_the_tokens_of_its_row_where_rows_lie_end_to_end() -> None:
    shape, at = shape_of(), Preference()
    module, x = layer(random_sides(shape), shape, at), torch.randn(4, 6, D_IN, dtype=torch.float64)
    with at.at(torch.rand(4, 3, dtype=torch.float64)):
        torch.testing.assert_close(module(x.flatten(0, 1)), module(x).flatten(0, 1))
        with pytest.raises(UnsupportedAdapterError, match="7 tokens of 4 rows"):
            module(x.flatten(0, 1)[:7])


class TestInitialisation:
    @pytest.fixture(params=[(64, 64), (32, 200), (256, 16)], ids=str)
    def sizes(self, request) -> Iterator[tuple[int, int]]:
        return request.param

    def test_orthonormal_directions_have_norm_1_at_every_width(self, sizes) -> None:
        shape = Shape(rank=8, dimensions=2)
        U, V, sigma, s = svd_lora.initial(*sizes, shape, torch.Generator().manual_seed(0))
        norms = (U.norm(dim=0) * V.norm(dim=0)).tolist()
        assert norms == pytest.approx([1.0] * 10, abs=1e-5)
        assert float(svd_lora.orthogonality(U, V)) < 1e-9
        assert not sigma.any()
        assert not s.any()

    def test_normal_directions_have_the_norm_of_the_ports(self) -> None:
        U, V, _, _ = svd_lora.initial(576, 576, shape_of(), torch.Generator().manual_seed(0), "normal")
        assert float(U.std()) == pytest.approx(0.02, rel=0.05)
        assert float((U.norm(dim=0) * V.norm(dim=0)).mean()) == pytest.approx(0.23, abs=0.02)

    def test_more_directions_than_the_width_have_norm_1_too(self) -> None:
        U, _, _, _ = svd_lora.initial(4, 4, Shape(rank=4, dimensions=5), torch.Generator().manual_seed(0))
        assert U.norm(dim=0).tolist() == pytest.approx([1.0] * 9, abs=1e-5)

    def test_the_penalty_is_0_for_orthonormal_columns_and_the_formula_otherwise(self) -> None:
        U, V = torch.randn(6, 3), torch.linalg.qr(torch.randn(8, 3))[0]
        expected = torch.linalg.matrix_norm(U.T @ U - torch.eye(3)) ** 2
        torch.testing.assert_close(svd_lora.orthogonality(U, V), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop("x.s"),
        lambda t: t.update({"x.U": torch.zeros(5, 4)}),
        lambda t: t.update({"x.V": torch.zeros(7)}),
        lambda t: t.update({"x.sigma": torch.zeros(3)}),
        lambda t: t.update({"x.s": torch.zeros(3)}),
        lambda t: t.update({"x.W": torch.zeros(3)}),
        lambda t: t.clear(),
    ],
)
def test_tensors_that_are_no_whole_adapter_are_refused(change) -> None:
    shape = shape_of()
    tensors = {f"x.{side}": value for side, value in zip(svd_lora.SIDES, random_sides(shape), strict=True)}
    svd_lora.check(tensors, shape)
    change(tensors)
    with pytest.raises(IncompatibleAdapterError):
        svd_lora.check(tensors, shape)
