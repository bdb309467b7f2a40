"""Steering a running reply: names become gates, and what cannot be a gate is refused."""

import asyncio
from dataclasses import replace

import pytest

from persona_sdk import LoRA
from persona_sdk.adapters import AdapterRequest
from persona_sdk.errors import CompositionError, CorruptBlobError, EngineError, InvalidInputError
from persona_sdk.plan import SoftPrefix
from persona_sdk.steering import Contributor, Steering

from .support import lora

LONG = {"max_new_tokens": 400, "ignore_eos": True}


class Blend(LoRA):
    """Two named halves of the rank directions, each with a strength of its own."""

    def controls(self, state):
        return {"concise": 0.5, "detailed": 0.5, **state}

    def steered(self, state, controls):
        if any(value < 0 for value in controls.values()):
            raise InvalidInputError("A strength is negative.", hint="Expected at least 0.")
        return {**state, **controls}

    def contribute(self, state, request):
        half = self.config.rank // 2
        gate = [state.get("concise", 0.5)] * half + [state.get("detailed", 0.5)] * half
        return super().contribute({"gate": gate}, request)


def contributor(model, seed: int, first: int, family: type = LoRA) -> Contributor:
    plain = lora(model, seed)
    adapter = family.from_tensors(plain.base, plain.tensors, plain.config)
    request = AdapterRequest(origin=f"a{seed}", weight=1.0)
    return Contributor(f"nurses/a{seed}", adapter, {}, request, adapter.contribute({}, request).parts, first)


class TestSteering:
    def test_a_control_changes_the_gates_of_its_adapter_and_of_no_other(self, model):
        steering = Steering([contributor(model, 1, 0), contributor(model, 2, 1, Blend)])
        assert steering.gates({"concise": 0.9}, {}) == {1: (0.9, 0.9, 0.5, 0.5)}
        assert steering.gates({"detailed": 0.0}, {}) == {1: (0.9, 0.9, 0.0, 0.0)}  # from where it stood
        assert steering.gates({"detailed": 0.0}, {}) == {}

    def test_a_weight_changes_the_strength_of_an_attachment_down_to_nothing_and_back(self, model):
        steering = Steering([contributor(model, 1, 0), contributor(model, 2, 1, Blend)])
        assert steering.gates({}, {"nurses/a1": 0.0, "nurses/a2": 2.0}) == {0: (0.0,) * 4, 1: (1.0,) * 4}
        assert steering.gates({}, {"nurses/a1": 0.5}) == {0: (0.5,) * 4}

    @pytest.mark.parametrize(
        ("controls", "weights", "names"),
        [
            ({"funny": 1.0}, {}, "'funny'"),
            ({}, {"cooks/x": 1.0}, "'cooks/x'"),
            ({"concise": float("nan")}, {}, "nan"),
            ({"concise": True}, {}, "True"),
            ({"concise": -1.0}, {}, "negative"),
        ],
    )
    def test_what_cannot_be_steered_changes_nothing(self, model, controls, weights, names):
        steering = Steering([contributor(model, 1, 0), contributor(model, 2, 1, Blend)])
        with pytest.raises(InvalidInputError, match=names):
            steering.gates(controls, weights)
        assert steering.gates({"concise": 0.9}, {}) == {1: (0.9, 0.9, 0.5, 0.5)}

    def test_a_change_that_is_no_gate_is_refused(self, model):
        given = contributor(model, 1, 0)
        soft = SoftPrefix(vectors="0" * 64, length=2, origin="soft")
        with pytest.raises(CompositionError, match="more than its gates"):
            replace(given, parts=(*given.parts, soft)).steered({}, 0.5)


class TestStreams:
    @pytest.fixture
    def alice(self, model):
        alice = model.persona("alice")
        alice.add_adapter("style", lora(model, 1))
        alice.attach("alice/style")
        return alice

    def test_a_stream_is_steered_and_the_reply_says_so(self, model, alice):
        plain = alice.chat("Tell me more", **LONG)
        stream = alice.stream("Tell me more", **LONG)
        next(stream)
        stream.steer(weights={"alice/style": -3.0})
        reply = stream.reply
        [steer] = reply.steers
        assert steer.gates == {0: (-3.0,) * 4}
        assert reply.tokens[: steer.token] == plain.tokens[: steer.token]
        assert reply.tokens != plain.tokens
        assert "steered" in str(alice.explain(reply))
        assert not plain.steers
        assert alice.chat("Tell me more", **LONG) == plain  # it ended with the reply

    def test_a_complete_reply_cannot_be_steered(self, alice):
        stream = alice.stream("Hi", max_new_tokens=2)
        assert stream.reply
        with pytest.raises(EngineError, match="complete"):
            stream.steer(weights={"alice/style": 0.0})

    def test_a_cancelled_stream_keeps_what_was_said(self, alice):
        stream = alice.stream("Tell me more", **LONG)
        said = next(stream)
        stream.cancel()
        reply = stream.reply
        assert reply.finish_reason == "cancelled"
        assert reply.text.startswith(said)
        assert len(reply.tokens) < 400

    def test_async_pieces_make_up_the_reply(self, alice):
        async def read() -> str:
            return "".join([piece async for piece in alice.stream("Tell me more", **LONG)])

        assert asyncio.run(read()) == alice.chat("Tell me more", **LONG).text

    def test_weights_damaged_after_planning_fail_their_row_and_no_other(self, model, alice, monkeypatch):
        bob = model.persona("bob")
        cube = bob.add_adapter("style", lora(model, 2))
        bob.attach("bob/style")
        generate, whole = model.engine.generate, model.store.vault.path(cube.blob).read_bytes()

        def damaged(requests):
            model.store.vault.path(cube.blob).write_bytes(b"damaged")
            model.engine.forget("bob")  # out of the engine's tiers, and
            model.adapters._cache._weights.clear()  # out of memory; the shell stays
            completions = generate(requests)
            model.store.vault.path(cube.blob).write_bytes(whole)
            return completions

        monkeypatch.setattr(model.engine, "generate", damaged)
        both = [(alice, "Hi"), (bob, "Hi")]
        fine, failed = model.chat_batch(both, return_errors=True, max_new_tokens=4)
        assert isinstance(failed, CorruptBlobError)
        with pytest.raises(CorruptBlobError):
            model.chat_batch(both, max_new_tokens=4)
        monkeypatch.undo()
        assert [fine, bob.chat("Hi", max_new_tokens=4)] == model.chat_batch(both, max_new_tokens=4)
