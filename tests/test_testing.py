"""The stand-ins that applications test with must behave like the real things."""

import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jaxtyping import TypeCheckError

from persona_sdk.models import LanguageModel
from persona_sdk.tensors import low_rank_bundle
from persona_sdk.testing import HashEmbedder, tiny_language_model

ARCHITECTURES = ["llama", "gpt2", "qwen2", "gemma"]


def greedy(model: LanguageModel, prompt: str, tokens: int = 8) -> list[int]:
    ids = model.tokenizer(prompt, return_tensors="pt").input_ids
    out = model.module.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, pad_token_id=0
    )
    return out[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_replies_depend_on_the_prompt_and_on_the_seed(architecture):
    model = tiny_language_model(architecture=architecture)
    replies = {tuple(greedy(model, prompt)) for prompt in ("Hi", "How warm is it?", "two dogs")}
    assert len(replies) == 3
    other = tiny_language_model(architecture=architecture, seed=1)
    assert greedy(other, "Hi") != greedy(model, "Hi")
    assert other.fingerprint != model.fingerprint


def test_the_same_model_comes_out_of_another_process():
    program = (
        "from persona_sdk.testing import tiny_language_model as t; m = t();"
        "print(m.fingerprint, *m.tokenizer('What do you know?').input_ids)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    model = tiny_language_model()
    expected = [model.fingerprint, *map(str, model.tokenizer("What do you know?").input_ids)]
    assert done.stdout.split() == expected


def test_building_a_model_leaves_the_random_state_alone():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    tiny_language_model(seed=9)
    assert torch.equal(torch.rand(4), expected)


def test_models_do_not_share_a_tokenizer(tiny):
    other = tiny_language_model()
    other.tokenizer.chat_template = "changed"
    assert tiny.tokenizer.chat_template != "changed"
    assert tiny_language_model().tokenizer.chat_template != "changed"


@given(st.text(max_size=40))
def test_the_tokenizer_loses_no_text(tiny, text):
    ids = tiny.tokenizer(text).input_ids
    assert all(0 <= token < tiny.module.config.vocab_size for token in ids)
    assert tiny.tokenizer.decode(ids) == text


def test_the_chat_template_marks_every_turn_and_opens_the_reply(tiny):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = tiny.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nYes?<|im_end|>\n<|im_start|>assistant\n"
    )
    end = tiny.tokenizer("<|im_end|>").input_ids
    assert end == [tiny.tokenizer.eos_token_id] == [tiny.module.config.eos_token_id]


@given(st.lists(st.text(max_size=30), max_size=4))
def test_hash_vectors_are_units_and_do_not_depend_on_the_batch(texts):
    embedder = HashEmbedder(16)
    vectors = embedder.encode(texts)
    assert vectors.shape == (len(texts), 16)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(len(texts)))
    for row, text in zip(vectors, texts, strict=True):
        assert torch.equal(row, embedder.encode([text])[0])


def test_texts_that_share_words_are_nearer():
    a, b, c = HashEmbedder().encode(["two brown dogs", "Dogs, brown!", "metric units please"])
    assert a @ b > a @ c


def test_shapes_and_types_are_checked_under_pytest():
    """Proof that the jaxtyping option in pyproject.toml works, for this package and the mapped ones."""
    from persona_sdk.adapters import base
    from persona_sdk.memory import store

    with pytest.raises(TypeCheckError, match=r"Expected type: .*Float\[Tensor, 'r d_in'\]"):
        low_rank_bundle({"layer": (torch.zeros(3), torch.zeros(2, 2))})
    with pytest.raises(TypeCheckError, match="texts"):
        HashEmbedder().encode("not a list")
    for module in (base, store):
        assert type(module.__loader__).__name__ == "_JaxtypingLoader"
