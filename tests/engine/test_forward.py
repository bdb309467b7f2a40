"""Both forward passes against the model itself: any chunking, any mix of rows, every architecture family."""

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine.forward.architectures import blocks_of
from persona_sdk.engine.forward.attention import decode_attention, rotate
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.forward.norms import rms_norm
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.forward.select import disagreement, forward_of
from persona_sdk.errors import EngineError, ModelError
from persona_sdk.models import LanguageModel
from persona_sdk.packed import PackedLinear
from persona_sdk.testing import tiny_language_model

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
FAMILIES = ("llama", "qwen2", "gpt2", "gemma", "qwen3", "mistral", "mistral windowed", "gemma3")


def built(family: str) -> LanguageModel:
    if family in ("llama", "qwen2", "gpt2", "gemma"):
        return tiny_language_model(architecture=family)  # type: ignore[arg-type]
    torch.manual_seed(0)
    if family == "qwen3":
        config = transformers.Qwen3Config(**SHAPE, head_dim=16)
        module = transformers.Qwen3ForCausalLM(config)
    elif family.startswith("mistral"):
        config = transformers.MistralConfig(**SHAPE, sliding_window=4 if "windowed" in family else None)
        module = transformers.MistralForCausalLM(config)
    else:  # layers with and without a window in one model, and soft caps nobody else has
        kinds = ["sliding_attention", "full_attention"]
        config = transformers.Gemma3TextConfig(**SHAPE, head_dim=16, sliding_window=4, layer_types=kinds)
        module = transformers.Gemma3ForCausalLM(config)
    for parameter in module.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
    return LanguageModel.from_module(family, module, tiny_language_model().tokenizer)


_MODELS: dict[str, tuple[LanguageModel, list[Forward]]] = {}


def passes(family: str) -> tuple[LanguageModel, list[Forward]]:
    if family not in _MODELS:
        model = built(family)
        blocks = blocks_of(model.module)
        _MODELS[family] = model, [GeneralForward(model), *([FusedForward(blocks)] if blocks else [])]
    return _MODELS[family]


def expected(model: LanguageModel, tokens: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        mask = torch.ones(1, len(tokens), dtype=torch.long)
        return model.module(input_ids=torch.tensor([tokens]), attention_mask=mask).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_any_chunking_of_any_rows_gives_the_models_own_logits(family, data):
    model, forwards = passes(family)
    lengths = data.draw(st.lists(st.integers(1, 12), min_size=1, max_size=4))
    prompts = [data.draw(st.lists(st.integers(0, 383), min_size=n, max_size=n)) for n in lengths]
    for forward in forwards:
        pool = TokenPool(forward.layers, device=model.device, dtype=forward.cache_dtype, budget_bytes=2**24)
        for _ in range(data.draw(st.integers(0, 2))):  # rows before us: our slots do not start in order
            pool.take(data.draw(st.integers(1, 5)))
        tables = [pool.take(12) for _ in prompts]
        done, logits = [0] * len(prompts), [[] for _ in prompts]
        while any(d < len(p) for d, p in zip(done, prompts, strict=True)):
            rows = [i for i, p in enumerate(prompts) if done[i] < len(p)]
            rows = data.draw(st.lists(st.sampled_from(rows), min_size=1, unique=True))
            counts = [data.draw(st.integers(1, len(prompts[i]) - done[i])) for i in rows]
            new = [
                RowTokens(
                    prompts[i][done[i] : done[i] + n], range(done[i], done[i] + n), tables[i][: done[i] + n]
                )
                for i, n in zip(rows, counts, strict=True)
            ]
            with torch.inference_mode():
                out = forward(pack(new, model.device), pool, None, every=True)
            for i, n, piece in zip(rows, counts, out.split(counts), strict=True):
                logits[i].append(piece)
                done[i] += n
        for prompt, pieces in zip(prompts, logits, strict=True):
            torch.testing.assert_close(torch.cat(pieces), expected(model, prompt), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_vectors_of_a_row_take_the_place_of_its_embeddings(family):
    model, forwards = passes(family)
    vectors = torch.randn(3, model.d_model)
    embed = model.module.get_input_embeddings()
    with torch.inference_mode():
        plain = embed(torch.tensor([7, 8]))
        # Gemma scales what its embedding returns inside the module; what is passed in is scaled by the model.
        scale = plain.norm() / embed.weight[[7, 8]].norm() if family == "gemma3" else 1.0
        own = torch.cat([vectors, plain / scale])[None] if family != "gemma3" else None
        for forward in forwards:
            pool = TokenPool(
                forward.layers, device=model.device, dtype=forward.cache_dtype, budget_bytes=2**24
            )
            table = pool.take(5)
            assert table is not None
            out = forward(
                pack([RowTokens([0, 0, 0, 7, 8], range(5), table, vectors)], model.device), pool, None
            )
            if own is not None:
                ref = model.module(
                    inputs_embeds=own, attention_mask=torch.ones(1, 5, dtype=torch.long)
                ).logits
                torch.testing.assert_close(out[0], ref[0, -1], atol=2e-5, rtol=1e-4)


def test_the_general_pass_leaves_the_model_as_it_was():
    model = tiny_language_model(seed=5)
    before = [len(module._forward_hooks) for module in model.module.modules()]
    forward = GeneralForward(model)
    forward.close()
    assert [len(module._forward_hooks) for module in model.module.modules()] == before


def test_a_fused_pass_that_would_be_wrong_is_not_used(caplog):
    model = tiny_language_model(seed=6)
    model.module.model.norm.forward = lambda x: 2 * x  # something the table of architectures does not know
    assert isinstance(forward_of(model), GeneralForward)
    assert "using the general one" in caplog.text
    assert isinstance(forward_of(tiny_language_model(seed=6)), FusedForward)


def test_both_passes_agree_and_say_so():
    model, (general, fused) = passes("llama")
    assert disagreement(fused, general, model) < 1e-5


def test_a_model_without_keys_and_values_is_refused():
    config = transformers.MambaConfig(vocab_size=384, hidden_size=32, num_hidden_layers=2, state_size=4)
    model = LanguageModel.from_module(
        "mamba", transformers.MambaForCausalLM(config), tiny_language_model().tokenizer
    )
    with pytest.raises(ModelError, match="keeps no keys and values"):
        GeneralForward(model)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 4), st.integers(1, 3), st.sampled_from([4, 8]), st.integers(0, 2**16))
def test_compiled_decode_attention_is_the_formula(rows, repeat, head_dim, seed):
    torch.manual_seed(seed)
    kv_heads, rotary = 2, head_dim // 2
    lengths = torch.randint(1, 9, (rows,))
    keys, values = torch.randn(40, kv_heads, head_dim), torch.randn(40, kv_heads, head_dim)
    tables = torch.randperm(39)[: rows * 8].view(rows, 8) + 1
    qkv = torch.randn(rows, (repeat + 2) * kv_heads * head_dim)
    cos, sin = torch.randn(rows, rotary), torch.randn(rows, rotary)
    out = torch.empty(rows, repeat * kv_heads * head_dim)
    compiled = decode_attention(head_dim, rotary, repeat)
    assert compiled is not None
    arrays = [t.numpy() for t in (qkv, cos, sin, keys, values, tables, lengths)]
    split = qkv.view(rows, (repeat + 2) * kv_heads, head_dim)
    turned = rotate(split[:, : (repeat + 1) * kv_heads], cos, sin)
    compiled(*arrays, 0.3, kv_heads, out.numpy())
    for row in range(rows):
        table = tables[row, : lengths[row]]
        torch.testing.assert_close(keys[table[-1]], turned[row, repeat * kv_heads :])
        torch.testing.assert_close(values[table[-1]], split[row, (repeat + 1) * kv_heads :])
        query = turned[row, : repeat * kv_heads].view(kv_heads, repeat, head_dim).double()
        scores = torch.einsum("grd,tgd->grt", query, keys[table].double()) * 0.3
        ref = torch.einsum("grt,tgd->grd", scores.softmax(-1), values[table].double())
        torch.testing.assert_close(out[row].double(), ref.reshape(-1), atol=1e-5, rtol=1e-4)


def test_a_row_with_nan_stays_nan_in_compiled_attention_and_others_do_not():
    compiled = decode_attention(4, 4, 1)
    assert compiled is not None
    keys, values = torch.randn(10, 1, 4), torch.randn(10, 1, 4)
    qkv, out = torch.randn(2, 12), torch.empty(2, 4)
    qkv[0] = float("nan")
    tables, seen = torch.tensor([[1, 2], [3, 4]]), torch.tensor([2, 2])
    arrays = [t.numpy() for t in (qkv, torch.ones(2, 4), torch.zeros(2, 4), keys, values, tables, seen)]
    compiled(*arrays, 1.0, 1, out.numpy())
    assert out[0].isnan().all()
    assert out[1].isfinite().all()


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 200), st.integers(1, 70), st.integers(0, 2**16))
def test_rms_norm_is_the_formula_and_keeps_nan(rows, width, seed):
    torch.manual_seed(seed)
    x, weight = 10 * torch.randn(rows, width), torch.randn(width)
    x[0, 0] = float("nan")
    out = rms_norm(x, weight, 1e-5)
    expected = x.double() / (x.double().pow(2).mean(1, keepdim=True) + 1e-5).sqrt() * weight
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4, equal_nan=True)
    assert out[0].isnan().all()


@settings(max_examples=30, deadline=None)
@given(
    st.integers(1, 40),
    st.integers(1, 50),
    st.lists(st.integers(1, 30), min_size=1, max_size=3),
    st.booleans(),
)
def test_packed_linears_are_the_linears_side_by_side(tokens, d_in, widths, bias):
    linears = [torch.nn.Linear(d_in, width, bias=bias and i == 0) for i, width in enumerate(widths)]
    x = torch.randn(tokens, d_in)
    with torch.inference_mode():
        out = PackedLinear.of(*linears)(x)
        torch.testing.assert_close(
            out, torch.cat([linear(x) for linear in linears], dim=1), atol=1e-4, rtol=1e-4
        )


def test_a_pass_without_tokens_is_an_error():
    with pytest.raises(EngineError):
        pack([], torch.device("cpu"))
