"""Recalled memories reused in any order, through the facade: off by default, said so, and forgotten."""

import pytest

from persona_sdk import PersonaModel
from persona_sdk.compose import ChatOptions
from persona_sdk.errors import InvalidInputError

from .support import FAST, lora

MEMORIES = [
    "Alice likes short answers and metric units when nurses ask.",
    "Alice walks two dogs every morning before nurses speak.",
    "Alice reads on the train and nurses remember what she told.",
]
ASKED = "What do nurses know about Alice and dogs and the train?"
WIDE = {**FAST, "recall_k": 3, "recall_score": -1.0}


def filled(model, name="alice"):
    alice = model.persona(name)
    alice.remember("Alice is called Alice.", pinned=True)
    alice.remember_all(MEMORIES)
    alice.add_adapter("tone", lora(model, 1))
    alice.attach(f"{name}/tone")
    return alice


@pytest.fixture
def reusing(tmp_path, tiny, hash_embedder):
    with PersonaModel.from_pretrained(
        tiny,
        store=tmp_path / "store",
        embedder=hash_embedder,
        engine={"block_reuse": {"fraction": 0.1}, "prefix_bytes": 0},
    ) as model:
        yield model


def test_recalled_memories_are_the_blocks_and_pinned_ones_belong_to_the_head(reusing):
    alice = filled(reusing)
    made = alice._model._compose(alice, ASKED, ChatOptions(**WIDE))
    decode = reusing.base.tokenizer.decode
    assert [decode(made.prompt[start:stop]).removeprefix("- ")[:12] for start, stop in made.blocks] == [
        passage.text[:12] for passage in made.passages[1:]
    ]
    assert "called Alice" in decode(made.prompt[: made.blocks[0][0]])


def test_a_reply_says_that_it_approximates(reusing):
    alice = filled(reusing)
    reply = alice.chat(ASKED, **WIDE)
    assert 0 < reply.reused_tokens < len(reply.prompt_tokens)
    assert f"{reply.reused_tokens} prompt tokens, of memories" in str(alice.explain(reply))
    stream = alice.stream(ASKED, **WIDE)
    assert "".join(stream) == reply.text
    assert stream.reply.reused_tokens == reply.reused_tokens
    # Nothing of it when nothing is recalled, for the base model, or with one memory, which stands where it
    # was made.
    assert alice.chat(ASKED, **{**WIDE, "recall_k": 0}).reused_tokens == 0
    assert alice.chat(ASKED, **{**WIDE, "recall_k": 1}).reused_tokens == 0
    assert reusing.chat("Hi", **FAST).reused_tokens == 0


def test_the_same_again_gives_the_same_and_the_second_time_reads_what_was_kept(reusing):
    alice = filled(reusing)
    first = alice.chat(ASKED, **WIDE)
    before = reusing.engine._blocks.stats()
    again = alice.chat(ASKED, **WIDE)
    assert again == first
    assert reusing.engine._blocks.stats().hits == before.hits + 3


def test_forgetting_a_memory_drops_its_keys_and_values(reusing):
    alice = filled(reusing)
    alice.chat(ASKED, **WIDE)
    assert reusing.engine._blocks.stats().entries == 3
    alice.forget("two dogs")
    assert reusing.engine._blocks.stats().entries == 0
    assert "two dogs" not in str(alice.chat(ASKED, **WIDE).citations)


def test_personas_share_no_block(reusing):
    alice, bob = filled(reusing), filled(reusing, "bob")
    alice.chat(ASKED, **WIDE)
    hits = reusing.engine._blocks.stats().hits
    bob.chat(ASKED, **WIDE)
    assert reusing.engine._blocks.stats().hits == hits


def test_with_every_token_computed_again_it_is_the_exact_reply(tmp_path, tiny, hash_embedder, model):
    exact = filled(model).chat(ASKED, **WIDE)
    assert exact.reused_tokens == 0
    assert "approximated" not in str(model.persona("alice").explain(exact))
    with PersonaModel.from_pretrained(
        tiny, store=tmp_path / "other", embedder=hash_embedder, engine={"block_reuse": {"fraction": 1}}
    ) as other:
        alice = filled(other)
        for _ in range(2):
            reply = alice.chat(ASKED, **WIDE)
            assert (reply.tokens, reply.prompt_tokens) == (exact.tokens, exact.prompt_tokens)
            assert reply.reused_tokens == 0


def test_off_by_default_and_bad_options_are_named(model, tmp_path, tiny):
    assert model.engine.options.block_reuse is None
    alice = filled(model)
    assert alice._model._compose(alice, ASKED, ChatOptions(**WIDE)).blocks == ()
    for bad, named in (({"fraction": 2}, "fraction"), ({"speed": 1}, "speed"), ({"pick": "both"}, "first")):
        with pytest.raises(InvalidInputError, match=named):
            PersonaModel.from_pretrained(tiny, store=tmp_path / "bad", engine={"block_reuse": bad})
