"""Pinned memories and the prefix they make: stored, found again after a restart, gone when forgotten."""

from dataclasses import replace
from datetime import timedelta

import pytest
import torch
from transformers import DynamicCache

from persona_sdk import PersonaModel
from persona_sdk.compose import PINNED, ChatOptions
from persona_sdk.engine.prefix.bundles import KVShape
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.errors import PromptTooLongError, RevisionConflictError
from persona_sdk.memory import CubeDraft, CubeHeader
from persona_sdk.memory.cube import utc_now
from persona_sdk.prefixes import PrefixFacts, PrefixLibrary
from persona_sdk.tensors import PREFIX
from persona_sdk.testing import tiny_language_model

from .engine.support import merged
from .support import lora

SHAPE = KVShape(layers=2, kv_heads=2, key_dim=8, value_dim=8, dtype=torch.float32)
LIKES = "Alice likes short answers and metric units, and walks two dogs every morning."
QUIET = "She reads on the train and asks not to be called before nine."


def pin(model, owner, text, *, kind="user", **header):
    draft = CubeDraft(
        text=text,
        header=CubeHeader(attributes=PINNED, **header),
        vector=model.embedder.encode([text])[0],
        encoder=model.embedder.fingerprint,
    )
    return model.store.commit(owner, kind=kind, add=[draft]).added[0]


def compose(model, owner, said, **options):
    return model._composer.compose(owner, said, ChatOptions(**{"max_new_tokens": 8, **options}))


class Reference:
    """Forward passes by transformers alone: a prefix's keys and values, and greedy tokens after them."""

    def __init__(self, base):
        self.base = base
        self.calls = 0

    def _run(self, request, tokens, cache, soft):
        model = merged(self.base, [(request.tensors[p.factors], p.gate) for p in request.plan.low_rank])
        embed = model.module.get_input_embeddings()
        inputs = torch.cat([*soft, embed(torch.tensor(tokens))])[None]
        return model.module(inputs_embeds=inputs, past_key_values=cache, use_cache=True)

    @torch.inference_mode()
    def __call__(self, request):
        self.calls += 1
        parts = [part for part in request.plan.parts if part.kind == "soft_prefix"]
        soft = [request.tensors[part.vectors][PREFIX] for part in parts]
        cache = self._run(request, request.prompt, DynamicCache(), soft).past_key_values
        stacked = [(layer.keys[0].transpose(0, 1), layer.values[0].transpose(0, 1)) for layer in cache.layers]
        return {
            "keys": torch.stack([keys for keys, _ in stacked]),
            "values": torch.stack([values for _, values in stacked]),
        }

    @torch.inference_mode()
    def logits(self, composition, bundle=None, kept=0):
        cache = DynamicCache()
        for layer in range(0 if bundle is None else SHAPE.layers):
            cache.update(*(bundle[name][layer].transpose(0, 1)[None] for name in ("keys", "values")), layer)
        return self._run(composition, composition.prompt[kept:], cache, []).logits[0, -1]


class Served:
    """What the facade will hold: a cache over the store's prefixes."""

    def __init__(self, model):
        self.model = model
        self.compute = Reference(model.base)
        self.library = PrefixLibrary(model.base, model.store, model.adapters, model._composer, SHAPE)
        self.cache = PrefixCache(1 << 24, shape=SHAPE, spill=self.library)
        model.store.on_forget(self.cache.forget)

    def warm(self, owner="alice", **options):
        return self.library.warm(owner, self.compute, **options)

    def lookup(self, owner="alice", said="Hi", **options):
        made = compose(self.model, owner, said, **options)
        return made, self.cache.lookup(made.plan, made.prompt, tuple(made.revisions))


@pytest.fixture
def served(model):
    return Served(model)


def live(model, owner="alice"):
    return model.store.cubes(owner, kind="activation")


class TestPinned:
    def test_they_are_in_every_prompt_oldest_first_before_what_is_recalled(self, model):
        alice = model.persona("alice")
        pin(model, "alice", QUIET)
        alice.remember("Her dogs are called Rex and Lux.")
        pin(model, "alice", LIKES)
        made = compose(model, "alice", "What are the dogs called, Rex and Lux?")
        text = model.base.tokenizer.decode(made.prompt)
        places = [text.index(part) for part in (QUIET, LIKES, "Rex and Lux")]
        assert places == sorted(places)
        assert [p.text for p in made.passages] == [QUIET, LIKES, "Her dogs are called Rex and Lux."]
        assert [p.score for p in made.passages[:2]] == [1.0, 1.0]
        assert [p.text for p in compose(model, "alice", "x", recall_k=0).passages] == [QUIET, LIKES]

    def test_none_is_repeated_and_none_takes_the_place_of_a_recalled_one(self, model):
        alice = model.persona("alice")
        pin(model, "alice", "green tea at noon")
        pin(model, "alice", "green tea at nine")
        alice.remember("green tea")
        made = compose(model, "alice", "green tea at noon", recall_k=1)
        texts = [p.text for p in made.passages]
        assert texts == ["green tea at noon", "green tea at nine", "green tea"]
        (part,) = made.plan.of(type(made.plan.parts[-1]))
        assert [item.cube_id for item in part.items] == [p.id for p in made.passages]
        assert model.base.tokenizer.decode(made.prompt).count("green tea at noon") == 2  # and the question

    def test_groups_come_first_and_strangers_see_none(self, model):
        model.persona("alice", groups=["nurses"])
        pin(model, "alice", LIKES)
        pin(model, "nurses", QUIET, kind="group")
        assert [p.text for p in compose(model, "alice", "Hi").passages] == [QUIET, LIKES]
        assert compose(model, "bob", "Hi").passages == ()
        assert compose(model, None, "Hi").passages == ()

    def test_time_rollback_and_forgetting_end_them(self, model):
        soon = utc_now() + timedelta(seconds=3600)
        pin(model, "alice", LIKES)
        pin(model, "alice", QUIET, expires_at=utc_now() - timedelta(seconds=1))
        pin(model, "alice", "Lives in Bonn.", expires_at=soon)
        alice = model.persona("alice")
        assert [p.text for p in compose(model, "alice", "Hi").passages] == [LIKES, "Lives in Bonn."]
        alice.rollback(1)
        assert [p.text for p in compose(model, "alice", "Hi").passages] == [LIKES]
        alice.forget("metric units")
        assert compose(model, "alice", "Hi").passages == ()

    def test_too_many_to_fit_are_said_so(self, model):
        pin(model, "alice", "word " * 2000)
        with pytest.raises(PromptTooLongError) as caught:
            compose(model, "alice", "Hi", overflow="drop_oldest_turns")
        assert "1 pinned memories are always in it" in caught.value.hint


class TestWarm:
    def test_what_is_committed(self, model, served):
        pinned = pin(model, "alice", LIKES)
        model.adapters.add("alice/voice", lora(model, 1))
        attachment = model.persona("alice").attach("alice/voice").added[0]
        cube = served.warm()
        assert (cube.kind, cube.header.semantic_type, cube.header.trust) == (
            "activation",
            "prefix_kv",
            "system",
        )
        adapter = model.adapters.find("alice/voice").id
        assert {source.cube_id for source in cube.header.sources} == {pinned, attachment, adapter}
        facts = PrefixFacts.model_validate(cube.header.attributes)
        payload = model.store.load_blob("alice", cube.blob)
        assert payload["keys"].shape == payload["values"].shape == (2, facts.length, 2, 8)
        tokens = payload["tokens"].tolist()
        assert facts.length == len(tokens) > 16
        assert tuple(tokens) == compose(model, "alice", "Anything at all?").prompt[: len(tokens)]
        assert "metric units" in model.base.tokenizer.decode(tokens)

    def test_again_does_nothing_until_something_changes(self, model, served):
        alice = model.persona("alice")
        pin(model, "alice", LIKES)
        first = served.warm()
        before = alice.history()
        assert served.warm().id == first.id
        assert (alice.history(), served.compute.calls) == (before, 1)
        pin(model, "alice", QUIET)
        second = served.warm()
        assert alice.history()[-1].retired == (first.id,)
        assert [cube.id for cube in live(model)] == [second.id]

    def test_prefixes_of_different_system_messages_stand_side_by_side(self, model, served):
        pin(model, "alice", LIKES)
        served.warm()
        served.warm(system="You answer in rhymes.")
        assert len(live(model)) == 2
        turns = [{"role": "system", "content": "You answer in rhymes."}, {"role": "user", "content": "Hi"}]
        assert served.lookup(said=turns)[1].tokens > served.lookup()[1].tokens

    def test_nothing_stable_is_nothing_to_keep(self, model, served):
        model.persona("alice").remember("Likes tea.")
        assert served.warm() is None
        assert served.warm("nobody") is None
        assert model.store.kind_of("nobody") is None

    def test_of_a_group_and_its_members(self, model, served):
        alice = model.persona("alice", groups=["nurses"])
        text = pin(model, "nurses", LIKES, kind="group")
        cube = served.warm("nurses", kind="group")
        assert served.lookup("alice")[1].tokens == served.lookup("nurses")[1].tokens > 0  # the same plan
        alice.join([])
        assert served.lookup("alice")[1] is None
        alice.join(["nurses"])
        own = served.warm("alice")
        receipt = model.store.forget("nurses", [text])
        assert {cube.id, own.id} <= set(receipt.cube_ids)
        assert live(model) == []

    def test_what_changes_while_it_is_computed_is_computed_again(self, model, served):
        pin(model, "alice", LIKES)

        def disturbed(request):
            if served.compute.calls == 0:
                pin(model, "alice", QUIET)
            return served.compute(request)

        cube = served.library.warm("alice", disturbed)
        assert served.compute.calls == 2
        assert QUIET[:30] in model.base.tokenizer.decode(model.store.load_blob("alice", cube.blob)["tokens"])

    def test_what_is_forgotten_while_it_is_computed_is_not_kept(self, model, served):
        pin(model, "alice", LIKES)
        pin(model, "nurses", QUIET, kind="group")
        model.persona("alice", groups=["nurses"])

        def disturbed(request):
            if served.compute.calls == 0:
                model.group("nurses").forget("train")  # alice's own revision stays
            return served.compute(request)

        cube = served.library.warm("alice", disturbed)
        assert QUIET[:30] not in model.base.tokenizer.decode(
            model.store.load_blob("alice", cube.blob)["tokens"]
        )

    def test_what_changes_nothing_of_the_prefix_is_not_computed_again(self, model, served):
        pin(model, "alice", LIKES)

        def disturbed(request):
            model.persona("alice").remember("One more thing.")
            return served.compute(request)

        assert served.library.warm("alice", disturbed) is not None
        assert served.compute.calls == 1

    def test_a_persona_that_never_rests(self, model, served):
        pin(model, "alice", LIKES)

        def disturbed(request):
            pin(model, "alice", f"Fact number {served.compute.calls} of very many.")
            return served.compute(request)

        with pytest.raises(RevisionConflictError):
            served.library.warm("alice", disturbed)
        assert live(model) == []


class TestReuse:
    def test_a_kept_prefix_gives_what_the_whole_prompt_gives(self, model, served):
        pin(model, "alice", LIKES)
        model.adapters.add("alice/voice", lora(model, 1))
        model.persona("alice").attach("alice/voice", weight=0.5)
        served.warm()
        for said in ("Hi", "How warm is eighty degrees?"):
            made, hit = served.lookup(said=said)
            with hit:
                short = served.compute.logits(made, hit.bundle, hit.tokens)
            torch.testing.assert_close(short, served.compute.logits(made), atol=1e-4, rtol=0)

    def test_it_is_found_after_a_restart_and_nothing_is_written(self, model, served, tiny, hash_embedder):
        pin(model, "alice", LIKES)
        cube = served.warm()
        length = PrefixFacts.model_validate(cube.header.attributes).length
        with PersonaModel.from_pretrained(tiny, store=model.store.folder, embedder=hash_embedder) as again:
            fresh = Served(again)
            head = again.store.head("alice")
            for _ in range(2):
                assert fresh.lookup()[1].tokens == length
            stats = fresh.cache.stats()
            assert (stats.loaded, stats.hits, stats.entries) == (1, 2, 1)
            assert again.store.head("alice") == head
        again = model.persona("alice")
        again.remember("Has a new bicycle.")
        assert served.lookup(said="What about the bicycle?")[1].tokens == length

    def test_an_older_prefix_serves_until_it_is_warmed_again(self, model, served):
        pin(model, "alice", LIKES)
        served.warm()
        pin(model, "alice", QUIET)
        first = served.lookup()[1].tokens
        served.warm()
        assert served.lookup()[1].tokens > first > 0

    def test_another_composition_never_finds_it(self, model, served):
        alice = model.persona("alice")
        pin(model, "alice", LIKES)
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice", weight=0.5)
        cube = served.warm()
        assert served.lookup()[1] is not None
        alice.attach("alice/voice", weight=0.75)
        assert served.lookup()[1] is None
        model.adapters.add("alice/voice", lora(model, 2))
        alice.attach("alice/voice", weight=0.5)
        assert served.lookup()[1] is None
        second = served.warm()
        assert [one.id for one in live(model)] == [second.id] != [cube.id]
        assert served.lookup()[1] is not None
        alice.rollback(4)  # the state in which the first one was made
        assert [one.id for one in live(model)] == [cube.id]
        assert served.lookup()[1] is not None

    def test_nobody_elses_cube_is_read(self, model, served):
        """Two personas with the very same texts and adapters: each has its own, or none."""
        for owner in ("alice", "bob"):
            pin(model, owner, LIKES)
        served.warm("alice")
        assert served.lookup("bob")[1] is None
        assert served.lookup("alice")[1] is not None
        made = compose(model, "bob", "Hi")
        assert made.prompt == compose(model, "alice", "Hi").prompt
        model.persona("alice").forget(LIKES)
        served.warm("bob")
        assert served.lookup("bob")[1] is not None

    def test_another_base_model_finds_nothing(self, model, served, hash_embedder):
        pin(model, "alice", LIKES)
        served.warm()
        other = tiny_language_model(seed=1)
        with PersonaModel.from_pretrained(other, store=model.store.folder, embedder=hash_embedder) as opened:
            assert Served(opened).lookup()[1] is None

    def test_another_precision_or_block_size_finds_nothing(self, model, served):
        pin(model, "alice", LIKES)
        served.warm()
        made = compose(model, "alice", "Hi")
        args = (model.base, model.store, model.adapters, model._composer)
        for library, block in [
            (PrefixLibrary(*args, replace(SHAPE, dtype=torch.bfloat16)), 16),
            (PrefixLibrary(*args, SHAPE, "bfloat16"), 16),
            (PrefixLibrary(*args, SHAPE, block=8), 8),
        ]:
            cache = PrefixCache(1 << 24, block=block, spill=library)
            assert cache.lookup(made.plan, made.prompt, ["alice"]) is None

    def test_an_archives_prefix_is_not_believed(self, model, served, tmp_path):
        pin(model, "alice", LIKES)
        served.warm()
        model.persona("alice").export(tmp_path / "alice.memcube")
        model.import_persona(tmp_path / "alice.memcube", as_id="eve")
        (imported,) = live(model, "eve")
        assert served.lookup("eve")[1] is None
        fresh = served.warm("eve")
        assert [one.id for one in live(model, "eve")] == [fresh.id] != [imported.id]
        assert served.lookup("eve")[1] is not None

    def test_a_damaged_blob_is_a_miss(self, model, served):
        pin(model, "alice", LIKES)
        cube = served.warm()
        file = model.store.vault.path(cube.blob)
        file.write_bytes(file.read_bytes()[:-9] + b"damaged!!")
        assert served.lookup()[1] is None

    def test_a_header_that_lies_about_the_tokens_is_a_miss(self, model, served):
        pin(model, "alice", LIKES)
        cube = served.warm()
        payload = dict(model.store.load_blob("alice", cube.blob))
        payload["tokens"] = payload["tokens"] + 1
        model.store.commit(
            "alice",
            retire=[cube.id],
            add=[CubeDraft(kind="activation", payload=payload, header=cube.header)],
        )
        assert served.lookup()[1] is None


class TestForget:
    def test_forgetting_a_pinned_text_takes_the_prefix_with_it(self, model, served):
        pin(model, "alice", LIKES)
        cube = served.warm()
        made, hit = served.lookup()
        hit.release()
        kept = hit.bundle["keys"]
        assert kept.any()
        receipt = model.persona("alice").forget("metric units")
        assert cube.id in receipt.cube_ids
        assert cube.blob in receipt.blobs
        assert not kept.any()
        assert served.cache.lookup(made.plan, made.prompt, ("alice",)) is None
        assert not model.store.vault.holds(cube.blob)

    def test_forgetting_an_adapter_takes_the_prefix_with_it(self, model, served):
        pin(model, "alice", LIKES)
        model.adapters.add("tone", lora(model, 1))  # a shared one
        model.persona("alice").attach("tone")
        cube = served.warm()
        made, hit = served.lookup()
        hit.release()
        receipt = model.store.forget("shared", [model.adapters.find("tone").id])
        assert cube.id in receipt.cube_ids
        assert served.cache.lookup(made.plan, made.prompt, ("alice",)) is None
        assert served.lookup()[1] is None

    def test_retired_prefixes_are_erased_too(self, model, served):
        pin(model, "alice", LIKES)
        first = served.warm()
        pin(model, "alice", QUIET)
        second = served.warm()
        receipt = model.persona("alice").forget(LIKES)
        assert {first.blob, second.blob} <= set(receipt.blobs)

    def test_a_group_that_forgets_reaches_what_members_computed(self, model, served):
        model.persona("alice", groups=["nurses"])
        pin(model, "nurses", LIKES, kind="group")
        made = compose(model, "alice", "Hi")
        bundle = served.compute(made)
        served.cache.insert(made.plan, made.prompt, bundle, tuple(made.revisions))
        model.group("nurses").forget("metric units")
        assert served.cache.stats().entries == 0
