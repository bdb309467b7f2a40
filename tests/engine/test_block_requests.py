"""Requests that name their memory blocks: off unless asked for, bounded, private, never taken for exact."""

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from persona_sdk.engine import Engine, EngineOptions
from persona_sdk.engine.prefix.reuse import ReuseOptions
from persona_sdk.errors import InvalidInputError
from persona_sdk.plan import DecodingRule, KVPrefix, composition_key
from persona_sdk.tensors import digest, freeze
from persona_sdk.testing import tiny_language_model

from .support import patch, random_factors, request, soft_prefix

HEAD = tuple(range(100, 120))
BLOCKS = tuple(tuple(range(start, start + 11)) for start in (200, 220, 240, 260))
GAP, QUESTION = (7,), (30, 31, 32)
ALL, SOME = ReuseOptions(fraction=1.0), ReuseOptions(fraction=0.3)


def spanned(order=(0, 1, 2, 3), head=HEAD, question=QUESTION):
    """A prompt with these blocks in this order, one token between any two, and their spans."""
    tokens, spans = [*head], []
    for number in order:
        spans.append((len(tokens), len(tokens) + len(BLOCKS[number])))
        tokens += [*BLOCKS[number], *GAP]
    return (*tokens, *question), tuple(spans)


def asking(model, order=(0, 1, 2, 3), parts=(), bundles=(), scope=("alice",), head=HEAD, **options):
    prompt, spans = spanned(order, head)
    options = {"max_new_tokens": 8, "ignore_eos": True, **options}
    return replace(request(model, prompt, parts, bundles, **options), blocks=spans, scope=scope)


def opened(model, reuse=SOME, **options):
    return Engine(model, EngineOptions(block_reuse=reuse, **options))


class Watched:
    """A forward pass that notes the tokens of every batch."""

    def __init__(self, forward):
        self._forward, self.tokens = forward, []

    def __getattr__(self, name):
        return getattr(self._forward, name)

    def __call__(self, batch, *args, **options):
        self.tokens.append(len(batch.tokens))
        return self._forward(batch, *args, **options)


class Counted:
    """An engine, and the tokens of every pass it makes."""

    def __init__(self, engine):
        engine.ready()
        self._engine = engine
        self._watched = engine._loop.forward = Watched(engine._loop.forward)

    @property
    def passes(self):
        return self._watched.tokens

    def prefill(self, asked):
        """The completion, and how many tokens were computed up to the first one of the reply."""
        self.passes.clear()
        [completion] = self._engine.generate([asked])
        assert completion.error is None
        return completion, sum(self.passes) - len(completion.tokens) + 1


@pytest.fixture(scope="module")
def plain(tiny):
    with Engine(tiny, EngineOptions(prefix_bytes=0)) as engine:
        yield engine


def kinds(model, **options):
    """Rows of every composition that a plan allows beside blocks."""
    a, b = random_factors(model, 1), random_factors(model, 2, 8)
    soft, vectors = soft_prefix(model, 3)
    rule = DecodingRule(bias=((7, 4.0), (9, -float("inf"))), origin="ban")
    return [
        asking(model, **options),
        asking(model, (2, 0), (patch(a), patch(b, (0.5,) * 8)), (a, b), **options),
        asking(model, (3, 1, 0), (soft, patch(a), rule), (vectors, a), do_sample=True, seed=4, **options),
        asking(model, (1,), (soft,), (vectors,), **options),
        asking(model, (1, 2), head=(), **options),
    ]


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize("budget", [5, 512])
def test_with_every_token_computed_again_it_is_the_full_prefill(tiny, plain, behind, budget):
    rows = kinds(tiny)
    wanted = [done.tokens for done in plain.generate(rows)]
    with opened(tiny, ReuseOptions(fraction=1, behind_head=behind), prefill_tokens=budget) as engine:
        for _ in range(2):  # blocks that are missing, blocks that are kept
            done = engine.generate(rows)
            assert [one.tokens for one in done] == wanted
            assert [one.reused_tokens for one in done] == [0] * len(rows)


def test_off_by_default_every_token_is_computed(tiny):
    asked = asking(tiny)
    assert EngineOptions().block_reuse is None
    with Engine(tiny, EngineOptions(prefix_bytes=0)) as engine:
        counted = Counted(engine)
        for _ in range(2):
            completion, computed = counted.prefill(asked)
            assert (computed, completion.reused_tokens) == (len(asked.prompt), 0)


def test_kept_blocks_in_another_order_cost_only_what_is_picked(tiny):
    with opened(tiny, ReuseOptions(fraction=0.2)) as engine:
        counted = Counted(engine)
        first, cold = counted.prefill(asking(tiny, (0, 1, 2, 3)))
        # Three picked tokens of every block but the first, which is exact where it stands.
        assert first.reused_tokens == 3 * (11 - 3)
        assert cold == len(HEAD) + 4 * 11 + 3 * 3 + 4 + len(QUESTION)
        assert engine.generate([asking(tiny, (3, 1, 0, 2))])[0].cached_tokens == 16  # of the head, exactly
        other, warm = counted.prefill(asking(tiny, (2, 3, 1, 0)))
        assert other.reused_tokens == 3 * (11 - 3)
        assert warm == (len(HEAD) - 16) + 3 * 3 + 4 + len(QUESTION)
        assert len(counted.passes) == len(other.tokens)  # one pass to the first token


@settings(max_examples=8)
@given(data=st.data())
def test_a_row_gets_what_it_gets_alone_whatever_runs_beside_it(tiny, plain, data):
    """Approximate rows beside exact ones, cold and warm, in chunks of any size."""
    rows = data.draw(st.lists(st.sampled_from(kinds(tiny)), min_size=1, max_size=3))
    others = [replace(row, blocks=()) for row in kinds(tiny, max_new_tokens=20)[:2]]
    with opened(tiny, prefix_bytes=0) as alone:
        wanted = [alone.generate([row])[0] for row in rows]
    exact = [done.tokens for done in plain.generate(others)]
    with opened(tiny, prefix_bytes=0, prefill_tokens=data.draw(st.integers(1, 40)), max_rows=4) as engine:
        done = engine.generate([*rows, *others])
        again = engine.generate(rows)
    assert [one.tokens for one in done[len(rows) :]] == exact
    for got in (done[: len(rows)], again):
        assert [one.tokens for one in got] == [one.tokens for one in wanted]
        assert [one.reused_tokens for one in got] == [one.reused_tokens for one in wanted]


def test_no_step_computes_more_of_prompts_than_it_may(tiny):
    with opened(tiny, prefill_tokens=6, max_rows=4) as engine:
        counted = Counted(engine)
        done = engine.generate([asking(tiny, order) for order in ((0, 1), (2, 3, 0), (3, 2, 1, 0))])
        assert all(one.reused_tokens for one in done)
        assert max(counted.passes) <= 6


def test_what_only_approximates_is_never_kept_as_an_exact_prefix(tiny, plain):
    asked = asking(tiny)
    with opened(tiny, ReuseOptions(fraction=0)) as engine:
        approximate = engine.generate([asked])[0]
        assert approximate.reused_tokens
        kept = engine._prefixes.stats().entries
        exact = engine.generate([replace(asked, blocks=())])[0]
        # Head, first block and gap are exact. Of them, what fills whole blocks of a prefix: no more.
        assert exact.cached_tokens == (len(HEAD) + 11 + 1) // 16 * 16
        assert kept == 1
        assert exact.tokens == plain.generate([asked])[0].tokens != approximate.tokens


def test_a_prefix_that_is_kept_exactly_comes_first(tiny, plain):
    head = HEAD[:17]
    asked = asking(tiny, head=head)
    with opened(tiny, ReuseOptions(fraction=0)) as engine:
        engine.generate([replace(asked, blocks=())])
        done = engine.generate([asked])[0]
        assert done.cached_tokens == (len(asked.prompt) - 1) // 16 * 16
        assert done.reused_tokens == 0
        assert done.tokens == plain.generate([asked])[0].tokens
        # Half of it: the block that the prefix cuts is computed to its end, the ones after it are reused.
        changed = asking(tiny, (0, 1, 3, 2), head=head)
        counted = Counted(engine)
        engine.generate([asking(tiny, (3, 2), head=head)])
        part, computed = counted.prefill(changed)
        assert part.cached_tokens == 32
        assert part.reused_tokens == 2 * 11
        assert computed == len(changed.prompt) - 32 - 2 * 11


def test_exported_keys_and_values_are_exact_ones(tiny, plain):
    asked = asking(tiny)
    with opened(tiny, ReuseOptions(fraction=0)) as engine:
        engine.generate([asked])
        got, wanted = engine.keys_values(asked), plain.keys_values(asked)
        assert engine.logits([asked])[0].allclose(plain.logits([asked])[0], atol=1e-4)
    for name in wanted:
        torch.testing.assert_close(got[name], wanted[name], atol=1e-5, rtol=1e-5)


class TestWhose:
    def test_blocks_are_found_for_their_scopes_only(self, tiny):
        with opened(tiny, prefix_bytes=0) as engine:
            counted = Counted(engine)
            _, cold = counted.prefill(asking(tiny, scope=("alice", "nurses")))
            assert counted.prefill(asking(tiny, scope=("bob",)))[1] == cold
            assert counted.prefill(asking(tiny, scope=()))[1] == cold
            for scope in (("alice",), ("carol", "nurses"), ("bob",)):
                assert counted.prefill(asking(tiny, scope=scope))[1] == cold - 4 * 11

    def test_only_under_the_same_patches_gates_and_soft_prefix(self, tiny):
        a = random_factors(tiny, 1)
        soft, vectors = soft_prefix(tiny, 3)
        compositions = [
            ((), ()),
            ((patch(a),), (a,)),
            ((patch(a, (1.0, 1, 1, 0.5)),), (a,)),
            ((soft, patch(a)), (vectors, a)),
        ]
        with opened(tiny, prefix_bytes=0) as engine:
            counted = Counted(engine)
            for parts, bundles in compositions:
                row = asking(tiny, parts=parts, bundles=bundles)
                lead = sum(getattr(part, "length", 0) for part in parts)
                cold = counted.prefill(row)[1]
                assert cold == lead + len(row.prompt) + 3 * 4
                assert counted.prefill(row)[1] == cold - 4 * 11

    def test_forgetting_drops_them_and_overwrites_them(self, tiny):
        with opened(tiny, prefix_bytes=0) as engine:
            counted = Counted(engine)
            _, cold = counted.prefill(asking(tiny))
            bundles = [entry.bundle for entry in engine._blocks._entries]
            assert len(bundles) == 4
            engine.forget("bob")
            assert counted.prefill(asking(tiny))[1] < cold
            engine.forget("alice")
            assert engine._blocks.stats().entries == 0
            assert not any(tensor.any() for bundle in bundles for tensor in bundle.values())
            assert counted.prefill(asking(tiny))[1] == cold

    def test_what_was_read_before_something_was_forgotten_is_not_kept(self, tiny):
        with opened(tiny) as engine:
            mark = engine.mark()
            engine.forget("alice")
            engine.generate([replace(asking(tiny), mark=mark)])
            assert engine._blocks.stats().entries == 0
            engine.generate([replace(asking(tiny), mark=engine.mark())])
            assert engine._blocks.stats().entries == 4

    def test_forgotten_while_the_row_is_under_way(self, tiny):
        with opened(tiny, prefill_tokens=4) as engine, engine.reserved([asking(tiny)]) as (loop, [row]):
            while not row.assembly.assembled:
                loop._prefill([(row, 4)])
                engine.forget("alice")
            assert engine._blocks.stats().entries == 0

    def test_they_take_no_more_than_their_budget_and_are_not_needed(self, tiny):
        with opened(tiny, prefix_bytes=0, block_bytes=0) as engine, opened(tiny, prefix_bytes=0) as roomy:
            done = [engine.generate([asking(tiny)])[0].tokens for _ in range(2)]
            assert engine._blocks.stats().entries == 0
            assert done == [roomy.generate([asking(tiny)])[0].tokens] * 2
            used = roomy._blocks.stats().bytes
        with opened(tiny, prefix_bytes=0, block_bytes=used // 2) as engine:
            assert engine.generate([asking(tiny)])[0].tokens == done[0]
            assert 0 < engine._blocks.stats().bytes <= used // 2


class TestNotAtAll:
    def test_a_model_whose_keys_do_not_turn_computes_everything(self, caplog):
        model = tiny_language_model(architecture="gpt2")
        with opened(model, prefix_bytes=0) as engine, Engine(model, EngineOptions(prefix_bytes=0)) as plain:
            for _ in range(2):
                [done] = engine.generate([asking(model)])
                assert done.reused_tokens == 0
                assert done.tokens == plain.generate([asking(model)])[0].tokens
        assert sum("no rotary positions" in record.message for record in caplog.records) == 1

    @pytest.mark.parametrize("family", ["llama", "qwen2", "gemma"])
    def test_the_general_pass_can(self, family):
        model = tiny_language_model(architecture=family)
        with (
            opened(model, ALL, fused=False, prefill_tokens=9) as engine,
            Engine(model, EngineOptions(fused=False, prefix_bytes=0)) as plain,
        ):
            for _ in range(2):
                done = engine.generate(kinds(model))
                assert [one.tokens for one in done] == [one.tokens for one in plain.generate(kinds(model))]

    def test_a_row_that_keeps_no_prefix_or_starts_with_given_keys(self, tiny, plain):
        given = plain.keys_values(request(tiny, (1, 2, 3)))
        bundle = freeze({name: tensor.clone() for name, tensor in given.items()})
        mark = digest(bundle)
        part = KVPrefix(
            cache=mark, length=3, composition=composition_key(tiny.fingerprint, ()), origin="given"
        )
        rows = [replace(asking(tiny), keep_prefix=False), asking(tiny, parts=(part,), bundles=(bundle,))]
        with opened(tiny, ReuseOptions(fraction=0)) as engine:
            engine.generate([asking(tiny)])
            for row, done in zip(rows, engine.generate(rows), strict=True):
                assert done.reused_tokens == 0
                assert done.tokens == plain.generate([row])[0].tokens

    def test_picking_by_deviation_needs_a_pass_that_no_step_has_room_for(self):
        for pick in ("deviation", "both"):
            with pytest.raises(ValidationError):
                EngineOptions(block_reuse=ReuseOptions(pick=pick))
            with pytest.raises(InvalidInputError, match="first"):
                EngineOptions.parse({"block_reuse": {"pick": pick}})
        assert EngineOptions.parse({"block_reuse": {"fraction": 0.5}}).block_reuse.fraction == 0.5
        with pytest.raises(InvalidInputError, match=r"block_reuse\.fractoin"):
            EngineOptions.parse({"block_reuse": {"fractoin": 0.5}})

    @pytest.mark.parametrize(
        "spans", [((3, 3),), ((4, 9), (8, 12)), ((9, 12), (3, 5)), ((-1, 4),), ((0, 67),)]
    )
    def test_spans_that_are_none(self, plain, tiny, spans):
        asked = asking(tiny)
        assert len(asked.prompt) < 72
        with pytest.raises(InvalidInputError) as caught:
            plain.submit(replace(asked, prompt=asked.prompt[:67], blocks=spans))
        assert caught.value.hint


def test_the_pieces_of_a_prompt_follow_one_another(tiny):
    with opened(tiny) as engine, engine.reserved([asking(tiny)]) as (_, [row]):
        pieces = row.pieces(1000)
        assert [len(piece.tokens) for piece in pieces] == [len(HEAD), 11, 11, 11, 11]
        assert all(one.positions[-1] < other.positions[0] for one, other in pairwise(pieces[:2]))
        assert {piece.positions[0] for piece in pieces[1:]} == {len(HEAD)}


def test_a_steered_row_and_a_dead_one_leave_nothing_behind(tiny):
    factors = random_factors(tiny, 1)
    row = asking(tiny, parts=(patch(factors),), bundles=(factors,), max_new_tokens=30)
    with opened(tiny, prefill_tokens=4) as engine:
        generation = engine.submit(row)
        generation.steer({0: (0.0,) * 4})
        done = generation.result(20)
        assert done.steers
        assert done.reused_tokens
        stopped = engine.submit(row)
        stopped.cancel()
        stopped.result(20)
        assert engine._loop.table.pool.used == 0
