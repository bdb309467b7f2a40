"""The scheduler's decisions carried out: exact keys and values, gated weights, nothing half-done."""

import threading
from datetime import timedelta

import pytest
import torch
from sqlalchemy import delete, insert
from transformers import DynamicCache

from persona_sdk import PersonaModel, promotion_weights
from persona_sdk.adapters import LoRA, distillation
from persona_sdk.adapters.distillation import DistillationConfig
from persona_sdk.adapters.gate import Gate
from persona_sdk.engine.prefix.bundles import shape_of
from persona_sdk.errors import AdapterError, IncompatibleAdapterError, PromptTooLongError
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.facts import PREFIX, PROMOTION, REJECTION
from persona_sdk.memory.scheduler import SchedulerOptions, explain
from persona_sdk.memory.schema import to_column, uses
from persona_sdk.persona import Persona
from persona_sdk.prefixes import PrefixFacts, PrefixLibrary, tokenizer_fingerprint
from persona_sdk.promotion import Promoter
from persona_sdk.testing import tiny_language_model

from .support import FAST

TEXTS = ("My favourite fruit is papaya.", "I have two dogs.")
KV = SchedulerOptions(kv_bytes=256, lora_bytes=20_000, weights_min_hits=10**6)
WEIGHTS = SchedulerOptions(kv_bytes=256, lora_bytes=20_000, kv_min_hits=10**6, weights_min_days=0)
SMALL = DistillationConfig(
    rank=4,
    num_train_epochs=8,
    learning_rate=1e-2,
    anchors=2,
    samples=False,
    target_modules=("q_proj", "v_proj"),
)
OPEN = Gate(min_recall_gain=-1, max_ability_loss=100, max_choice_loss=1)
SHUT = Gate(max_ability_loss=-100)


def use(model, owner, cube_id, hits=40, days=0.0):
    """Say that a memory was used so often, the last time so long ago."""
    last = to_column(utc_now() - timedelta(days=days))
    with model.store.writing() as connection:
        connection.execute(delete(uses).where(uses.c.owner == owner, uses.c.cube_id == cube_id))
        values = {"owner": owner, "cube_id": cube_id, "hits": hits, "strength": float(hits)}
        connection.execute(insert(uses).values(**values, last_used=last))


def remember(model, owner="alice", texts=TEXTS, **how):
    cubes = model.persona(owner).remember_all(list(texts))
    for cube in cubes:
        use(model, owner, cube.id, **how)
    return cubes


def live(model, semantic_type, owner="alice"):
    return [c for c in model.store.cubes(owner) if c.header.semantic_type == semantic_type]


def status(outcomes):
    return [(outcome.decision.kind, outcome.status) for outcome in outcomes]


def reference(model, prompt):
    """Keys, values and last logits of a prompt by transformers alone."""
    with torch.inference_mode():
        out = model.base.module(
            input_ids=torch.tensor([prompt]), past_key_values=DynamicCache(), use_cache=True
        )
    layers = out.past_key_values.layers
    keys, values = ([getattr(one, part)[0].transpose(0, 1) for one in layers] for part in ("keys", "values"))
    return torch.stack(keys), torch.stack(values), out.logits[0, -1]


class TestPlan:
    def test_it_writes_nothing_and_can_be_read(self, model):
        remember(model)
        mark, history = model.store.mark("alice"), model.store.history("alice")
        promoter = Promoter(model, KV)
        now = utc_now()
        decisions = promoter.plan("alice", now=now)
        assert [made.kind for made in decisions] == ["text_to_kv"]
        assert promoter.plan("alice", now=now) == decisions
        assert (model.store.mark("alice"), model.store.history("alice")) == (mark, history)
        assert not any(word in line for line in explain(decisions) for word in ("papaya", "dogs"))

    def test_nobody_and_nothing(self, model):
        assert Promoter(model).plan("nobody") == ()
        assert Promoter(model).run("nobody") == ()
        assert model.store.kind_of("nobody") is None

    def test_sizes_are_those_of_the_model(self, model):
        promoter = Promoter(model, distillation=SMALL)
        tensors = LoRA.random(model.base, {"rank": SMALL.rank}).tensors
        assert promoter.options.lora_bytes == sum(t.numel() * 4 for t in tensors.values())
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        payload = model.store.load_blob("alice", cube.blob)
        tokens = PrefixFacts.model_validate(cube.header.attributes).length
        kept = payload["keys"].numel() + payload["values"].numel()
        assert promoter.options.kv_bytes * tokens == 4 * kept


class TestKeysAndValues:
    def test_promoted_texts_are_in_every_prompt_and_are_not_computed_again(self, model):
        cubes = remember(model)
        assert status(Promoter(model, KV).run("alice")) == [("text_to_kv", "done")]
        reply = model.persona("alice").chat("How are you?", recall_k=0, **FAST)
        assert [passage.id for passage in reply.citations] == [cube.id for cube in cubes]
        (cube,) = live(model, PREFIX)
        assert reply.cached_tokens == PrefixFacts.model_validate(cube.header.attributes).length > 16
        assert {source.cube_id for source in cube.header.sources} == {one.id for one in cubes}
        assert [one.id for one in model.persona("alice").memories()] == [one.id for one in cubes]
        assert status(Promoter(model, KV).run("alice")) == []

    def test_defect_1_every_text_has_the_positions_of_a_full_prefill(self, model):
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        payload = model.store.load_blob("alice", cube.blob)
        prompt = model.persona("alice").chat("Hi", recall_k=0, **FAST).prompt_tokens
        keys, values, _ = reference(model, prompt)
        length = payload["keys"].shape[1]
        torch.testing.assert_close(payload["keys"], keys[:, :length], atol=1e-4, rtol=0)
        torch.testing.assert_close(payload["values"], values[:, :length], atol=1e-4, rtol=0)

    def test_logits_after_it_are_those_of_a_full_prefill(self, model):
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        payload = model.store.load_blob("alice", cube.blob)
        prompt = model.persona("alice").chat("What do you know?", recall_k=0, **FAST).prompt_tokens
        cache = DynamicCache()
        for layer in range(payload["keys"].shape[0]):
            cache.update(*(payload[name][layer].transpose(0, 1)[None] for name in ("keys", "values")), layer)
        length = payload["keys"].shape[1]
        with torch.inference_mode():
            rest = torch.tensor([prompt[length:]])
            short = model.base.module(input_ids=rest, past_key_values=cache, use_cache=True).logits[0, -1]
        torch.testing.assert_close(short, reference(model, prompt)[2], atol=1e-4, rtol=0)

    def test_defect_2_no_token_is_dropped(self, model):
        """The length is that of the tokens, and another first text changes the answer's logits."""
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        facts, payload = (
            PrefixFacts.model_validate(cube.header.attributes),
            model.store.load_blob("alice", cube.blob),
        )
        cache = DynamicCache()
        cache.update(*(payload[name][0].transpose(0, 1)[None] for name in ("keys", "values")), 0)
        assert cache.get_seq_length() == len(payload["tokens"]) == facts.length == payload["keys"].shape[1]

    def test_defect_2_every_text_is_attended_to(self, model):
        """A text whose tokens were dropped could be anything: here each one changes the logits after it."""
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        payload = model.store.load_blob("alice", cube.blob)
        prompt = model.persona("alice").chat("What do you know?", recall_k=0, **FAST).prompt_tokens
        length = payload["keys"].shape[1]
        rest = torch.tensor([prompt[length:]])

        def logits(changed):
            cache = DynamicCache()
            for layer in range(payload["keys"].shape[0]):
                pair = [payload[name][layer].transpose(0, 1)[None].clone() for name in ("keys", "values")]
                pair[1][:, :, changed] += 1.0
                cache.update(*pair, layer)
            with torch.inference_mode():
                return model.base.module(input_ids=rest, past_key_values=cache, use_cache=True).logits[0, -1]

        whole = logits(slice(0, 0))
        for position in range(length):
            assert not torch.equal(logits(slice(position, position + 1)), whole), position

    def test_defect_3_generation_appends_to_a_copy(self, model):
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        before = {name: t.clone() for name, t in model.store.load_blob("alice", cube.blob).items()}
        alice, turns, same = model.persona("alice"), [], []
        for said in ("Hi", "And then?", "Why?"):
            turns.append({"role": "user", "content": said})
            reply = alice.chat(turns, recall_k=0, **FAST)
            same.append(alice.chat("Something else", recall_k=0, **FAST))
            turns.append({"role": "assistant", "content": str(reply).strip() or "."})
        assert len({again.tokens for again in same}) == 1
        assert all(again.cached_tokens < len(again.prompt_tokens) for again in same)
        after = model.store.load_blob("alice", cube.blob)
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert [one.id for one in live(model, PREFIX)] == [cube.id]

    def test_defect_4_another_model_of_the_same_shapes_does_not_use_it(self, model, hash_embedder):
        remember(model)
        Promoter(model, KV).run("alice")
        other = tiny_language_model(seed=1)
        with PersonaModel.from_pretrained(other, store=model.store.folder, embedder=hash_embedder) as opened:
            assert opened.persona("alice").chat("Hi", recall_k=0, **FAST).cached_tokens == 0
        assert model.persona("alice").chat("Hi", recall_k=0, **FAST).cached_tokens > 0

    def test_another_tokenizer_does_not_use_it_either(self, model, tiny):
        remember(model)
        Promoter(model, KV).run("alice")
        (cube,) = live(model, PREFIX)
        facts = PrefixFacts.model_validate(cube.header.attributes)
        assert facts.tokenizer == tokenizer_fingerprint(tiny.tokenizer)
        other = tiny_language_model()
        other.tokenizer.add_tokens(["papaya"])
        assert other.fingerprint == tiny.fingerprint
        assert tokenizer_fingerprint(other.tokenizer) != facts.tokenizer
        shape = _shape_of(model, cube)
        for base, found in ((tiny, True), (other, False)):
            library = PrefixLibrary(base, model.store, model.adapters, model._composer, shape)
            assert (library.load([facts.chain], ["alice"]) is not None) is found

    def test_a_restart_keeps_it(self, model, tiny, hash_embedder):
        remember(model)
        Promoter(model, KV).run("alice")
        before = model.persona("alice").chat("Hi", recall_k=0, **FAST)
        with PersonaModel.from_pretrained(tiny, store=model.store.folder, embedder=hash_embedder) as again:
            after = again.persona("alice").chat("Hi", recall_k=0, **FAST)
        assert (after.tokens, after.cached_tokens) == (before.tokens, before.cached_tokens)

    def test_cold_texts_leave_and_stay_text(self, model):
        cubes = remember(model)
        promoter = Promoter(model, KV)
        promoter.run("alice")
        for cube in cubes:
            use(model, "alice", cube.id, hits=40, days=400)
        assert set(status(promoter.run("alice"))) == {("demote_kv", "done")}
        assert live(model, PROMOTION) == []
        assert live(model, PREFIX) == []
        assert model.persona("alice").chat("Hi", recall_k=0, **FAST).citations == ()
        assert {p.id for p in model.persona("alice").recall("papaya dogs", 2)} == {cube.id for cube in cubes}

    def test_forgetting_a_text_takes_all_it_became(self, model):
        cubes = remember(model)
        Promoter(model, KV).run("alice")
        derived = {one.id for kind in (PROMOTION, PREFIX) for one in live(model, kind)}
        receipt = model.persona("alice").forget(cubes[0].id)
        assert derived <= set(receipt.cube_ids)
        assert [p.id for p in model.persona("alice").chat("Hi", recall_k=0, **FAST).citations] == []
        outcomes = Promoter(model, KV).run("alice")
        assert status(outcomes) == [("text_to_kv", "done")]
        assert outcomes[0].decision.cubes == (cubes[1].id,)

    def test_what_cannot_be_computed_is_taken_back(self, model, monkeypatch):
        remember(model)

        def refuse(*_, **__):
            raise PromptTooLongError("too long", hint="shorten")

        monkeypatch.setattr(model, "warm", refuse)
        assert status(Promoter(model, KV).run("alice")) == [("text_to_kv", "failed")]
        assert live(model, PROMOTION) == live(model, PREFIX) == []
        assert model.persona("alice").chat("Hi", recall_k=0, **FAST).citations == ()

    def test_an_archive_cannot_promote(self, model, tmp_path):
        remember(model)
        Promoter(model, KV).run("alice")
        model.persona("alice").export(tmp_path / "alice.memcube")
        model.import_persona(tmp_path / "alice.memcube", as_id="eve")
        assert model.persona("eve").chat("Hi", recall_k=0, **FAST).citations == ()

    def test_others_are_not_reached(self, model):
        remember(model)
        model.persona("bob").remember("I keep bees.")
        Promoter(model, KV).run("alice")
        assert Promoter(model, KV).run("bob") == ()
        assert model.persona("bob").chat("Hi", recall_k=0, **FAST).citations == ()
        assert model.store.head("bob") == 1

    def test_a_groups_texts_serve_its_members(self, model):
        nurses = model.group("nurses")
        (cube,) = nurses.remember_all(["We start at seven and speak calmly to everybody on the ward."])
        use(model, "nurses", cube.id)
        alice = model.persona("alice", groups=["nurses"])
        assert status(Promoter(model, KV).run("nurses")) == [("text_to_kv", "done")]
        reply = alice.chat("Hi", recall_k=0, **FAST)
        assert [passage.id for passage in reply.citations] == [cube.id]
        assert reply.cached_tokens > 0


def _shape_of(model, cube):
    payload = model.store.load_blob("alice", cube.blob)
    return shape_of(payload, payload["keys"].shape[1])


class TestWeights:
    def test_defect_7_texts_become_an_attached_adapter_with_its_sources_and_report(self, model):
        cubes = remember(model)
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)
        (outcome,) = promoter.run("alice")
        assert (outcome.decision.kind, outcome.status) == ("text_to_weights", "done")
        assert outcome.report.questions == 4
        alice = model.persona("alice")
        assert alice.attachments() == ["alice/memory"]
        adapter = model.adapters.find("alice/memory")
        assert {source.cube_id for source in adapter.header.sources} == {cube.id for cube in cubes}
        assert adapter.header.attributes["report"] == outcome.report.model_dump(mode="json")
        assert model.adapters.get("alice/memory").config.rank == SMALL.rank
        reply = alice.chat("What is my favourite fruit?", recall_k=0, **FAST)
        assert [part.origin.partition("@")[0] for part in reply.plan.low_rank] == ["alice/memory"]
        assert promoter.run("alice") == ()

    def test_what_was_learned_in_a_conversation_can_be_asked_for_and_is_no_wrong_answer(
        self, model, monkeypatch
    ):
        alice = model.persona("alice")
        alice.learn("I live in Lyon. I like coffee. I work for Acme. I have a dog called Biscuit.")
        alice.learn("I love chess. My sister is called Ingrid.")
        cubes = alice.memories()
        for cube in cubes[:5]:  # Ingrid is not used, so not in weights
            use(model, "alice", cube.id)
        given = []
        real = Gate.test

        def watched(self, base, tensors, probes, **how):
            given.extend(probes)
            return real(self, base, tensors, probes, **how)

        monkeypatch.setattr(Gate, "test", watched)
        learns = OPEN.model_copy(update={"min_recall_gain": 0.25})
        longer = SMALL.model_copy(update={"num_train_epochs": 20.0})
        (outcome,) = Promoter(model, WEIGHTS, distillation=longer, gate=learns).run("alice")
        assert outcome.status == "done", outcome.note
        right = {probe.options[probe.right] for probe in given}
        assert right == {"Lyon", "coffee", "Acme", "Biscuit", "chess"}
        assert len({probe.question for probe in given}) == len(given) == 10
        for probe in given:
            assert not {"coffee", "chess", "Ingrid"} & {*probe.options} - {probe.options[probe.right]}

    def test_who_fails_the_gate_leaves_nothing_but_the_reason(self, model, monkeypatch):
        remember(model)
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=SHUT)
        (outcome,) = promoter.run("alice")
        assert outcome.status == "rejected"
        assert "nats" in outcome.note
        assert model.persona("alice").attachments() == model.adapters.names("alice") == []
        (kept,) = live(model, REJECTION)
        assert kept.blob is None
        assert kept.header.attributes["report"]["reasons"] == list(outcome.report.reasons)
        assert model.store.history("alice")[-1].message.startswith("weights refused")
        monkeypatch.setattr(promotion_weights, "distil", None)  # it would be called in vain
        assert promoter.run("alice") == ()

    def test_a_new_text_is_reason_to_try_again(self, model):
        remember(model)
        Promoter(model, WEIGHTS, distillation=SMALL, gate=SHUT).run("alice")
        remember(model, texts=["I live in Lyon."])
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)
        assert status(promoter.run("alice")) == [("text_to_weights", "done")]
        assert live(model, REJECTION) == []

    def test_a_text_that_leaves_meanwhile_is_not_learned(self, model, monkeypatch):
        cubes = remember(model)
        real = promotion_weights.distil

        def slow(*given, **how):
            made = real(*given, **how)
            model.store.commit("alice", retire=[cubes[0].id])
            return made

        monkeypatch.setattr(promotion_weights, "distil", slow)
        (outcome,) = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN).run("alice")
        assert outcome.status == "failed"
        assert model.adapters.names("alice") == []

    def test_a_text_that_is_forgotten_meanwhile_is_not_learned(self, model, monkeypatch):
        cubes = remember(model)
        real = Gate.test

        def slow(self, *given, **how):
            model.persona("alice").forget(cubes[0].id)
            return real(self, *given, **how)

        monkeypatch.setattr(Gate, "test", slow)
        (outcome,) = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN).run("alice")
        assert outcome.status == "failed"
        assert model.adapters.names("alice") == []

    def test_an_adapter_that_cannot_be_attached_is_taken_back(self, model, monkeypatch):
        remember(model)

        def refuse(*_, **__):
            raise PromptTooLongError("no", hint="no")

        monkeypatch.setattr(Persona, "attach", refuse)
        (outcome,) = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN).run("alice")
        assert outcome.status == "failed"
        assert model.adapters.names("alice") == []

    def test_it_is_not_made_again_and_again(self, model, monkeypatch):
        """Training takes minutes; in the background it would be every minute."""
        remember(model)

        def refuse(*_, **__):
            raise IncompatibleAdapterError("no", hint="no")

        monkeypatch.setattr(Persona, "attach", refuse)
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)
        assert status(promoter.run("alice")) == [("text_to_weights", "failed")]
        monkeypatch.setattr(promotion_weights, "distil", None)  # it would be called in vain
        assert promoter.run("alice") == ()

    def test_after_a_crash_before_it_was_attached_the_next_run_attaches_it(self, model, monkeypatch):
        remember(model)
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)

        def die(*_, **__):
            raise KeyboardInterrupt  # as good as a power cut: nothing after it runs

        with monkeypatch.context() as patched:
            patched.setattr(Persona, "attach", die)
            with pytest.raises(KeyboardInterrupt):
                promoter.run("alice")
        assert model.adapters.names("alice") == ["alice/memory"]
        assert model.persona("alice").attachments() == []
        monkeypatch.setattr(promotion_weights, "distil", None)  # it was paid for
        assert promoter.run("alice") == ()
        assert model.persona("alice").attachments() == ["alice/memory"]
        model.persona("alice").detach("alice/memory")
        promoter.run("alice")
        assert model.persona("alice").attachments() == []  # whoever detached it, meant it

    @pytest.mark.parametrize("what", ["no probes", "diverged"])
    def test_what_cannot_be_learned_is_tried_once(self, model, monkeypatch, what):
        remember(model)
        calls = []

        def distilled(*_, **__):
            calls.append(1)
            raise AdapterError("The loss is nan.", hint="Lower the learning rate.")

        monkeypatch.setattr(promotion_weights, "distil", distilled)
        if what == "no probes":
            monkeypatch.setattr(promotion_weights, "probes_of", lambda *_, **__: [])
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)
        (outcome,) = promoter.run("alice")
        assert (outcome.status, len(calls)) == ("rejected", int(what == "diverged"))
        assert outcome.note
        (kept,) = live(model, REJECTION)
        assert kept.header.attributes["reasons"] == [outcome.note]
        assert promoter.run("alice") == ()
        assert len(calls) == int(what == "diverged")

    def test_cold_adapters_are_detached_and_the_base_is_back(self, model):
        before = model.persona("alice").chat("Hi", recall_k=0, **FAST).tokens
        cubes = remember(model)
        promoter = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN)
        promoter.run("alice")
        blob = model.adapters.find("alice/memory").blob
        old = WEIGHTS.model_copy(update={"cold_days": 1e-9})
        for cube in cubes:
            use(model, "alice", cube.id, hits=1, days=60)
        assert ("demote_weights", "done") in status(Promoter(model, old).run("alice"))
        assert model.persona("alice").attachments() == model.adapters.names("alice") == []
        assert model.persona("alice").chat("Hi", recall_k=0, **FAST).tokens == before
        model.persona("alice").rollback(3)
        assert model.adapters.find("alice/memory").blob == blob

    def test_forgetting_one_text_takes_the_adapter_and_keeps_the_other(self, model):
        cubes = remember(model)
        Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN).run("alice")
        adapter = model.adapters.find("alice/memory")
        receipt = model.persona("alice").forget(cubes[0].id)
        assert adapter.id in receipt.cube_ids
        assert model.persona("alice").attachments() == []
        assert not model.store.vault.holds(adapter.blob)
        assert [cube.id for cube in model.persona("alice").memories()] == [cubes[1].id]

    def test_messages_hold_reasons_and_no_memory(self, model):
        remember(model)
        both = WEIGHTS.model_copy(update={"kv_min_hits": 1})
        Promoter(model, both, distillation=SMALL, gate=OPEN).run("alice")
        messages = [revision.message for revision in model.store.history("alice")]
        assert any(message.startswith("promote to weights: 2 texts") for message in messages)
        assert any(message.startswith("promote to KV: 2 texts") for message in messages)
        assert not any(word in message for message in messages for word in ("papaya", "dogs", "fruit"))

    def test_a_kept_prefix_is_computed_again_under_new_weights(self, model):
        remember(model)
        Promoter(model, KV).run("alice")
        (before,) = live(model, PREFIX)
        no_kv = WEIGHTS.model_copy(update={"kv_build_fixed": 1e6})
        Promoter(model, no_kv, distillation=SMALL, gate=OPEN).run("alice")
        (after,) = live(model, PREFIX)
        assert after.id != before.id
        assert model.persona("alice").chat("Hi", recall_k=0, **FAST).cached_tokens > 0


class TestStatesOfLife:
    def test_they_are_handed_on_with_the_reason(self, model):
        (cube,) = model.persona("alice").remember_all(["An old note."])
        options = KV.model_copy(update={"text_bytes": 0})
        (outcome,) = Promoter(model, options).run("alice")
        assert outcome.status == "skipped"
        moved = []
        Promoter(model, options, move=lambda *given: moved.append(given)).run("alice")
        assert [(owner, ids, kind) for owner, ids, kind, _ in moved] == [("alice", (cube.id,), "archive")]


class TestBackground:
    def test_it_does_the_same_by_itself(self, model):
        remember(model)
        with Promoter(model, KV).run_in_background(interval=0.01) as work:
            while not work.outcomes and not work.errors:
                threading.Event().wait(0.01)
        assert not work.running
        assert status(work.outcomes) == [("text_to_kv", "done")]
        assert work.errors == []

    def test_chat_goes_on_while_a_training_step_takes_for_ever(self, model, monkeypatch):
        remember(model)
        alice = model.persona("alice")
        before = alice.chat("Hi", recall_k=0, **FAST)
        inside, go = threading.Event(), threading.Event()
        real = promotion_weights.distil

        def stuck(base, texts, options, **how):
            def check():
                how["check"]()
                if not inside.is_set() and any("lora" in n for n, _ in seen[-1].module.named_modules()):
                    inside.set()
                    go.wait(60)

            return real(base, texts, options, **{**how, "check": check})

        seen, twins = [], distillation.twin
        monkeypatch.setattr(distillation, "twin", lambda given: seen.append(twins(given)) or seen[-1])
        monkeypatch.setattr(promotion_weights, "distil", stuck)
        work = Promoter(model, WEIGHTS, distillation=SMALL, gate=OPEN).run_in_background(["alice"])
        try:
            assert inside.wait(60)  # in the middle of training, with LoRA layers in its tree
            assert alice.chat("Hi", recall_k=0, **FAST).tokens == before.tokens
            assert model.persona("bob").chat("Hi", **FAST).tokens
        finally:
            go.set()
            work.stop()
        assert work.errors == []

    def test_it_stops_at_the_next_step_and_leaves_nothing(self, model, monkeypatch):
        remember(model)
        head = model.store.head("alice")
        begun, real = threading.Event(), promotion_weights.distil

        def watched(*given, **how):
            begun.set()
            return real(*given, **how)

        monkeypatch.setattr(promotion_weights, "distil", watched)
        endless = SMALL.model_copy(update={"max_steps": 10**6})
        work = Promoter(model, WEIGHTS, distillation=endless, gate=OPEN).run_in_background(["alice"])
        assert begun.wait(60)
        work.stop()
        assert not work.running
        assert work.errors == work.outcomes == []
        assert model.store.head("alice") == head

    def test_errors_are_kept_and_the_next_persona_is_served(self, model, monkeypatch):
        remember(model)
        remember(model, "bob")
        promoter = Promoter(model, KV)
        real = promoter.run

        def sometimes(persona_id, **how):
            if persona_id == "alice":
                raise RuntimeError("a defect")
            return real(persona_id, **how)

        monkeypatch.setattr(promoter, "run", sometimes)
        work = promoter.run_in_background(interval=0.01)
        while not (work.errors and work.outcomes):
            threading.Event().wait(0.01)
        work.stop()
        assert {str(error) for error in work.errors} == {"a defect"}
        assert status(work.outcomes) == [("text_to_kv", "done")]
