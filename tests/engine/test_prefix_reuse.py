"""Blocks in any order: exact where they must be, approximate where they say so, and never somebody else's."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from persona_sdk.engine import Engine
from persona_sdk.engine.forward.architectures import blocks_of
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.fused import FusedForward
from persona_sdk.engine.forward.general import GeneralForward
from persona_sdk.engine.forward.pool import KEYS, VALUES, TokenPool
from persona_sdk.engine.prefix.blocks import BlockAssembler
from persona_sdk.engine.prefix.frequency import rotary_frequency
from persona_sdk.engine.prefix.reuse import BlockPrompt, ReuseOptions, plan_reuse
from persona_sdk.errors import CompositionError, InvalidInputError, ModelError
from persona_sdk.plan import CompositionPlan, KVPrefix, SoftPrefix, composition_key
from persona_sdk.testing import tiny_language_model
from tests.engine.support import merged, patch, random_factors, request

tokens = st.lists(st.integers(0, 383), min_size=1, max_size=9).map(tuple)
prompts = st.builds(
    BlockPrompt.of,
    head=st.lists(st.integers(0, 383), max_size=5).map(tuple),
    blocks=st.lists(tokens, min_size=1, max_size=4).map(tuple),
    question=tokens,
)
HEAD, A, B, QUESTION = (5, 6, 7), (10, 11, 12, 13, 14), (20, 21, 22, 23), (30, 31, 32)
PROMPT = BlockPrompt.of(HEAD, (A, B), QUESTION)
ALL = ReuseOptions(fraction=1.0)


class Scene:
    """One model, one pass, one assembler; `calls` are the passes it was asked for."""

    def __init__(self, family="llama", fused=True, model=None):
        self.model = model or tiny_language_model(architecture=family)
        blocks = blocks_of(self.model.module) if fused else None
        self.forward = FusedForward(blocks) if blocks else GeneralForward(self.model)
        self.pool = TokenPool(
            self.forward.layers, device=self.model.device, dtype=torch.float32, budget_bytes=2**24
        )
        self.pool.take(3)
        self.plan = CompositionPlan(self.model.fingerprint)
        self.blocks = BlockAssembler(self.model, self.forward, self.pool)
        self.calls = []

    def run(self, forward, new):
        self.calls.append((forward, tuple(new.tokens), tuple(new.positions)))
        with torch.inference_mode():
            return forward(pack([new], self.model.device), self.pool, None)

    def assembled(self, prompt, options, **given):
        """Logits and keys and values of a row whose blocks were reused."""
        table = self.pool.take(len(prompt.tokens))
        new = self.blocks.assemble(self.run, table, given.pop("plan", self.plan), prompt, options, **given)
        logits = self.run(self.forward, new)
        kept = self.pool.export(table)
        self.pool.give(table)
        return logits[0], kept

    def full(self, ids):
        table = self.pool.take(len(ids))
        logits = self.run(self.forward, RowTokens(ids, range(len(ids)), table))
        kept = self.pool.export(table)
        self.pool.give(table)
        return logits[0], kept


_SCENES = {}


def scene(family="llama", fused=True):
    if (family, fused) not in _SCENES:
        _SCENES[family, fused] = Scene(family, fused)
    return _SCENES[family, fused]


def same(one, other, atol=1e-5):
    torch.testing.assert_close(one[0], other[0], atol=atol, rtol=1e-5)
    for name in (KEYS, VALUES):
        torch.testing.assert_close(one[1][name], other[1][name], atol=atol, rtol=1e-5)


KINDS = [("llama", True), ("qwen2", True), ("llama", False), ("qwen2", False), ("gemma", False)]


@pytest.mark.parametrize(("family", "fused"), KINDS)
@settings(max_examples=15, deadline=None)
@given(prompt=prompts, behind=st.booleans(), data=st.data())
def test_all_tokens_picked_is_the_full_prefill(family, fused, prompt, behind, data):
    one = scene(family, fused)
    pick = (
        data.draw(st.sampled_from(["first", "deviation", "both"]))
        if one.forward.__class__ is FusedForward
        else "first"
    )
    options = ReuseOptions(fraction=1.0, pick=pick, behind_head=behind)
    same(one.assembled(prompt, options), one.full(prompt.tokens))


@pytest.mark.parametrize(("family", "fused"), KINDS)
@settings(max_examples=8, deadline=None)
@given(block=tokens, question=tokens, head=tokens)
def test_a_block_where_it_was_made_is_exact_without_recomputing(family, fused, block, question, head):
    one, nothing = scene(family, fused), ReuseOptions(fraction=0, behind_head=True)
    for prompt in (BlockPrompt.of((), (block,), question), BlockPrompt.of(head, (block,), question)):
        same(one.assembled(prompt, nothing), one.full(prompt.tokens))


@pytest.mark.parametrize(("family", "fused"), KINDS)
def test_moved_keys_are_those_of_the_new_position_and_values_are_as_made(family, fused):
    one = scene(family, fused)
    _, kept = one.assembled(PROMPT, ReuseOptions(fraction=0, behind_head=False))
    start = len(HEAD) + len(A)
    # The same block in transformers, alone, its positions counted from where it now stands.
    from transformers import DynamicCache

    cache = DynamicCache()
    with torch.inference_mode():
        one.model.module(
            input_ids=torch.tensor([B]),
            attention_mask=torch.ones(1, len(B), dtype=torch.long),
            position_ids=torch.arange(start, start + len(B))[None],
            past_key_values=cache,
            use_cache=True,
        )
    for number, layer in enumerate(cache.layers):
        own = slice(start, start + len(B))
        torch.testing.assert_close(kept[KEYS][number, own], layer.keys[0].transpose(0, 1), atol=1e-5, rtol=0)
        torch.testing.assert_close(
            kept[VALUES][number, own], layer.values[0].transpose(0, 1), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize(("family", "fused"), [*KINDS, ("gpt2", False)])
@settings(max_examples=15, deadline=None)
@given(data=st.data())
def test_recomputing_any_positions_of_a_computed_row_changes_nothing(family, fused, data):
    """Passes over scattered positions, beside rows that prefill and decode."""
    if family == "gpt2":
        model = tiny_language_model(architecture="gpt2")
        forward = GeneralForward(model)
    else:
        model, forward = scene(family, fused).model, scene(family, fused).forward
    pool = TokenPool(forward.layers, device=model.device, dtype=torch.float32, budget_bytes=2**24)
    rows = data.draw(st.lists(tokens, min_size=1, max_size=3))
    tables = [pool.take(len(row)) for row in rows]
    whole = [RowTokens(row, range(len(row)), table) for row, table in zip(rows, tables, strict=True)]
    with torch.inference_mode():
        expected = forward(pack(whole, model.device), pool, None, every=True).split([len(r) for r in rows])
        before = [pool.export(table) for table in tables]
        new, chosen = [], []
        for row, table in zip(rows, tables, strict=True):
            places = sorted(data.draw(st.sets(st.integers(0, len(row) - 1), min_size=1)))
            wide = data.draw(st.booleans())  # a table may name more than the last token sees
            stop = len(row) if wide else places[-1] + 1
            new.append(RowTokens([row[place] for place in places], places, table[:stop]))
            chosen.append(places)
        got = forward(pack(new, model.device), pool, None, every=True).split([len(c) for c in chosen])
    for places, mine, wanted, table, kept in zip(chosen, got, expected, tables, before, strict=True):
        torch.testing.assert_close(mine, wanted[places], atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(pool.export(table)[KEYS], kept[KEYS], atol=1e-5, rtol=1e-5)
    if family == "gpt2":
        forward.close()


def test_the_order_of_blocks_counts():
    one = scene()
    for options in (ALL, ReuseOptions(fraction=0)):
        ab, _ = one.assembled(PROMPT, options)
        ba, _ = one.assembled(BlockPrompt.of(HEAD, (B, A), QUESTION), options)
        assert (ab - ba).abs().max() > 1e-3
    swapped = BlockPrompt.of(HEAD, (B, A), QUESTION)
    same(one.assembled(swapped, ALL), one.full((*HEAD, *B, *A, *QUESTION)))


def test_a_fraction_is_an_approximation_and_a_second_time_costs_no_block():
    one = Scene()
    part = ReuseOptions(fraction=0.5)
    logits, kept = one.assembled(PROMPT, part)
    exact, wanted = one.full(PROMPT.tokens)
    assert (logits - exact).abs().max() > 1e-4
    # Picked tokens attend to what was reused; the head is exact.
    torch.testing.assert_close(kept[KEYS][:, :3], wanted[KEYS][:, :3], atol=1e-5, rtol=0)
    one.calls.clear()
    again, _ = one.assembled(PROMPT, part)
    torch.testing.assert_close(again, logits, atol=1e-5, rtol=1e-5)
    # The first block stands where it was made: it is exact without any of its tokens.
    ((_, ids, positions),) = one.calls
    assert positions == (0, 1, 2, 8, 9, 12, 13, 14)
    assert ids == (*HEAD, *B[:2], *QUESTION)
    one.assembled(PROMPT, ReuseOptions(fraction=0.5, behind_head=False))
    assert one.calls[-1][2] == (0, 1, 2, 3, 4, 5, 8, 9, 12, 13, 14)


def test_the_pass_may_be_cut_into_ascending_chunks():
    one = scene()
    whole, kept = one.assembled(PROMPT, ReuseOptions(fraction=0.5))
    table = one.pool.take(len(PROMPT.tokens))
    new = one.blocks.assemble(one.run, table, one.plan, PROMPT, ReuseOptions(fraction=0.5))
    for start in range(0, len(new.tokens), 4):
        places = new.positions[start : start + 4]
        logits = one.run(
            one.forward, RowTokens(new.tokens[start : start + 4], places, table[: places[-1] + 1])
        )
    same((logits[0], one.pool.export(table)), (whole, kept))
    one.pool.give(table)


def test_deviation_finds_the_tokens_that_are_off_and_leaves_the_first_layers_exact():
    one = scene()
    _, kept = one.assembled(PROMPT, ReuseOptions(fraction=0.4, pick="deviation"))
    _, wanted = one.full(PROMPT.tokens)
    # Both layers of this model are probed.
    torch.testing.assert_close(kept[KEYS], wanted[KEYS], atol=1e-5, rtol=0)
    with pytest.raises(ModelError, match="general pass"):
        scene("llama", fused=False).assembled(PROMPT, ReuseOptions(pick="deviation"))
    far = torch.tensor([0, 3.0, 0, 2, 1, 0, 1, 9, 8])
    by_far = ReuseOptions(fraction=0.4, pick="deviation", behind_head=False)
    reuse = plan_reuse(PROMPT, by_far, deviation=far)
    assert reuse.computed == (0, 1, 2, 4, 6, 10, 11, 12, 13, 14)
    assert (reuse.starts, reuse.deltas, reuse.exact, reuse.approximate) == ((3, 8), (3, 8), 3, 5)
    behind = plan_reuse(PROMPT, by_far.model_copy(update={"behind_head": True}), deviation=far)
    assert behind.computed == (0, 1, 2, 10, 11, 12, 13, 14)
    assert (behind.starts, behind.deltas, behind.exact, behind.approximate) == ((3, 8), (0, 5), 8, 2)


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    gaps=st.lists(st.integers(0, 3), min_size=6, max_size=6),
    lead=st.integers(0, 3),
    data=st.data(),
)
def test_every_position_is_done_kept_or_computed_and_the_exact_ones_come_first(lengths, gaps, lead, data):
    spans, last = [], 0
    for gap, length in zip(gaps, lengths, strict=False):
        spans.append((last + gap, last + gap + length))
        last = spans[-1][1]
    prompt = BlockPrompt(tuple(range(last + 1 + gaps[-1])), tuple(spans))
    options = ReuseOptions(
        fraction=data.draw(st.sampled_from([0, 0.2, 1])), behind_head=data.draw(st.booleans())
    )
    done = data.draw(st.integers(0, lead + last))
    reuse = plan_reuse(prompt, options, lead=lead, done=done)
    stands = {place for span in reuse.blocks for place in range(*span)}
    # A block of which something is there already is none any more: the rest of it is exact, and computed.
    assert {place for start, stop in spans for place in range(lead + start, lead + stop)} - stands <= {
        place for start, stop in spans if lead + start < done for place in range(lead + start, lead + stop)
    }
    assert {*range(done), *stands, *reuse.computed} == set(range(lead + len(prompt.tokens)))
    off = stands - set(reuse.computed)
    first = {place for span in reuse.blocks if span[0] == reuse.made_at for place in range(*span)}
    assert reuse.approximate == len(off - first)
    assert all(place >= lead + reuse.exact for place in off - first)


def test_deviations_go_with_the_picks_that_need_them():
    with pytest.raises(InvalidInputError):
        plan_reuse(PROMPT, ReuseOptions(pick="both"))
    with pytest.raises(InvalidInputError):
        plan_reuse(PROMPT, ReuseOptions(), deviation=torch.zeros(9))
    with pytest.raises(InvalidInputError):
        plan_reuse(PROMPT, ReuseOptions(pick="both"), deviation=torch.zeros(4))
    with pytest.raises(InvalidInputError):
        BlockPrompt.of(HEAD, (A, ()), QUESTION)
    with pytest.raises(InvalidInputError):
        BlockPrompt.of(HEAD, (A,), ())


def test_positions_in_front_of_the_head_are_computed_too():
    """A soft prefix: the token embeddings of other tokens as vectors give what those tokens give."""
    one = scene()
    front = (40, 41)
    vectors = one.model.module.get_input_embeddings()(torch.tensor(front)).detach()
    plan = CompositionPlan(one.model.fingerprint, (SoftPrefix(vectors="0" * 64, length=2, origin="soft"),))
    table = one.pool.take(2 + len(PROMPT.tokens))
    new = one.blocks.assemble(one.run, table, plan, PROMPT, ALL, vectors=vectors)
    got = one.run(one.forward, new)[0], one.pool.export(table)
    one.pool.give(table)
    same(got, one.full((*front, *PROMPT.tokens)))


def test_a_block_is_found_by_composition_and_all_tokens_only():
    """Two personas, one text: what one computed must never reach the other."""
    base = tiny_language_model()
    factors = [random_factors(base, seed) for seed in (1, 2)]
    scenes = [Scene(model=merged(base, [(f, (1.0,) * 4)])) for f in factors]
    alice, bob = scenes
    bob.blocks.kept = alice.blocks.kept  # one cache for both
    plans = [CompositionPlan(base.fingerprint, (patch(f),)) for f in factors]
    nothing = ReuseOptions(fraction=0)
    for one, plan, other in ((alice, plans[0], None), (bob, plans[1], alice)):
        own, _ = one.assembled(PROMPT, nothing, plan=plan, scopes=("x",))
        solo = Scene(model=one.model)
        assert torch.equal(own, solo.assembled(PROMPT, nothing, plan=plan)[0])
        if other is not None:
            assert not torch.equal(own, other.assembled(PROMPT, nothing, plan=plans[0], scopes=("x",))[0])
    # Another gate, another head before the block, one more token or one less: computed anew each time.
    gate = CompositionPlan(base.fingerprint, (patch(factors[0], (1.0, 1, 1, 0.5)),))
    variants = [
        (gate, PROMPT),
        (plans[0], BlockPrompt.of((5, 6), (A, B), QUESTION)),
        (plans[0], BlockPrompt.of(HEAD, ((*A, 9), B[:-1]), QUESTION)),
    ]
    alice.calls.clear()
    alice.assembled(PROMPT, nothing, plan=plans[0], scopes=("x",))
    assert len(alice.calls) == 1
    for plan, prompt in variants:
        alice.calls.clear()
        alice.assembled(prompt, nothing, plan=plan, scopes=("x",))
        assert len(alice.calls) > 1


@pytest.mark.parametrize("pick", ["first", "deviation"])
def test_under_a_rows_own_patches_in_the_engines_pool(pick):
    model = tiny_language_model(layers=4)  # the first two are probed
    factors = random_factors(model, 7)
    row = request(model, PROMPT.tokens, (patch(factors),), (factors,))
    with Engine(model) as engine, engine.bench([row]) as steps, torch.inference_mode():
        loop, own = steps.loop, steps.rows[0]
        wanted = loop.table.pool.export(own.table[: len(PROMPT.tokens)])

        def run(forward, new):
            batch = pack([new], model.device)
            branches = loop.table.patches.batch([own.number], forward.spread(batch.lengths), model.device)
            return forward(batch, loop.table.pool, branches)

        assembler = BlockAssembler(model, loop.forward, loop.table.pool)
        for fraction in (0.0, 1.0):
            options = ReuseOptions(fraction=fraction, pick=pick)
            run(loop.forward, assembler.assemble(run, own.table, row.plan, PROMPT, options))
            got = loop.table.pool.export(own.table[: len(PROMPT.tokens)])
            assert torch.allclose(got[VALUES], wanted[VALUES], atol=1e-5) == (fraction == 1)
        torch.testing.assert_close(got[KEYS], wanted[KEYS], atol=1e-5, rtol=1e-5)


def test_forgetting_drops_a_scopes_blocks():
    one = Scene()
    one.assembled(PROMPT, ReuseOptions(), scopes=("alice",))
    assert one.blocks.kept.stats().entries > 0
    assert one.blocks.forget("alice") > 0
    assert one.blocks.kept.stats().entries == 0
    one.calls.clear()
    one.assembled(PROMPT, ReuseOptions(), scopes=("bob",))
    assert len(one.calls) == 4  # the head, either block behind it, all the rest
    mark = one.blocks.kept.mark()
    one.blocks.forget("carol")
    one.assembled(BlockPrompt.of(HEAD, ((1, 2, 3),), QUESTION), ReuseOptions(), mark=mark)
    one.calls.clear()
    one.assembled(BlockPrompt.of(HEAD, ((1, 2, 3),), QUESTION), ReuseOptions())
    assert len(one.calls) == 3  # it was not kept: somebody was forgotten meanwhile


def test_slots_come_back_and_a_cache_without_room_still_serves():
    one = Scene()
    one.blocks.kept = type(one.blocks.kept)(0)
    used = one.pool.used
    same(one.assembled(PROMPT, ALL), one.full(PROMPT.tokens))
    assert one.pool.used == used


def test_models_whose_keys_do_not_turn_are_refused():
    with pytest.raises(ModelError, match="no rotary positions"):
        Scene("gpt2", fused=False)
    model = tiny_language_model(seed=3)
    module = copy.deepcopy(model.module)
    module.model.rotary_emb.inv_freq.mul_(2.0)
    forward = FusedForward(blocks_of(model.module))
    pool = TokenPool(forward.layers, device=model.device, dtype=torch.float32, budget_bytes=2**22)
    assert torch.equal(rotary_frequency(model, forward, pool), model.module.model.rotary_emb.inv_freq)
    other = type(model).from_module("other", module, model.tokenizer)
    with pytest.raises(ModelError, match="turn otherwise"):
        rotary_frequency(other, forward, pool)
    assert pool.used == 0


def test_a_kv_prefix_is_refused():
    one = scene()
    part = KVPrefix(
        cache="0" * 64, length=2, composition=composition_key(one.model.fingerprint, ()), origin="kv"
    )
    with pytest.raises(CompositionError):
        one.assembled(PROMPT, ALL, plan=CompositionPlan(one.model.fingerprint, (part,)))
