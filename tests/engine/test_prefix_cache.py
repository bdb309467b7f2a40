"""The host tier of prefixes: what is found is what was computed, for equal compositions only."""

import gc
import hashlib
import threading
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.engine.prefix.bundles import shape_of
from persona_sdk.engine.prefix.cache import PrefixCache
from persona_sdk.engine.prefix.keys import chain, composition_key, lead_length, root
from persona_sdk.errors import InvalidInputError
from persona_sdk.plan import CompositionPlan, LowRankPatch, SoftPrefix

BLOCK = 4
DIGESTS = [f"{n:02x}" * 32 for n in range(1, 5)]
TOKEN_BYTES = 2 * 2 * 1 * 2 * 4  # keys and values, layers, heads, dim, float32


def patch(factors=DIGESTS[0], gate=(1.0, 0.5)):
    return LowRankPatch(factors=factors, rank=len(gate), gate=gate, origin="x")


def soft(vectors=DIGESTS[1], length=2):
    return SoftPrefix(vectors=vectors, length=length, origin="s")


def plan_of(*parts, base="base"):
    return CompositionPlan(base, parts)


def kv(plan, tokens):
    """Stand-in for a forward pass: the numbers of a position are a function of all that is up to it."""
    columns = []
    lead = lead_length(plan)
    for end in range(1, lead + len(tokens) + 1):
        seen = repr((composition_key(plan), min(end, lead), tuple(tokens[: max(end - lead, 0)])))
        code = hashlib.sha256(seen.encode()).digest()[:8]
        columns.append(torch.tensor(list(code), dtype=torch.float32).reshape(2, 2, 1, 2) + 1)
    keys_values = torch.stack(columns, dim=2).contiguous()  # [2, layers, tokens, heads, dim]
    return {"keys": keys_values[0].clone(), "values": keys_values[1].clone()}


EVERYBODY = ("alice", "bob", "carol", "dave", "nurses", "x", *map(str, range(20)))


class Cache(PrefixCache):
    """Looked into by everybody at once, without asking the spill, unless scopes are given."""

    def lookup(self, plan, tokens, scopes=None, **options):
        if scopes is None:
            return super().lookup(plan, tokens, EVERYBODY, spill=False, **options)
        return super().lookup(plan, tokens, scopes, **options)


def cache_of(tokens=1000, **options):
    return Cache(tokens * TOKEN_BYTES, block=BLOCK, **options)


def same(bundle, expected):
    return all(torch.equal(bundle[name], expected[name]) for name in ("keys", "values"))


def put(cache, plan, tokens, scopes=("alice",), **options):
    return cache.insert(plan, tokens, kv(plan, tokens), scopes, **options)


PLAIN = plan_of()
PROMPT = tuple(range(10))


class TestLookup:
    def test_an_empty_cache_knows_nothing(self):
        assert cache_of().lookup(PLAIN, PROMPT) is None
        assert cache_of().lookup(PLAIN, ()) is None

    def test_the_longest_boundary_that_both_prompts_share(self):
        cache = cache_of()
        assert put(cache, PLAIN, PROMPT)
        for prompt, expected in [
            (PROMPT, 8),
            (PROMPT[:9], 8),
            (PROMPT[:8], 4),  # one token must be left to compute
            ((*PROMPT[:7], 99, 8, 9), 4),
            ((*PROMPT[:5], 99), 4),
        ]:
            with cache.lookup(PLAIN, prompt) as hit:
                assert (hit.tokens, hit.length) == (expected, expected)
                assert same(hit.bundle, kv(PLAIN, prompt[:expected]))
        assert cache.lookup(PLAIN, (99, *PROMPT)) is None
        assert cache.lookup(PLAIN, PROMPT[:4]) is None

    def test_a_soft_prefix_alone_counts(self):
        cache, plan = cache_of(), plan_of(soft())
        put(cache, plan, PROMPT[:3])
        with cache.lookup(plan, (7,)) as hit:
            assert (hit.tokens, hit.length) == (0, 2)
            assert same(hit.bundle, kv(plan, ()))
        put(cache, plan, PROMPT)
        assert cache.lookup(plan, PROMPT).length == 10
        assert cache.lookup(plan, (99,)).length == 2
        assert cache.stats().bytes == 10 * TOKEN_BYTES

    def test_short_prompts_are_not_kept(self):
        cache = cache_of()
        assert not put(cache, PLAIN, PROMPT[:3])
        assert cache.stats().entries == 0

    def test_hashes_only_find(self, monkeypatch):
        """With every hash equal, tokens and composition still decide."""
        module = "persona_sdk.engine.prefix.cache"
        monkeypatch.setattr(f"{module}.chain", lambda key, tokens, block: ["same"] * (len(tokens) // block))
        monkeypatch.setattr(f"{module}.root", lambda key, block: "same")
        cache, other = cache_of(), (9, 8, 7, 6, 5)
        put(cache, PLAIN, PROMPT)
        put(cache, plan_of(soft()), PROMPT)
        assert cache.lookup(PLAIN, other) is None
        assert cache.lookup(plan_of(patch()), PROMPT) is None
        put(cache, PLAIN, other)
        assert same(cache.lookup(PLAIN, other).bundle, kv(PLAIN, other[:4]))
        cache.forget("alice")
        assert cache.stats().bytes == 0

    def test_a_bundle_of_another_size_is_refused(self):
        with pytest.raises(InvalidInputError):
            cache_of().insert(PLAIN, PROMPT, kv(PLAIN, PROMPT[:9]))
        with pytest.raises(InvalidInputError):
            cache_of().insert(PLAIN, PROMPT, {"keys": torch.zeros(1)})
        with pytest.raises(InvalidInputError):
            PrefixCache(-1)

    def test_another_shape_than_the_pools_is_not_kept(self):
        shape = shape_of(kv(PLAIN, PROMPT), 10)
        assert put(cache_of(shape=shape), PLAIN, PROMPT)
        assert not put(cache_of(shape=replace(shape, dtype=torch.bfloat16)), PLAIN, PROMPT)

    def test_the_cache_has_memory_of_its_own(self):
        cache, wide = cache_of(), kv(PLAIN, range(32))
        pool = {name: tensor[:, :8] for name, tensor in wide.items()}
        cache.insert(PLAIN, range(8), pool, ["alice"])
        assert cache.stats().bytes == 8 * TOKEN_BYTES
        cache.forget("alice")
        assert same(wide, kv(PLAIN, range(32)))


class TestBudget:
    def test_the_least_recently_used_leaves(self):
        cache = cache_of(tokens=16)
        prompts = [tuple(range(n, n + 8)) for n in (0, 100, 200)]
        put(cache, PLAIN, prompts[0])
        put(cache, PLAIN, prompts[1])
        cache.lookup(PLAIN, (*prompts[0], 1)).release()
        put(cache, PLAIN, prompts[2])
        assert cache.lookup(PLAIN, (*prompts[1], 1)) is None
        assert cache.lookup(PLAIN, (*prompts[0], 1)).tokens == 8
        assert cache.lookup(PLAIN, (*prompts[2], 1)).tokens == 8
        stats = cache.stats()
        assert (stats.entries, stats.bytes, stats.evicted) == (2, 16 * TOKEN_BYTES, 1)

    def test_what_is_larger_than_the_budget_is_not_kept_and_throws_nothing_out(self):
        cache = cache_of(tokens=8)
        put(cache, PLAIN, PROMPT[:4])
        assert not put(cache, PLAIN, range(50, 62))
        assert cache.lookup(PLAIN, PROMPT).tokens == 4
        assert not put(cache_of(tokens=0), PLAIN, PROMPT)

    def test_what_prompts_share_is_kept_once(self):
        cache = cache_of()
        start = (1,) * 8
        prompts = [(*start, n, n, n, n) for n in range(2, 7)]
        for prompt in prompts:
            put(cache, PLAIN, prompt)
            put(cache, PLAIN, prompt[:9])  # covered already
        assert cache.stats().bytes == (8 + 5 * 4) * TOKEN_BYTES
        for prompt in prompts:
            with cache.lookup(PLAIN, (*prompt, 0)) as hit:
                assert len(hit.parts) == 1 + (prompt != prompts[0])
                assert same(hit.bundle, kv(PLAIN, prompt))

    def test_what_others_continue_leaves_last(self):
        cache = cache_of(tokens=16)
        start = (1,) * 8
        for n in range(2, 9):
            put(cache, PLAIN, (*start, n, n, n, n))
        for n, expected in [(2, 12), (7, 8), (8, 12)]:  # the first holds the start and cannot go before it
            assert cache.lookup(PLAIN, (*start, n, n, n, n, 0)).tokens == expected
        put(cache, PLAIN, range(50, 66))
        assert cache.lookup(PLAIN, (*start, 0)) is None

    def test_only_what_is_new_has_to_be_given(self):
        cache, plan = cache_of(), plan_of(soft())
        whole = kv(plan, PROMPT[:8])
        rest = {name: tensor[:, 6:] for name, tensor in whole.items()}
        assert not cache.insert(plan, PROMPT[:8], rest, ["bob"], start=4)  # what is before it is not here
        put(cache, plan, PROMPT[:4])
        assert cache.insert(plan, PROMPT[:8], rest, ["bob"], start=4)
        assert same(cache.lookup(plan, PROMPT).bundle, whole)
        with pytest.raises(InvalidInputError):
            cache.insert(plan, PROMPT[:8], whole, ["bob"], start=4)

    def test_a_block_more_is_wanted(self):
        cache = cache_of()
        assert [cache.wants(n, 4) for n in (4, 7, 8, 9)] == [False, False, True, True]
        assert not cache_of(tokens=0).wants(100, 0)


class TestForget:
    def test_only_what_was_made_for_the_scope_goes(self):
        cache = cache_of()
        put(cache, PLAIN, PROMPT, ["alice", "nurses"])
        put(cache, plan_of(patch()), PROMPT, ["bob", "nurses"])
        put(cache, plan_of(soft()), PROMPT, ["carol"])
        assert cache.forget("bob") == 1
        assert cache.lookup(plan_of(patch()), PROMPT) is None
        assert cache.forget("nurses") == 1
        assert cache.lookup(PLAIN, PROMPT) is None
        assert cache.lookup(plan_of(soft()), PROMPT).length == 10
        cache.clear()
        assert cache.stats().entries == cache.stats().bytes == 0

    def test_what_continues_it_goes_too(self):
        cache = cache_of()
        put(cache, PLAIN, PROMPT[:4], ["alice"])
        put(cache, PLAIN, (*PROMPT[:4], 1, 1, 1, 1), ["alice", "nurses"])
        put(cache, PLAIN, (*PROMPT[:4], 2, 2, 2, 2), ["alice"])
        put(cache, plan_of(patch()), PROMPT, ["bob"])
        assert cache.forget("dave") == 0
        assert cache.forget("alice") == 3
        assert cache.lookup(PLAIN, PROMPT) is None
        assert cache.lookup(plan_of(patch()), PROMPT).tokens == 8

    def test_the_numbers_are_overwritten(self):
        cache, bundle = cache_of(), kv(PLAIN, PROMPT[:8])
        cache.insert(PLAIN, PROMPT[:8], bundle, ["alice"])  # the very tensors: they belong to the cache now
        cache.forget("alice")
        assert not bundle["keys"].any()
        assert not bundle["values"].any()

    def test_also_of_what_was_evicted(self):
        cache, bundle = cache_of(tokens=8), kv(PLAIN, PROMPT[:8])
        cache.insert(PLAIN, PROMPT[:8], bundle, ["alice"])
        put(cache, PLAIN, range(50, 58))
        assert not bundle["keys"].any()

    def test_also_tensors_of_inference_mode(self):
        cache = cache_of()
        with torch.inference_mode():
            bundle = kv(PLAIN, PROMPT[:8])
            cache.insert(PLAIN, PROMPT[:8], bundle, ["alice"])
        cache.forget("alice")
        assert not bundle["keys"].any()

    def test_not_while_a_row_reads_them(self):
        cache, bundle = cache_of(), kv(PLAIN, PROMPT[:8])
        cache.insert(PLAIN, PROMPT[:8], bundle, ["alice"])
        put(cache, PLAIN, (*PROMPT[:8], 8, 9, 10, 11), ["bob"])
        one, two = cache.lookup(PLAIN, PROMPT), cache.lookup(PLAIN, range(13))
        cache.forget("alice")
        assert cache.lookup(PLAIN, PROMPT) is None
        with one:
            assert same(one.bundle, kv(PLAIN, PROMPT[:8]))
        one.release()  # twice does no harm
        assert bundle["keys"].any()
        del two  # a hit that nobody gave back
        gc.collect()
        assert not bundle["keys"].any()

    def test_a_row_that_was_under_way_does_not_bring_it_back(self):
        cache = cache_of()
        mark = cache.mark()
        cache.forget("alice")
        assert not put(cache, PLAIN, PROMPT, mark=mark)
        assert put(cache, PLAIN, PROMPT, mark=cache.mark())


# Leaks ------------------------------------------------------------------------------------------------

gates = st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.sampled_from([0.5, 1.0]))
patches = st.lists(st.builds(patch, st.sampled_from(DIGESTS[:2]), gates), max_size=2)
softs = st.lists(st.builds(soft, st.sampled_from(DIGESTS[2:]), st.integers(1, 2)), max_size=2)
plans = st.builds(
    lambda base, low, lead: plan_of(*low, *lead, base=base), st.sampled_from(["b", "c"]), patches, softs
)
prompts = st.lists(st.integers(0, 1), min_size=1, max_size=14).map(tuple)


@given(st.lists(st.tuples(plans, prompts), min_size=1, max_size=12), plans, prompts, st.integers(0, 60))
def test_what_is_found_is_what_the_row_would_have_computed(made, plan, prompt, budget):
    """Whatever else is kept, and whatever was evicted: a hit's numbers are those of this plan and prompt."""
    cache = cache_of(tokens=budget)
    for number, (other, tokens) in enumerate(made):
        put(cache, other, tokens, [str(number)])
        assert cache.stats().bytes <= budget * TOKEN_BYTES
    hit = cache.lookup(plan, prompt)
    if hit is not None:
        assert hit.tokens < len(prompt)
        assert same(hit.bundle, kv(plan, prompt[: hit.tokens]))
    if sum(lead_length(other) + len(tokens) for other, tokens in made) <= budget:
        lead = lead_length(plan)
        shared = [
            length
            for other, tokens in made
            if composition_key(other) == composition_key(plan)
            for length in range(0 if lead else BLOCK, len(prompt), BLOCK)
            if length <= len(tokens) and tokens[:length] == prompt[:length]
        ]
        assert (hit.tokens if hit else None) == max(shared, default=None)
    for number in range(len(made)):
        cache.forget(str(number))
    assert cache.stats().entries == cache.stats().bytes == 0
    assert cache.lookup(plan, prompt) is None


CHANGES = {
    "base": lambda plan: replace(plan, base="another"),
    "factors": lambda plan: replace(plan, parts=(patch(DIGESTS[3]), *plan.parts[1:])),
    "gate": lambda plan: replace(plan, parts=(patch(gate=(1.0, 0.5000001)), *plan.parts[1:])),
    "patches": lambda plan: replace(plan, parts=plan.parts[1:]),
    "order": lambda plan: replace(plan, parts=(plan.parts[1], plan.parts[0], *plan.parts[2:])),
    "soft vectors": lambda plan: replace(plan, parts=(*plan.parts[:2], soft(DIGESTS[3]))),
    "soft length": lambda plan: replace(plan, parts=(*plan.parts[:2], soft(length=3))),
}


@pytest.mark.parametrize("what", CHANGES)
@given(tokens=st.lists(st.integers(0, 9), min_size=BLOCK + 1, max_size=20))
def test_one_change_of_the_composition_and_nothing_is_shared(what, tokens):
    cache = cache_of()
    plan = plan_of(patch(), patch(DIGESTS[2]), soft())
    put(cache, plan, tokens)
    assert cache.lookup(plan, tokens) is not None
    assert cache.lookup(CHANGES[what](plan), tokens) is None


@given(prompts, prompts, prompts, st.integers(0, 14))
def test_a_hit_and_the_rest_make_the_whole(first, second, third, plan_length):
    """As the engine uses it: look up, compute the rest, give only that back."""
    cache, plan = cache_of(), plan_of(*[soft(length=1 + plan_length)] * (plan_length % 2))
    lead = lead_length(plan)
    for prompt in (first, second, third):
        hit = cache.lookup(plan, prompt)
        start = hit.tokens if hit else 0
        whole = kv(plan, prompt)
        if hit:
            assert same(hit.bundle, kv(plan, prompt[:start]))
        rest = {name: tensor[:, lead + start if start else 0 :] for name, tensor in whole.items()}
        cache.insert(plan, prompt, rest, ["x"], start=start)
        kept = cache.keepable(len(prompt))
        assert (cache.lookup(plan, (*prompt, 9)) is not None) == (kept + lead > 0)
        if kept:
            assert same(cache.lookup(plan, (*prompt, 9)).bundle, kv(plan, prompt[:kept]))


@given(st.lists(st.integers(0, 9), min_size=BLOCK + 1, max_size=20), st.data())
def test_one_other_token_and_nothing_from_its_block_on_is_shared(tokens, data):
    cache = cache_of()
    put(cache, PLAIN, tokens)
    place = data.draw(st.integers(0, len(tokens) - 1))
    other = [*tokens[:place], tokens[place] + 10, *tokens[place + 1 :]]
    hit = cache.lookup(PLAIN, other)
    assert (hit.tokens if hit else 0) <= place


# Behind the cache -------------------------------------------------------------------------------------


class Disk:
    """A spill over a dictionary by scope; remembers what it was asked for."""

    def __init__(self, owner="alice", *entries):
        self.kept = {
            (owner, chain(composition_key(plan), tokens, BLOCK)[-1]): (tuple(tokens), bundle)
            for plan, tokens, bundle in entries
        }
        self.asked = []

    def load(self, hashes, scopes):
        self.asked.append(len(hashes))
        return next((self.kept[s, h] for h in hashes for s in scopes if (s, h) in self.kept), None)


class TestSpill:
    def test_a_miss_is_answered_from_disk_once(self):
        disk = Disk("alice", (PLAIN, PROMPT[:8], kv(PLAIN, PROMPT[:8])))
        cache = cache_of(spill=disk)
        for _ in range(2):
            with cache.lookup(PLAIN, PROMPT, ["alice"]) as hit:
                assert same(hit.bundle, kv(PLAIN, PROMPT[:8]))
        assert disk.asked == [2]
        assert cache.stats().loaded == 1
        assert cache.forget("alice") == 1

    def test_nobody_elses(self):
        cache = cache_of(spill=Disk("alice", (PLAIN, PROMPT[:8], kv(PLAIN, PROMPT[:8]))))
        assert cache.lookup(PLAIN, PROMPT, ["bob"]) is None

    def test_a_longer_one_on_disk_beats_a_shorter_one_in_memory(self):
        cache = cache_of(spill=Disk("alice", (PLAIN, PROMPT[:8], kv(PLAIN, PROMPT[:8]))))
        put(cache, PLAIN, (*PROMPT[:4], 99, 99, 99, 99))
        assert cache.lookup(PLAIN, PROMPT, ["alice"]).tokens == 8
        assert cache.lookup(PLAIN, (*PROMPT[:4], 5), ["alice"]).tokens == 4

    def test_one_beyond_the_budget_serves_its_request(self):
        cache = cache_of(tokens=4, spill=Disk("alice", (PLAIN, PROMPT[:8], kv(PLAIN, PROMPT[:8]))))
        put(cache, PLAIN, PROMPT[:4])
        assert same(cache.lookup(PLAIN, PROMPT, ["alice"]).bundle, kv(PLAIN, PROMPT[:8]))
        assert cache.stats().bytes == 4 * TOKEN_BYTES

    @pytest.mark.parametrize(
        ("tokens", "bundle"),
        [
            ((*PROMPT[:7], 99), kv(PLAIN, PROMPT[:8])),  # other tokens
            (PROMPT[:7], kv(PLAIN, PROMPT[:7])),  # no whole block
            (PROMPT, kv(PLAIN, PROMPT)),  # all of the prompt
            (PROMPT[:8], kv(PLAIN, PROMPT[:7])),  # too few
            (PROMPT[:8], {"keys": torch.zeros(2)}),
            (PROMPT[:8], {name: tensor.double() for name, tensor in kv(PLAIN, PROMPT[:8]).items()}),
        ],
    )
    def test_what_does_not_fit_is_not_used(self, tokens, bundle):
        class Liar:
            def load(self, hashes, scopes):
                return tokens, bundle

        shape = shape_of(kv(PLAIN, PROMPT), 10)
        assert cache_of(spill=Liar(), shape=shape).lookup(PLAIN, PROMPT, ["alice"]) is None
        assert cache_of(spill=Liar(), shape=shape).stats().loaded == 0

    def test_it_is_asked_for_somebody_only_and_may_be_asked_ahead(self):
        disk = Disk("alice", (PLAIN, PROMPT[:8], kv(PLAIN, PROMPT[:8])))
        cache = cache_of(spill=disk)
        assert cache.lookup(PLAIN, PROMPT) is None
        assert disk.asked == []
        cache.prefetch(PLAIN, PROMPT, ["alice"])
        assert cache.lookup(PLAIN, PROMPT).tokens == 8
        assert (cache.stats().lookups, cache.stats().hits) == (2, 1)

    def test_a_soft_prefix_comes_from_disk_too(self):
        plan = plan_of(soft())

        class Roots:
            def load(self, hashes, scopes):
                return ((), kv(plan, ())) if root(composition_key(plan), BLOCK) in hashes else None

        assert same(cache_of(spill=Roots()).lookup(plan, PROMPT, ["alice"]).bundle, kv(plan, ()))

    def test_what_is_forgotten_while_it_is_read_is_not_kept(self):
        cache = cache_of()

        class Slow:
            def load(self, hashes, scopes):
                cache.forget("alice")
                return PROMPT[:8], kv(PLAIN, PROMPT[:8])

        cache.spill = Slow()
        assert cache.lookup(PLAIN, PROMPT, ["alice"]) is None
        assert cache.stats().entries == 0


def test_many_threads():
    cache = cache_of(tokens=200)
    faults = []

    def work(seed):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(150):
            draw = torch.randint(0, 2, (14,), generator=generator).tolist()
            plan = plan_of(patch(DIGESTS[draw[0]]), soft(DIGESTS[draw[1]]))
            hit = cache.lookup(plan, draw[2:])
            if hit is not None:
                with hit:
                    if not same(hit.bundle, kv(plan, draw[2 : 2 + hit.tokens])):
                        faults.append(draw)
            put(cache, plan, draw[2:], [str(seed)], mark=cache.mark())
            if draw[2:5] == [1, 1, 1]:
                cache.forget(str(seed))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults
    for seed in range(4):
        cache.forget(str(seed))
    stats = cache.stats()
    assert (stats.entries, stats.bytes) == (0, 0)
    assert stats.hits > 0


class TestWhoMayFind:
    """Time to the first token must not tell one persona what another was told."""

    @pytest.mark.parametrize(
        ("made", "reader", "found"),
        [
            (["alice"], ["alice"], True),
            (["alice", "nurses"], ["bob", "nurses"], True),  # they share a group
            (["alice"], ["bob"], False),
            (["alice"], [], False),
            ([], ["alice"], False),
            ([], [], True),
        ],
    )
    def test_only_whom_it_was_computed_for(self, made, reader, found):
        cache = cache_of()
        put(cache, PLAIN, PROMPT, made)
        assert (cache.lookup(PLAIN, PROMPT, reader) is not None) == found

    def test_who_computes_the_same_may_find_it_from_then_on_and_forgetting_either_drops_it(self):
        cache = cache_of()
        put(cache, PLAIN, PROMPT, ["alice"])
        put(cache, PLAIN, PROMPT, ["bob"])
        for reader in ("alice", "bob"):
            cache.lookup(PLAIN, PROMPT, [reader]).release()
        cache.forget("bob")
        assert cache.lookup(PLAIN, PROMPT, ["alice"]) is None
