"""The facade at its edges: who reaches what, what is refused, and what breaks off."""

import math
from concurrent.futures import ThreadPoolExecutor

import pytest

from persona_sdk import LoRA, PersonaModel
from persona_sdk.errors import (
    CorruptBlobError,
    EngineError,
    IncompatibleAdapterError,
    InvalidInputError,
    PersonaError,
)
from persona_sdk.testing import HashEmbedder, tiny_language_model

from .engine.support import random_factors
from .support import FAST, lora


class TestOwners:
    """Users, groups and what they reach."""

    def test_a_group_cannot_be_opened_as_a_user_nor_the_other_way_round(self, model):
        model.group("nurses").remember("Nurses meet at noon.")
        model.persona("alice").remember("Likes tea.")
        for wrong in (
            lambda: model.persona("nurses"),
            lambda: model.group("alice"),
            lambda: model.persona("shared"),
        ):
            with pytest.raises(InvalidInputError, match="is a"):
                wrong()
        assert [cube.text for cube in model.group("nurses").memories()] == ["Nurses meet at noon."]

    def test_an_adapter_can_be_filed_before_its_owner_ever_wrote(self, model):
        alice = model.persona("alice")
        model.adapters.add("alice/voice", lora(model, 1))
        alice.attach("alice/voice")
        model.adapters.add("nurses/tone", lora(model, 2))
        model.group("nurses").attach("nurses/tone")
        bob = model.persona("bob")
        assert bob.add_adapter("voice", lora(model, 3)).owner == "bob"
        assert {record.id: record.kind for record in model.store.personas()} == {
            "alice": "user", "bob": "user", "nurses": "group",
        }  # fmt: skip

    def test_an_imported_member_reads_nothing_of_a_local_group(self, model, tmp_path):
        model.group("admins").remember("The admin password is green.")
        mallory = model.persona("mallory", groups=["admins"])
        mallory.remember("hello")
        archive = mallory.export(tmp_path / "m.memcube")
        mallory.forget_everything()
        back = model.import_persona(archive)
        assert back.groups == ()
        assert all(passage.owner == "mallory" for passage in back.recall("admin password green"))
        back.forget_everything()
        assert model.import_persona(archive, keep_groups=True).groups == ("admins",)

    def test_a_damaged_adapter_out_of_reach_does_not_matter(self, model):
        alice = model.persona("alice", groups=["nurses"])
        cube = model.adapters.add("nurses/tone", lora(model, 1))
        alice.attach("nurses/tone")
        alice.join([])
        model.store.vault.path(cube.blob).write_bytes(b"damaged")
        model.adapters._cache.clear()
        assert alice.chat("Hi", **FAST).plan.parts == ()
        alice.join(["nurses"])
        with pytest.raises(CorruptBlobError) as caught:
            alice.chat("Hi", **FAST)
        assert caught.value.code == "corrupt_blob"

    def test_one_adapter_counts_once_however_often_it_is_attached(self, model):
        alice = model.persona("alice", groups=["nurses"])
        model.adapters.add("nurses/tone", lora(model, 1))
        alice.attach("nurses/tone", weight=0.5)
        model.group("nurses").attach("nurses/tone")
        reply = alice.chat("Hi", **FAST)
        assert [part.gate[0] for part in reply.plan.low_rank] == [0.5]
        assert reply.skipped == ("nurses/tone: attached twice",)

    def test_concurrent_attachments_leave_one(self, model):
        alice = model.persona("alice")
        alice.add_adapter("voice", lora(model, 1))
        with ThreadPoolExecutor(8) as pool:
            list(
                pool.map(
                    lambda weight: alice.attach("alice/voice", weight=weight), [0.1 * n for n in range(1, 9)]
                )
            )
        assert alice.attachments() == ["alice/voice"]


class TestWhatCannotBeAttached:
    @pytest.mark.parametrize("state", [{"gate": [1.0, 2.0]}, {"gate": [math.nan] * 4}, {"colour": 1}])
    def test_state(self, model, state):
        alice = model.persona("alice")
        alice.add_adapter("voice", lora(model, 1))
        with pytest.raises(PersonaError):
            alice.attach("alice/voice", state=state)
        assert alice.attachments() == []

    def test_shapes(self, model):
        other = tiny_language_model(seed=1, hidden=64)
        wrong = LoRA.from_tensors(model.base.fingerprint, random_factors(other, 1))
        alice = model.persona("alice")
        alice.add_adapter("wrong", wrong)
        with pytest.raises(IncompatibleAdapterError, match="expects d_in"):
            alice.attach("alice/wrong")
        assert alice.attachments() == []


class TestStreamsAndLengths:
    def test_a_stream_ends_with_an_error_when_the_model_is_closed(self, tmp_path):
        base = tiny_language_model()
        model = PersonaModel.from_pretrained(base, store=tmp_path / "s", embedder=HashEmbedder())
        stream = model.stream(None, "Tell me more", max_new_tokens=20)
        next(stream)
        model.close()
        with pytest.raises(EngineError, match="closed"):
            list(stream)
        with pytest.raises(EngineError, match="closed"):
            _ = stream.reply

    def test_a_memory_too_long_for_the_context_is_left_out_and_named(self, model):
        alice = model.persona("alice")
        cube = alice.remember("green tea " * 1500)
        alice.remember("Likes green tea.")
        reply = alice.chat("green tea", **FAST)
        assert reply.citations == ()
        assert f"memory {cube.id[:8]}: does not fit" in reply.skipped

    def test_forgetting_finds_what_a_rollback_hid(self, model):
        alice = model.persona("alice")
        alice.remember("Likes tea.")
        hidden = alice.remember("My secret is blue.")
        alice.rollback(1)
        assert alice.forget("secret").cube_ids == (hidden.id,)
        assert alice.rollback(2).gone == (hidden.id,)

    @pytest.mark.parametrize("seed", [-1, 2**70])
    def test_seeds(self, model, seed):
        with pytest.raises(InvalidInputError, match="seed"):
            model.chat("Hi", seed=seed, **FAST)

    def test_a_string_is_no_list(self, model):
        with pytest.raises(InvalidInputError, match="list"):
            model.persona("alice", groups="nurses")
        with pytest.raises(InvalidInputError, match="list"):
            model.persona("alice").remember_all("abc")

    def test_a_wrong_model_name_makes_no_store(self, tmp_path):
        with pytest.raises(PersonaError):
            PersonaModel.from_pretrained("no-such-model", store=tmp_path / "s")
        assert not (tmp_path / "s").exists()
