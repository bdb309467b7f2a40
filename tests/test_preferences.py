"""What a persona prefers: said once, kept in her history, a gate of every row, and never another's."""

import copy
import math
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import PeftModel

from persona_sdk import PersonaModel
from persona_sdk.adapter_composition import Adjustment
from persona_sdk.adapters import AdapterRequest, Panacea
from persona_sdk.adapters.preferences import complete
from persona_sdk.compose import ChatOptions
from persona_sdk.engine import Request
from persona_sdk.errors import InvalidInputError, NotFoundError
from persona_sdk.memory import CubeDraft, CubeHeader
from persona_sdk.preferred import SEMANTIC_TYPE, applied, weights_of

from .adapters.support import IDS, PEFT_WARNINGS, logits, patched, peft_logits
from .engine.support import merged
from .support import lora

SHORT = {"max_new_tokens": 24, "ignore_eos": True}
LONG = {"max_new_tokens": 80, "ignore_eos": True}
NAMES = ("concise", "detailed")
GROUP = "nurses/tone"


def panacea(model, seed: int = 0, dimensions: tuple[str, ...] = NAMES) -> Panacea:
    options = {"dimensions": dimensions, "rank": 2, "alpha": 4.0, "seed": seed}
    return Panacea.random(model, options, std=1.0)


@pytest.fixture
def nurses(model):
    """A group with one adapter, attached for all its members."""
    nurses = model.group("nurses")
    nurses.add_adapter("tone", panacea(model))
    nurses.attach(GROUP, weight=0.8)
    return nurses


@pytest.fixture
def alice(model, nurses):
    return model.persona("alice", groups=["nurses"])


def gates(model, persona) -> list[tuple[float, ...]]:
    """Of the persona's plan, without the strength and the directions that all preferences share."""
    plan = composed(model, persona).plan
    return [tuple(value / 0.8 for value in part.gate[2:]) for part in plan.low_rank]


def composed(model, persona, text: str = "Hi"):
    return model._composer.compose(persona.id, text, ChatOptions())


def live_logits(model, persona, ids: torch.Tensor = IDS) -> torch.Tensor:
    """What the engine computes for a persona over fixed prompts."""
    composition = composed(model, persona)
    rows = [
        Request(prompt=tuple(row.tolist()), plan=composition.plan, tensors=composition.tensors) for row in ids
    ]
    return torch.stack(model.engine.logits(rows))


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return bool(torch.allclose(one, two, rtol=0, atol=1e-4))


class TestSaying:
    def test_a_member_has_a_preference_of_her_own_over_the_group_s_adapter(self, model, nurses, alice):
        bob = model.persona("bob", groups=["nurses"])
        assert alice.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}
        alice.prefer(concise=0.7, detailed=0.3)
        bob.prefer(concise=0.1)
        assert alice.preferences() == {GROUP: {"concise": 0.7, "detailed": 0.3}}
        assert bob.preferences() == {GROUP: {"concise": 0.1, "detailed": 0.9}}
        assert gates(model, alice) == [pytest.approx((0.7, 0.3))]
        assert gates(model, bob) == [pytest.approx((0.1, 0.9))]
        assert gates(model, nurses) == [pytest.approx((0.5, 0.5))]
        assert alice.chat("Hi", **SHORT).tokens != bob.chat("Hi", **SHORT).tokens

    def test_a_new_one_takes_the_place_of_the_old_in_one_commit(self, model, nurses):
        nurses.add_adapter("tone", panacea(model, 0, ("concise", "warm", "formal")))
        nurses.attach(GROUP)
        alice = model.persona("alice", groups=["nurses"])
        alice.prefer(concise=0.8, warm=0.2)
        before = alice.revision
        revision = alice.prefer(warm=0.5)
        assert (alice.revision, len(revision.added), len(revision.retired)) == (before + 1, 1, 1)
        # What was said before counts no more: the others share the rest as the group has it.
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.25, "warm": 0.5, "formal": 0.25})}

    def test_a_group_s_preference_is_the_default_of_its_members(self, model, nurses):
        nurses.add_adapter("tone", panacea(model, 0, ("concise", "warm", "formal")))
        nurses.attach(GROUP, state={"preference": {"formal": 1.0}})
        alice = model.persona("alice", groups=["nurses"])
        bob = model.persona("bob", groups=["nurses"])
        nurses.prefer(concise=0.6, warm=0.2, formal=0.2)
        alice.prefer(concise=0.8)
        bob.prefer(warm=1.0)
        assert nurses.preferences() == {GROUP: pytest.approx({"concise": 0.6, "warm": 0.2, "formal": 0.2})}
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.8, "warm": 0.1, "formal": 0.1})}
        assert bob.preferences() == {GROUP: {"concise": 0.0, "warm": 1.0, "formal": 0.0}}
        nurses.prefer(formal=1.0)
        assert bob.preferences() == {GROUP: {"concise": 0.0, "warm": 1.0, "formal": 0.0}}
        bob.prefer()
        assert bob.preferences() == {GROUP: {"concise": 0.0, "warm": 0.0, "formal": 1.0}}

    def test_of_two_groups_the_first_prevails(self, model, nurses):
        model.group("cooks").add_adapter("plain", panacea(model, 1))
        model.group("cooks").attach("cooks/plain")
        alice = model.persona("alice", groups=["nurses", "cooks"])
        nurses.prefer(concise=0.9)
        model.group("cooks").prefer(concise=0.2)
        assert alice.preferences() == {
            name: pytest.approx({"concise": 0.9, "detailed": 0.1}) for name in (GROUP, "cooks/plain")
        }
        alice.join(["cooks", "nurses"])
        assert {values["concise"] for values in alice.preferences().values()} == {0.2}

    def test_names_go_to_every_adapter_that_has_them(self, model, alice):
        alice.add_adapter("voice", panacea(model, 1, ("concise", "warm", "formal")))
        alice.add_adapter("plain", lora(model, 2))
        for name in ("alice/plain", "alice/voice"):
            alice.attach(name)
        plain = composed(model, alice).plan.low_rank[0]
        alice.prefer(concise=0.4, warm=0.6)
        assert alice.preferences() == {
            "alice/voice": {"concise": 0.4, "warm": 0.6, "formal": 0.0},
            GROUP: {"concise": 0.4, "detailed": 0.6},
        }
        assert composed(model, alice).plan.low_rank[0] == plain

    def test_weights_above_one_are_ratios(self, alice):
        alice.prefer(concise=3, detailed=1)
        assert alice.preferences() == {GROUP: {"concise": 0.75, "detailed": 0.25}}

    @pytest.mark.parametrize(
        ("weights", "said"),
        [
            ({"funny": 1.0}, "'funny'"),
            ({"concise": 0.5, "funny": 0.5}, "'funny'"),
            ({"self": 1.0}, "'self'"),
            ({"concise": -0.1}, "concise=-0.1"),
            ({"concise": math.nan}, "nan"),
            ({"concise": math.inf}, "inf"),
            ({"concise": True}, "True"),
            ({"concise": 0.0, "detailed": 0.0}, "no weight above 0"),
        ],
    )
    def test_what_cannot_be_preferred_changes_nothing(self, model, alice, weights, said):
        alice.prefer(concise=0.7)
        before, plan = alice.revision, composed(model, alice).plan
        with pytest.raises(InvalidInputError, match=said) as refused:
            alice.prefer(**weights)
        assert "Expected a" in refused.value.hint or "concise, detailed" in refused.value.hint
        assert (alice.revision, composed(model, alice).plan) == (before, plan)

    def test_without_an_adapter_that_has_preferences_there_is_nothing_to_say(self, model):
        carol = model.persona("carol")
        carol.add_adapter("plain", lora(model, 2))
        carol.attach("carol/plain")
        assert carol.preferences() == {}
        with pytest.raises(InvalidInputError, match="'concise'"):
            carol.prefer(concise=1.0)
        with pytest.raises(NotFoundError, match="prefers nothing"):
            carol.prefer()


class TestKeeping:
    def test_it_is_there_when_the_store_is_opened_again(self, tiny, hash_embedder, tmp_path):
        def opened():
            return PersonaModel.from_pretrained(tiny, store=tmp_path / "store", embedder=hash_embedder)

        with opened() as model:
            model.group("nurses").add_adapter("tone", panacea(model))
            model.group("nurses").attach(GROUP)
            alice = model.persona("alice", groups=["nurses"])
            alice.prefer(concise=0.7)
            reply = alice.chat("Hi", **SHORT)
        with opened() as model:
            alice = model.persona("alice")
            assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.7, "detailed": 0.3})}
            assert alice.chat("Hi", **SHORT) == reply

    def test_rollback_brings_an_earlier_one_back(self, alice):
        first = alice.prefer(concise=0.7)
        alice.prefer(concise=0.2)
        alice.prefer()
        assert alice.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}
        alice.rollback(first.number)
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.7, "detailed": 0.3})}
        alice.rollback(first.number - 1)
        assert alice.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}

    def test_it_goes_with_the_archive(self, model, alice, tmp_path):
        alice.prefer(concise=0.7)
        archive = alice.export(tmp_path / "alice.memcube")
        other = model.import_persona(archive, as_id="other")
        assert other.preferences() == {}  # in no group, so out of reach
        assert other.chat("Hi").tokens == model.chat("Hi").tokens
        other.join(["nurses"])
        assert other.preferences() == alice.preferences()
        other.prefer(concise=0.1)
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.7, "detailed": 0.3})}

    def test_it_is_forgotten_with_the_persona(self, model, alice):
        alice.prefer(concise=0.7)
        assert alice.forget_everything().verify(model.store)
        again = model.persona("alice", groups=["nurses"])
        assert again.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}

    def test_keys_and_values_computed_under_it_are_forgotten_with_it(self, model, alice):
        alice.remember("Alice works at night. " * 8, pinned=True)
        [preference] = alice.prefer(concise=0.7).added
        alice.warm()
        assert model.store.cubes("alice", kind="activation")
        assert alice.chat("Hi").cached_tokens > 0
        alice.forget(preference)
        assert not model.store.cubes("alice", kind="activation")
        assert alice.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}

    def test_history_tells_that_and_not_what(self, alice):
        alice.prefer(concise=0.7)
        assert [revision.message for revision in alice.history()][-1] == "prefer"


class TestReading:
    def test_a_preference_an_adapter_does_not_know_any_more_is_passed_over(self, model, nurses, alice):
        alice.prefer(concise=0.7, detailed=0.3)
        nurses.add_adapter("tone", panacea(model, 3, ("concise", "warm")))
        nurses.attach(GROUP)
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.7, "warm": 0.3})}
        nurses.add_adapter("tone", panacea(model, 4, ("brief", "warm")))
        nurses.attach(GROUP)
        assert alice.preferences() == {GROUP: {"brief": 0.5, "warm": 0.5}}
        assert alice.chat("Hi").controls == alice.preferences()
        nurses.add_adapter("tone", lora(model, 1))
        nurses.attach(GROUP)
        assert alice.preferences() == {}
        assert alice.chat("Hi").plan.low_rank

    @pytest.mark.parametrize(
        "attributes",
        [{"other": 1}, {"weights": 3}, {"weights": {"concise": "x"}}, {"weights": {"concise": -1.0}}],
    )
    def test_what_an_archive_may_have_put_there_breaks_no_reply(self, model, alice, attributes):
        plain = alice.chat("Hi")
        header = CubeHeader(semantic_type=SEMANTIC_TYPE, attributes=attributes)
        model.store.commit("alice", add=[CubeDraft(kind="parametric", header=header)])
        assert alice.chat("Hi").tokens == plain.tokens
        alice.prefer(concise=0.7)  # takes its place, too
        assert alice.preferences() == {GROUP: pytest.approx({"concise": 0.7, "detailed": 0.3})}

    def test_a_remembered_preference_is_a_text_and_no_weight(self, model, alice):
        alice.remember("Prefers short answers.", semantic_type="preference")
        assert alice.preferences() == {GROUP: {"concise": 0.5, "detailed": 0.5}}
        alice.prefer(concise=0.7)
        alice.prefer()
        assert [cube.text for cube in alice.memories()] == ["Prefers short answers."]

    @given(
        st.lists(
            st.dictionaries(st.sampled_from([*NAMES, "funny"]), st.one_of(st.floats(), st.floats(0, 2))),
            max_size=3,
        )
    )
    def test_whatever_was_kept_reading_yields_a_preference(self, tiny, preferences):
        adapter, expected = small(tiny), (0.5, 0.5)
        for weights in preferences:
            with suppress(InvalidInputError):
                known = {name: weights[name] for name in NAMES if name in weights}
                expected = complete(NAMES, known, expected)
        state = applied(adapter, {}, preferences)
        assert tuple(adapter.controls(state).values()) == pytest.approx(expected, abs=1e-9)
        assert math.fsum(expected) == pytest.approx(1)

    def test_no_cubes_are_no_preference(self):
        assert weights_of([]) == {}


_small: list[Panacea] = []


def small(tiny) -> Panacea:
    """One adapter for all examples."""
    if not _small:
        _small.append(panacea(tiny))
    return _small[0]


class TestIsolation:
    def test_nobody_s_preference_changes_another_s_plan(self, model, nurses, alice):
        bob = model.persona("bob", groups=["nurses"])
        carol = model.persona("carol")
        alice.prefer(concise=0.7)
        before = [alice.chat("Hi", **SHORT), nurses.chat("Hi", **SHORT), carol.chat("Hi", **SHORT)]
        bob.prefer(concise=0.01)
        assert [alice.chat("Hi", **SHORT), nurses.chat("Hi", **SHORT), carol.chat("Hi", **SHORT)] == before
        assert bob.chat("Hi", **SHORT).plan_id != before[0].plan_id

    def test_a_user_s_own_adapter_of_the_same_name_is_reached_by_her_group_only(self, model, nurses, alice):
        carol = model.persona("carol")
        for persona in (alice, carol):
            persona.add_adapter("voice", panacea(model, 5))
            persona.attach(f"{persona.id}/voice")
        nurses.prefer(concise=0.9)
        assert alice.preferences()["alice/voice"]["concise"] == 0.9
        assert carol.preferences() == {"carol/voice": {"concise": 0.5, "detailed": 0.5}}


class TestServing:
    def test_32_preferences_in_one_batch_on_one_copy_of_the_weights(self, model, nurses, monkeypatch):
        members = [model.persona(f"m{number}", groups=["nurses"]) for number in range(32)]
        for number, member in enumerate(members):
            member.prefer(concise=number / 31)
        model.engine.ready()
        loop = model.engine._loop
        passes, forward_pass = [], loop.forward_pass

        def watched(numbers, *args, **options):
            stats = loop.table.tiers.stats()
            passes.append((len(set(numbers)), stats.held, stats.device.count, stats.device.bytes))
            return forward_pass(numbers, *args, **options)

        monkeypatch.setattr(loop, "forward_pass", watched)
        together = model.chat_batch([(member, "Tell me more") for member in members], **SHORT)
        rows, held, copies, size = max(passes)
        assert (rows, held, copies) == (32, 1, 1)
        assert len({reply.plan.low_rank[0].factors for reply in together}) == 1
        assert len({reply.plan.low_rank[0].gate for reply in together}) == 32
        assert len({reply.tokens for reply in together}) > 8  # the preference does matter
        assert together == [member.chat("Tell me more", **SHORT) for member in members]
        # No more bytes than for one of them.
        assert size == loop.table.tiers.stats().device.bytes
        assert loop.table.tiers.stats().loads == 1

    def test_a_row_is_what_dense_weights_at_its_preference_give(self, model, nurses, alice):
        alice.prefer(concise=0.7)
        adapter = model.adapters.get(GROUP)
        dense = copy.deepcopy(model.base.module)
        for path in {name.rpartition(".")[0] for name in adapter.tensors}:
            U, V, sigma, s = (adapter.tensors[f"{path}.{side}"].double() for side in ("U", "V", "sigma", "s"))
            values = torch.cat([sigma, s * torch.tensor([0.7, 0.3], dtype=torch.float64)])
            update = 0.8 * adapter.config.multiplier * U @ torch.diag(values) @ V.T
            dense.get_submodule(path).weight.data += update.float()
        assert close(live_logits(model, alice), logits(dense))
        assert not close(live_logits(model, alice), logits(model.base.module))

    def test_a_reply_says_what_was_preferred(self, model, alice):
        alice.prefer(concise=0.7)
        reply = alice.chat("Hi")
        assert reply.controls == {GROUP: pytest.approx({"concise": 0.7, "detailed": 0.3})}
        assert ("preference", f"{GROUP}  concise 0.7, detailed 0.3") in alice.explain(reply).rows()
        plain = model.chat("Hi")
        assert plain.controls == {}

    def test_a_persona_without_preferences_has_no_row_about_them(self, model):
        carol = model.persona("carol")
        carol.add_adapter("plain", lora(model, 2))
        carol.attach("carol/plain")
        reply = carol.chat("Hi")
        assert reply.controls == {}
        assert "preference" not in dict(carol.explain(reply).rows())


class TestSteering:
    def test_a_steered_preference_holds_from_the_next_token_on(self, model, alice, monkeypatch):
        alice.prefer(concise=0.2, detailed=0.8)
        plain = alice.chat("Tell me more", **LONG)
        with worker_runs(model, monkeypatch, {7: lambda stream: stream.steer(concise=0.9)}) as started:
            started.set_result(alice.stream("Tell me more", **LONG))
            reply = started.result().reply
        [steer] = reply.steers
        assert steer.token == 7
        assert steer.gates == {0: pytest.approx((0.8, 0.8, 0.8 * 0.9, 0.8 * 0.1))}
        assert reply.tokens[:7] == plain.tokens[:7]
        assert reply.tokens != plain.tokens
        assert reply.tokens == in_phases(model, reply)
        assert plain.tokens == in_phases(model, plain)
        assert reply.controls == plain.controls  # what it began with
        assert alice.chat("Tell me more", **LONG) == plain

    def test_a_steer_that_cannot_be_is_refused_and_the_stream_goes_on(self, alice):
        plain = alice.chat("Tell me more", **LONG)
        stream = alice.stream("Tell me more", **LONG)
        next(stream)
        for wrong in (-0.5, math.nan, math.inf, True):
            with pytest.raises(InvalidInputError, match="concise="):
                stream.steer(concise=wrong)
        for strange in ({"funny": 1.0}, {"concise": 0.9, "funny": 0.5}):
            with pytest.raises(InvalidInputError, match=r"'funny'.*concise, detailed"):
                stream.steer(**strange)
        with pytest.raises(InvalidInputError, match="no weight above 0"):
            stream.steer(concise=0.0, detailed=0.0)
        assert stream.reply == plain
        assert stream.reply.steers == ()

    def test_later_steers_start_from_earlier_ones(self, model, nurses, monkeypatch):
        nurses.add_adapter("tone", panacea(model, 0, ("concise", "warm", "formal")))
        nurses.attach(GROUP)
        nurses.prefer(concise=0.5, warm=0.3, formal=0.2)
        acts = {3: lambda stream: stream.steer(concise=0.8), 5: lambda stream: stream.steer(warm=0.0)}
        with worker_runs(model, monkeypatch, acts) as started:
            started.set_result(nurses.stream("Tell me more", **SHORT))
            first, last = started.result().reply.steers
        assert (first.token, last.token) == (3, 5)
        assert first.gates[0][2:] == pytest.approx((0.8, 0.12, 0.08))
        assert last.gates[0][2:] == pytest.approx((0.8 / 0.88, 0.0, 0.08 / 0.88))

    @pytest.mark.parametrize("dimensions", [NAMES, ("concise", "warm", "formal")])
    def test_there_and_back_between_two_tokens_leaves_the_gates_and_the_reply_to_the_bit(
        self, model, nurses, monkeypatch, dimensions
    ):
        nurses.add_adapter("tone", panacea(model, 0, dimensions))
        nurses.attach(GROUP, weight=0.8)
        here, there = thirds(dimensions)
        nurses.prefer(**here)
        plain = nurses.chat("Tell me more", **LONG)
        [patch] = plain.plan.low_rank

        def there_and_back(stream):
            stream.steer(**there)
            stream.steer(**here)

        with worker_runs(model, monkeypatch, {7: there_and_back}) as started:
            started.set_result(nurses.stream("Tell me more", **LONG))
            reply = started.result().reply
        assert [steer.gates for steer in reply.steers] == [{0: patch.gate}]  # both, taken together
        assert reply.tokens == plain.tokens

    def test_there_and_back_some_tokens_later_goes_on_as_before(self, model, alice, monkeypatch):
        """What was said under the other preference stays said, with its keys and values; the rest is A's."""
        alice.prefer(concise=0.9, detailed=0.1)
        plain = alice.chat("Tell me more", **LONG)
        [patch] = plain.plan.low_rank
        acts = {
            7: lambda stream: stream.steer(concise=0.1, detailed=0.9),
            20: lambda stream: stream.steer(concise=0.9, detailed=0.1),
        }
        with worker_runs(model, monkeypatch, acts) as started:
            started.set_result(alice.stream("Tell me more", **LONG))
            reply = started.result().reply
        assert [steer.token for steer in reply.steers] == [7, 20]
        assert reply.steers[0].gates[0] != patch.gate
        assert reply.steers[1].gates[0] == patch.gate  # to the bit
        assert reply.tokens[:7] == plain.tokens[:7]
        assert reply.tokens != plain.tokens
        assert reply.tokens == in_phases(model, reply)

    @given(data=st.data(), m=st.integers(2, 5))
    def test_there_and_back_is_the_same_plan_whatever_was_preferred(self, tiny, data, m):
        names = ("concise", "warm", "formal", "calm", "expert")[:m]
        weight = st.floats(0, 1).filter(lambda value: value == 0 or value > 1e-6)
        vector = st.lists(weight, min_size=m, max_size=m).filter(any)
        here, there = (dict(zip(names, data.draw(vector), strict=True)) for _ in range(2))
        adapter = wide(tiny, names)
        start = adapter.steered({}, here)
        back = adapter.steered(adapter.steered(start, there), here)
        request = AdapterRequest(origin="tone", weight=0.8)
        before, after = (adapter.contribute(state, request).parts for state in (start, back))
        assert before == after

    def test_there_and_back_between_requests_gives_the_same_logits_to_the_bit(self, model, alice):
        alice.prefer(concise=0.7)
        first = live_logits(model, alice)
        alice.prefer(concise=0.2)
        other = live_logits(model, alice)
        alice.prefer(concise=0.7)
        assert torch.equal(live_logits(model, alice), first)
        assert not close(other, first)

    def test_names_of_arguments_elsewhere_can_be_dimensions(self, model, nurses):
        names = ("name", "preference", "gates")
        nurses.add_adapter("tone", panacea(model, 0, names))
        nurses.attach(GROUP)
        nurses.prefer(name=0.5, gates=0.5)
        stream = nurses.stream("Hi", **SHORT)
        next(stream)
        stream.steer(preference=1.0)
        assert nurses.preferences()[GROUP] == {"name": 0.5, "preference": 0.0, "gates": 0.5}
        assert [steer.gates[0][2:] for steer in stream.reply.steers] == [(0.0, 1.0, 0.0)]

    @pytest.mark.parametrize("name", ["self", "weights", "class-y", "2nd"])
    def test_names_that_could_not_be_keywords_of_steer_are_refused(self, tiny, name):
        with pytest.raises(InvalidInputError, match=f"dimensions .*{name}"):
            panacea(tiny, 0, ("concise", name))


def thirds(dimensions) -> tuple[dict[str, float], dict[str, float]]:
    """Two preferences none of whose weights is a power of two."""
    here = {2: (0.7, 0.3), 3: (0.7, 0.2, 0.1)}[len(dimensions)]
    return dict(zip(dimensions, here, strict=True)), dict(zip(dimensions, here[::-1], strict=True))


_wide: dict[tuple[str, ...], Panacea] = {}


def wide(tiny, names) -> Panacea:
    """One adapter for all examples with these dimensions."""
    if names not in _wide:
        _wide[names] = panacea(tiny, 0, names)
    return _wide[names]


@contextmanager
def worker_runs(model, monkeypatch, acts):
    """Let the engine's worker act on the stream that is put into the yielded future, when it has made so many
    tokens: between two steps, so that what the next token is made with is known.
    """
    model.engine.ready()
    loop, started = model.engine._loop, Future()
    steer = loop._steer

    def watched():
        for row in loop.table.rows.values():
            if act := acts.pop(len(row.tokens), None):
                act(started.result(60))
        steer()

    with monkeypatch.context() as patch:
        patch.setattr(loop, "_steer", watched)
        yield started
    assert not acts


def in_phases(model, reply) -> tuple[int, ...]:
    """What transformers says to the same prompt with the gates changed at the same tokens, teacher-forced."""
    [patch] = reply.plan.low_rank
    factors = model.adapters.get(GROUP).factors
    prompt, tokens = list(reply.prompt_tokens), list(reply.tokens)
    changes = [(0, patch.gate), *((steer.token, steer.gates[0]) for steer in reply.steers)]
    ends = [at for at, _ in changes[1:]] + [len(tokens)]
    said, kept = [], None
    for (at, gate), end in zip(changes, ends, strict=True):
        read = tokens[at - 1 : end - 1] if at else prompt + tokens[: end - 1]
        with torch.inference_mode(), patched(model.base, factors, gate):
            out = model.base.module(torch.tensor([read]), past_key_values=kept, use_cache=True)
        kept = out.past_key_values
        said += out.logits[0, at - end :].argmax(-1).tolist()
    return tuple(said)


@pytest.mark.filterwarnings(PEFT_WARNINGS)
class TestFolders:
    def test_an_export_at_a_preference_is_what_the_engine_computes_there(self, model, alice, tmp_path):
        alice.prefer(concise=0.3)
        alice.export_peft(tmp_path / "kept")
        alice.export_peft(tmp_path / "said", adjust=Adjustment(preference={"concise": 0.9}))
        kept = live_logits(model, alice)
        assert close(peft_logits(model.base, tmp_path / "kept"), kept)
        assert gates(model, alice) == [pytest.approx((0.3, 0.7))]  # an export changes nothing
        alice.prefer(concise=0.9)
        assert close(peft_logits(model.base, tmp_path / "said"), live_logits(model, alice))
        assert not close(kept, live_logits(model, alice))

    def test_an_adjusted_preference_starts_from_what_she_prefers(self, model, nurses, tmp_path):
        nurses.add_adapter("tone", panacea(model, 0, ("concise", "warm", "formal")))
        nurses.attach(GROUP)
        alice = model.persona("alice", groups=["nurses"])
        alice.prefer(concise=0.5, warm=0.4, formal=0.1)
        alice.export_peft(tmp_path / "a", adjust=Adjustment(preference={"concise": 0.75}))
        alice.prefer(concise=0.75, warm=0.2, formal=0.05)
        assert close(peft_logits(model.base, tmp_path / "a"), live_logits(model, alice))

    @pytest.mark.parametrize("preference", [{"funny": 1.0}, {"concise": -1.0}, {"concise": 0, "detailed": 0}])
    def test_an_adjusted_preference_nobody_can_use_writes_nothing(self, alice, tmp_path, preference):
        with pytest.raises(InvalidInputError):
            alice.export_peft(tmp_path / "a", adjust=Adjustment(preference=preference))
        assert not (tmp_path / "a").exists()

    def test_names_of_an_adjusted_preference_go_to_the_adapters_that_have_them(self, model, alice, tmp_path):
        alice.add_adapter("voice", panacea(model, 1, ("warm", "formal")))
        alice.attach("alice/voice")
        alice.export_peft(tmp_path / "a", adjust=Adjustment(preference={"concise": 0.9, "warm": 0.2}))
        alice.prefer(concise=0.9, warm=0.2)
        assert close(peft_logits(model.base, tmp_path / "a"), live_logits(model, alice))

    def test_the_adapter_s_own_export_at_a_preference(self, model, tmp_path):
        adapter = panacea(model, 2)
        carol = model.persona("carol")
        carol.add_adapter("voice", adapter)
        carol.attach("carol/voice")
        for number, weights in enumerate([{"concise": 1.0}, {"concise": 0.3}, {"detailed": 1.0}]):
            adapter.export_peft(tmp_path / str(number), preference=weights)
            carol.prefer(**weights)
            assert close(peft_logits(model.base, tmp_path / str(number)), live_logits(model, carol))

    def test_a_folder_written_again_is_the_new_preference(self, model, alice, tmp_path):
        alice.prefer(concise=0.9)
        old = alice.export_peft(tmp_path / "a")
        first = peft_logits(model.base, tmp_path / "a")
        alice.prefer(concise=0.1)
        new = alice.export_peft(tmp_path / "a")
        second = peft_logits(model.base, tmp_path / "a")
        assert old.version != new.version
        assert close(second, live_logits(model, alice))
        assert not close(first, second)

    def test_merging_again_after_a_change_takes_the_old_preference_out_first(self, model, alice, tmp_path):
        """Merged equals live; unmerged is the base; merged at the new one equals live there."""
        for number, weight in enumerate((0.9, 0.1)):
            alice.prefer(concise=weight)
            alice.export_peft(tmp_path / str(number))
        wrapped = PeftModel.from_pretrained(
            copy.deepcopy(model.base.module), str(tmp_path / "0"), adapter_name="old"
        ).eval()
        wrapped.load_adapter(str(tmp_path / "1"), adapter_name="new")
        before = weights_in(wrapped)
        with merged_at(wrapped, "old"):
            assert any(not torch.equal(before[name], w) for name, w in weights_in(wrapped).items())
            alice.prefer(concise=0.9)
            assert close(logits(wrapped), live_logits(model, alice))
        for name, weight in weights_in(wrapped).items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)
        with merged_at(wrapped, "new"):
            alice.prefer(concise=0.1)
            assert close(logits(wrapped), live_logits(model, alice))
        for name, weight in weights_in(wrapped).items():
            torch.testing.assert_close(weight, before[name], rtol=0, atol=1e-6)

    def test_merged_weights_say_the_same_tokens(self, model, alice):
        alice.prefer(concise=0.7)
        composition = composed(model, alice)
        [patch] = composition.plan.low_rank
        dense = merged(model.base, [(composition.tensors[patch.factors], patch.gate)])
        reply = alice.chat("Tell me more", max_new_tokens=32, ignore_eos=True)
        with torch.inference_mode():
            out = dense.module(torch.tensor([[*reply.prompt_tokens, *reply.tokens[:-1]]])).logits
        assert tuple(out[0, len(reply.prompt_tokens) - 1 :].argmax(-1).tolist()) == reply.tokens


@contextmanager
def merged_at(wrapped: PeftModel, name: str):
    wrapped.set_adapter(name)
    wrapped.merge_adapter([name])
    try:
        yield
    finally:
        wrapped.unmerge_adapter()


def weights_in(wrapped: PeftModel) -> dict[str, torch.Tensor]:
    return {
        name: weight.detach().clone() for name, weight in wrapped.named_parameters() if "base_layer" in name
    }
