"""The facade on a tiny model: what an application sees."""

import asyncio
import math

import pytest

from persona_sdk import LoRA, PersonaModel
from persona_sdk.errors import (
    IncompatibleAdapterError,
    InvalidInputError,
    NotFoundError,
    PersonaError,
    PromptTooLongError,
)
from persona_sdk.plan import CompositionPlan
from persona_sdk.testing import HashEmbedder, tiny_language_model

from .engine.support import random_factors
from .support import FAST, lora, patches


class TestChat:
    def test_nobody_and_somebody_new_get_the_base_model(self, model):
        base = model.chat("How warm is it?", **FAST)
        alice = model.persona("alice").chat("How warm is it?", **FAST)
        assert base.plan == alice.plan == CompositionPlan(model.base.fingerprint, (), base.plan.options)
        assert base.tokens == alice.tokens
        assert str(base) == base.text

    def test_reads_change_nothing(self, model):
        alice = model.persona("alice")
        alice.remember("Likes tea.")
        before = alice.history()
        alice.chat("Hi", **FAST)
        list(alice.stream("Hi", **FAST))
        alice.recall("tea")
        assert alice.history() == before
        assert model.persona("bob").chat("Hi", **FAST)
        assert model.store.kind_of("bob") is None

    def test_memories_reach_the_prompt_and_the_citations(self, model):
        alice = model.persona("alice")
        cube = alice.remember("Prefers metric units and short answers.")
        reply = alice.chat("Which units does she use, metric units?", **FAST)
        assert [passage.id for passage in reply.citations] == [cube.id]
        assert "metric units and short" in model.base.tokenizer.decode(reply.prompt_tokens)
        assert alice.chat("metric units", recall_k=0, **FAST).citations == ()
        assert alice.chat("metric units", recall_score=0.99, **FAST).citations == ()

    def test_one_heterogeneous_batch_equals_the_solo_runs(self, model):
        alice, bob = model.persona("alice", groups=["nurses"]), model.persona("bob")
        model.adapters.add("alice/voice", lora(model, 1))
        model.adapters.add("nurses/tone", lora(model, 2, rank=2))
        alice.attach("alice/voice")
        model.group("nurses").attach("nurses/tone", weight=0.5)
        bob.remember("Bob keeps two dogs.")
        question = "Bob keeps two dogs?"
        base, a, b = model.chat_batch([(None, question), (alice, question), (bob, question)], **FAST)
        assert base.tokens == model.chat(question, **FAST).tokens
        assert a.tokens == alice.chat(question, **FAST).tokens
        assert b.tokens == bob.chat(question, **FAST).tokens
        assert len({base.tokens, a.tokens, b.tokens}) == 3
        assert patches(a) == ["alice/voice@2", "nurses/tone@1"]  # alice@1 is her joining
        assert a.plan.low_rank[1].gate == (0.5, 0.5)

    def test_same_revision_plan_and_seed_give_the_same_tokens(self, model):
        alice = model.persona("alice")
        alice.remember("Likes tea.")
        sampled = {"do_sample": True, "temperature": 2.0, **FAST}
        one, two = alice.chat("tea?", seed=3, **sampled), alice.chat("tea?", seed=3, **sampled)
        assert (one.plan_id, one.tokens, one.revisions) == (two.plan_id, two.tokens, two.revisions)
        assert len({alice.chat("tea?", seed=seed, **sampled).tokens for seed in range(5)}) > 1

    def test_a_plan_is_made_of_one_snapshot(self, model, monkeypatch):
        """Commits that land while a plan is made do not get into it."""
        alice = model.persona("alice")
        alice.remember("Likes green tea.")
        before = alice.chat("green tea?", **FAST)
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice")
        alice.remember("Drinks green tea at noon.")
        monkeypatch.setattr(model.store, "head", lambda owner: 1)
        again = alice.chat("green tea?", **FAST)
        assert (again.plan_id, again.tokens) == (before.plan_id, before.tokens)

    def test_stream_is_chat(self, model):
        alice = model.persona("alice")
        stream = alice.stream("Tell me more", max_new_tokens=20)
        text = "".join(stream)
        assert text == stream.reply.text == alice.chat("Tell me more", max_new_tokens=20).text
        assert stream.reply == alice.chat("Tell me more", max_new_tokens=20)

    def test_achat_runs_many_at_once(self, model):
        personas = [model.persona(f"user{n}") for n in range(4)]
        for seed, persona in enumerate(personas):
            persona.add_adapter("voice", lora(model, seed))
            persona.attach(f"{persona.id}/voice")
        alone = [persona.chat("Hi", **FAST).tokens for persona in personas]

        async def everyone():
            return await asyncio.gather(*(persona.achat("Hi", **FAST) for persona in personas))

        assert [reply.tokens for reply in asyncio.run(everyone())] == alone
        assert len(set(alone)) == 4

    def test_stop_strings_end_the_text(self, model):
        text = model.chat("Tell me more", max_new_tokens=20).text
        stop = text[3:5]
        reply = model.chat("Tell me more", max_new_tokens=20, stop_strings=(stop,))
        assert reply.text == text[: text.find(stop)]
        assert reply.finish_reason == "stop"

    def test_explain_names_what_was_used(self, model):
        alice = model.persona("alice")
        alice.remember("Likes green tea.")
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice", weight=0.25)
        reply = alice.chat("green tea", **FAST)
        told = str(alice.explain(reply))
        assert "alice/voice@2  rank 4, gate 0.25" in told
        assert "Likes green tea." in told
        assert "alice@3" in told
        assert reply.plan_id[:16] in told
        with pytest.raises(InvalidInputError, match="given to 'alice'"):
            model.persona("bob").explain(reply)


class TestHistory:
    def test_rollback_is_a_new_revision_that_brings_back_plan_and_tokens(self, model):
        alice = model.persona("alice")
        alice.remember("Likes tea.")
        model.adapters.add("alice/voice", lora(model, 1))
        first = alice.chat("tea?", **FAST)
        alice.attach("alice/voice")
        alice.remember("Now prefers coffee to tea.")
        assert alice.chat("tea?", **FAST).plan_id != first.plan_id
        undone = alice.rollback(2)
        assert (undone.number, undone.restores) == (5, 2)
        again = alice.chat("tea?", **FAST)
        assert (again.plan_id, again.tokens) == (first.plan_id, first.tokens)
        assert [revision.number for revision in alice.history()] == [1, 2, 3, 4, 5]

    def test_attach_again_replaces_and_detach_removes(self, model):
        alice = model.persona("alice")
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice")
        alice.attach("alice/voice", weight=0.5)
        assert alice.attachments() == ["alice/voice"]
        assert alice.chat("Hi", **FAST).plan.low_rank[0].gate == (0.5,) * 4
        alice.detach("alice/voice")
        assert alice.chat("Hi", **FAST).plan.parts == ()
        with pytest.raises(NotFoundError):
            alice.detach("alice/voice")

    def test_an_attachment_stays_with_its_version_of_the_adapter(self, model):
        alice = model.persona("alice")
        model.adapters.add("shared/tone", lora(model, 1))
        alice.attach("shared/tone")
        before = alice.chat("Hi", **FAST)
        model.adapters.add("shared/tone", lora(model, 2))
        assert alice.chat("Hi", **FAST).plan_id == before.plan_id
        alice.attach("shared/tone")
        assert alice.chat("Hi", **FAST).plan.low_rank[0].factors != before.plan.low_rank[0].factors

    def test_everything_is_there_after_reopening(self, tmp_path, tiny):
        def open_model():
            return PersonaModel.from_pretrained(tiny, store=tmp_path / "s", embedder=HashEmbedder())

        with open_model() as model:
            alice = model.persona("alice", groups=["nurses"])
            alice.remember("Likes green tea.")
            model.adapters.add("nurses/tone", lora(model, 1))
            model.group("nurses").attach("nurses/tone")
            before = alice.chat("green tea?", **FAST)
        with open_model() as model:
            assert model.persona("alice").chat("green tea?", **FAST) == before


class TestForgetting:
    def test_forgetting_a_text_retires_the_adapter_trained_on_it(self, model):
        alice = model.persona("alice")
        text = alice.remember("I wrote this sentence.")
        other = alice.remember("Likes tea.")
        model.adapters.add("alice/voice", lora(model, 1), sources=[text])
        alice.attach("alice/voice")
        assert patches(alice.chat("Hi", **FAST)) == ["alice/voice@3"]
        assert len(model.adapters._cache)
        receipt = alice.forget(text.id)
        assert not len(model.adapters._cache)  # the weights are gone from memory too
        assert text.id in receipt.cube_ids
        assert alice.chat("Hi", **FAST).plan.parts == ()
        assert model.adapters.names("alice") == []
        assert [cube.id for cube in alice.memories()] == [other.id]
        alice.rollback(3)
        assert alice.chat("Hi", **FAST).plan.parts == ()

    def test_forgetting_by_phrase(self, model):
        alice = model.persona("alice")
        alice.remember_all(["My cat is called Tom.", "The CAT sleeps.", "I like tea."])
        receipt = alice.forget("cat")
        assert len(receipt.cube_ids) == 2
        assert [cube.text for cube in alice.memories()] == ["I like tea."]
        with pytest.raises(NotFoundError):
            alice.forget("dog")
        with pytest.raises(InvalidInputError):
            alice.forget("  ")
        assert [passage.text for passage in alice.recall("cat")] == ["I like tea."]

    def test_forget_everything(self, model):
        alice = model.persona("alice")
        alice.remember("Likes tea.")
        receipt = alice.forget_everything()
        assert receipt.verify(model.store)
        assert (alice.revision, alice.memories(), alice.history()) == (0, [], [])


class TestIsolation:
    def test_nobody_reads_or_uses_what_is_not_theirs(self, model):
        alice, bob = model.persona("alice", groups=["nurses"]), model.persona("bob")
        alice.remember("Alice's secret is green.")
        model.group("nurses").remember("Nurses meet at noon.")
        model.adapters.add("alice/voice", lora(model, 1))
        model.adapters.add("nurses/tone", lora(model, 2))
        assert {passage.owner for passage in alice.recall("secret green noon")} == {"alice", "nurses"}
        assert bob.recall("secret green noon") == []
        for name in ("alice/voice", "nurses/tone", "nobody/x"):
            with pytest.raises(NotFoundError):
                bob.attach(name)
        assert bob.revision == 0

    def test_leaving_a_group_ends_the_use_of_its_adapters(self, model):
        alice = model.persona("alice", groups=["nurses"])
        model.adapters.add("nurses/tone", lora(model, 1))
        alice.attach("nurses/tone")
        assert patches(alice.chat("Hi", **FAST)) == ["nurses/tone@1"]
        alice.join([])
        reply = alice.chat("Hi", **FAST)
        assert reply.plan.parts == ()
        assert reply.skipped == ("nurses/tone: out of reach, no longer a group",)
        assert "left out" in str(alice.explain(reply))

    def test_export_and_import_under_another_id(self, model, tmp_path):
        alice = model.persona("alice")
        alice.remember("Likes green tea.")
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice")
        archive = alice.export(tmp_path / "alice.memcube")
        twin = model.import_persona(archive, as_id="alice2")
        assert [cube.text for cube in twin.memories()] == ["Likes green tea."]
        assert patches(twin.chat("Hi", **FAST)) == ["alice2/voice@2"]
        assert twin.chat("Hi", **FAST).tokens == alice.chat("Hi", **FAST).tokens

    def test_a_member_imported_without_the_group(self, model, tmp_path):
        alice = model.persona("alice", groups=["nurses"])
        model.adapters.add("nurses/tone", lora(model, 1))
        alice.attach("nurses/tone")
        archive = alice.export(tmp_path / "alice.memcube")
        model.group("nurses").forget_everything()
        twin = model.import_persona(archive, as_id="alice2")
        assert twin.chat("Hi", **FAST).plan.parts == ()


class TestBadInput:
    @pytest.mark.parametrize("bad", ["", "a/b", "a\0", " ", "x" * 129, ".."])
    def test_ids(self, model, bad):
        for open_handle in (model.persona, model.group):
            with pytest.raises(InvalidInputError):
                open_handle(bad)

    def test_group_equal_to_user_writes_nothing(self, model):
        with pytest.raises(InvalidInputError):
            model.persona("alice", groups=["alice"])
        assert model.store.personas() == []

    @pytest.mark.parametrize("text", ["", " \n\t", "x" * 20_001])
    def test_texts(self, model, text):
        alice = model.persona("alice")
        with pytest.raises(InvalidInputError):
            alice.remember_all(["fine", text])
        assert alice.revision == 0

    def test_recall_of_nothing(self, model):
        with pytest.raises(InvalidInputError):
            model.persona("alice").recall("  ")

    @pytest.mark.parametrize("weight", [math.nan, math.inf, 11])
    def test_weights(self, model, weight):
        model.adapters.add("shared/tone", lora(model, 1))
        with pytest.raises(InvalidInputError):
            model.persona("alice").attach("shared/tone", weight=weight)
        assert model.persona("alice").revision == 0

    def test_adapter_of_another_base(self, model):
        other = tiny_language_model(seed=1)
        foreign = LoRA.from_tensors(other.fingerprint, random_factors(other, 1))
        with pytest.raises(IncompatibleAdapterError) as caught:
            model.adapters.add("shared/tone", foreign)
        assert caught.value.code == "incompatible_adapter"
        assert model.adapters.names() == []

    def test_store_of_another_base_model(self, model, tmp_path):
        model.adapters.add("shared/tone", lora(model, 1))
        model.persona("alice").attach("shared/tone")
        model.close()
        other = PersonaModel.from_pretrained(
            tiny_language_model(seed=1), store=tmp_path / "store", embedder=HashEmbedder()
        )
        with other, pytest.raises(IncompatibleAdapterError, match="shared/tone"):
            other.persona("alice").chat("Hi", **FAST)

    def test_unknown_option(self, model):
        with pytest.raises(InvalidInputError, match="max_tokens"):
            model.persona("alice").chat("Hi", max_tokens=5)

    def test_one_bad_request_stops_the_batch_before_it_runs(self, model):
        with pytest.raises(InvalidInputError):
            model.chat_batch([(None, "Hi"), (model.persona("alice"), "")], **FAST)

    def test_a_prompt_that_does_not_fit(self, model):
        turns = [
            {"role": role, "content": f"number {n} " + "word " * 40}
            for n in range(6)
            for role in ("user", "assistant")
        ][:-1]
        alice = model.persona("alice")
        with pytest.raises(PromptTooLongError, match=r"overflow") as caught:
            alice.chat(turns, **FAST)
        assert caught.value.retryable is False
        reply = alice.chat(turns, overflow="drop_oldest_turns", **FAST)
        assert reply.dropped_turns > 0
        text = model.base.tokenizer.decode(reply.prompt_tokens)
        assert "number 5" in text
        assert "number 0" not in text
        assert f"{reply.dropped_turns} oldest turns" in str(alice.explain(reply))
        with pytest.raises(PromptTooLongError):
            alice.chat("word " * 2000, overflow="drop_oldest_turns", **FAST)

    def test_every_error_is_a_persona_error_with_a_hint(self, model):
        with pytest.raises(PersonaError) as caught:
            model.adapters.get("nobody/nothing")
        assert caught.value.code == "not_found"
        assert "model.adapters.add" in caught.value.hint
