"""The scheduler's policy: pure, indifferent to order, within its budgets, careful about what it promotes."""

from datetime import UTC, datetime, timedelta

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import insert

from persona_sdk.memory import CubeDraft, Source
from persona_sdk.memory.cube import TRUST_ORDER, Origin
from persona_sdk.memory.decisions import Scene
from persona_sdk.memory.facts import ADAPTER, PREFIX, PROMOTION, REJECTION, CubeFacts, facts_of
from persona_sdk.memory.scheduler import SchedulerOptions, decide, explain
from persona_sdk.memory.schema import to_column, uses
from persona_sdk.memory.screening import QUARANTINED
from persona_sdk.memory.slots import UNCONFIRMED
from persona_sdk.memory.turns import TURN
from persona_sdk.memory.uses import HALF_LIFE_DAYS, of, record

NOW = datetime(2026, 6, 1, tzinfo=UTC)
OPTIONS = SchedulerOptions(kv_bytes=100, lora_bytes=1000, activation_bytes=100_000, parametric_bytes=5000)
DAY = timedelta(days=1)


def text(name, **known):
    since = known.pop("since", 60)
    used = known.pop("idle", 1)
    hits = known.get("hits", 0)
    facts = {"tokens": 20, "bytes": 80, "strength": float(hits), "created_at": NOW - since * DAY}
    facts |= {"stable_since": NOW - since * DAY, "last_used": NOW - used * DAY if hits else None}
    return CubeFacts(id=name, kind="plaintext", **{**facts, **known})


def derived(name, sources, *, semantic_type=PREFIX, kind="activation", since=1, **known):
    at = NOW - since * DAY
    facts = {"bytes": 2000, "created_at": at, "stable_since": at, "derived": True, **known}
    return CubeFacts(id=name, kind=kind, semantic_type=semantic_type, sources=tuple(sources), **facts)


def adapter(name, sources, **known):
    return derived(name, sources, semantic_type=ADAPTER, kind="parametric", **{"bytes": 1000, **known})


def promotion(name, sources):
    return derived(name, sources, semantic_type=PROMOTION, bytes=0)


def moves(decisions, kind):
    return [set(made.cubes) for made in decisions if made.kind == kind]


def reason_of(decisions, cube_id):
    return " ".join(made.reason for made in decisions if cube_id in made.cubes)


# What must neither stand in every prompt nor enter weights, however often it was used.
DOUBTS = [
    ({"valid_to": NOW}, "no longer so"),
    ({"valid_from": NOW + DAY}, "not so yet"),
    ({"tags": ("mine", UNCONFIRMED)}, "unconfirmed"),
    ({"tags": (QUARANTINED,)}, "quarantined"),
    ({"semantic_type": TURN}, "turn"),
]

STATES = st.sampled_from(["generated", "activated", "merged", "archived", "frozen"])


@st.composite
def scenes(draw):
    """Texts of all sorts, and derived cubes over some of them."""
    count = draw(st.integers(0, 8))
    texts = [
        text(
            f"t{number}",
            state=draw(STATES),
            hits=draw(st.integers(0, 60)),
            tokens=draw(st.integers(1, 200)),
            bytes=draw(st.integers(1, 800)),
            since=draw(st.integers(0, 400)),
            idle=draw(st.integers(0, 400)),
            pinned=draw(st.booleans()),
            trust=draw(st.sampled_from(TRUST_ORDER)),
            sensitivity=draw(st.sampled_from(["normal", "personal", "special"])),
            priority=draw(st.integers(-1, 1)),
            expires_at=draw(st.sampled_from([None, NOW - DAY, NOW + DAY])),
            valid_from=draw(st.sampled_from([None, NOW - DAY, NOW + DAY])),
            valid_to=draw(st.sampled_from([None, NOW, NOW + DAY])),
            tags=draw(st.sampled_from([(), (), (UNCONFIRMED,), (QUARANTINED,)])),
        )
        for number in range(count)
    ]
    names = [one.id for one in texts]
    some = st.lists(st.sampled_from(names), unique=True, max_size=4) if names else st.just([])
    cubes = [*texts]
    for number in range(draw(st.integers(0, 5))):
        make = draw(st.sampled_from([derived, adapter]))
        known = {
            "bytes": draw(st.integers(0, 4000)),
            "state": draw(STATES),
            "since": draw(st.integers(0, 60)),
        }
        known |= {"derived": draw(st.booleans()), "complete": draw(st.booleans())}
        cubes.append(make(f"d{number}", draw(some), **known))
    if draw(st.booleans()):
        cubes.append(promotion("p0", draw(some)))
    if draw(st.booleans()):
        cubes.append(derived("r0", draw(some), semantic_type=REJECTION, kind="parametric", bytes=0))
    return cubes


BUDGETS = st.builds(
    SchedulerOptions,
    activation_bytes=st.integers(0, 60_000),
    parametric_bytes=st.integers(0, 6000),
    text_bytes=st.none() | st.integers(0, 3000),
    kv_bytes=st.just(100),
    lora_bytes=st.integers(1, 3000),
    prefix_tokens=st.integers(0, 600),
    weights_min_texts=st.integers(1, 3),
    background_share=st.sampled_from([0.0, 0.02, 1.0]),
)


class TestWhatAlwaysHolds:
    @given(scenes(), BUDGETS, st.randoms(use_true_random=False))
    def test_the_order_of_the_facts_does_not_matter(self, cubes, options, random):
        first = decide(cubes, options, NOW)
        shuffled = list(cubes)
        random.shuffle(shuffled)
        assert decide(shuffled, options, NOW) == first

    @given(scenes(), BUDGETS)
    def test_every_cube_is_in_a_decision_and_none_leaves_twice(self, cubes, options):
        decisions = decide(cubes, options, NOW)
        assert {i for made in decisions for i in made.cubes} == {one.id for one in cubes}
        leaving = [i for made in decisions if made.bytes < 0 and len(made.cubes) == 1 for i in made.cubes]
        assert len(leaving) == len(set(leaving))
        kept = [i for made in decisions if made.kind == "keep" for i in made.cubes]
        assert not set(kept) & {i for made in decisions if made.kind != "keep" for i in made.cubes}

    @given(scenes(), BUDGETS)
    def test_budgets_hold_unless_what_may_not_be_dropped_alone_exceeds_them(self, cubes, options):
        decisions = decide(cubes, options, NOW)
        gone = {i for made in decisions if made.bytes <= 0 and made.kind != "keep" for i in made.cubes}
        for kind, budget, build in [
            ("activation", options.activation_bytes, "text_to_kv"),
            ("parametric", options.parametric_bytes, "text_to_weights"),
        ]:
            mine = [one for one in cubes if one.kind == kind]
            droppable = [one for one in mine if one.derived and one.state != "frozen" and one.bytes]
            fixed = sum(one.bytes for one in mine if one not in droppable and one.id not in gone)
            built = [made for made in decisions if made.kind == build]
            if kind == "activation":
                new = sum(made.bytes for made in built)
            else:  # the new adapter takes the place of the old ones
                new = options.lora_bytes if built else 0
                droppable = [] if built else droppable
            after = fixed + new + sum(one.bytes for one in droppable if one.id not in gone)
            assert after <= max(budget, fixed)

    @given(scenes(), BUDGETS)
    def test_the_frozen_are_left_alone(self, cubes, options):
        frozen = {one.id for one in cubes if one.state == "frozen"}
        for made in decide(cubes, options, NOW):
            if made.kind not in ("keep", "text_to_kv"):
                assert not frozen & set(made.cubes)
        pinned = {one.id for one in cubes if one.pinned}
        promoted = {i for one in cubes if one.semantic_type == PROMOTION for i in one.sources}
        for cubes_of in moves(decide(cubes, options, NOW), "text_to_kv"):
            assert frozen & cubes_of <= pinned | promoted  # it stands there already

    @given(scenes(), BUDGETS)
    def test_weights_hold_nothing_special_untrusted_or_short_lived(self, cubes, options):
        known = {one.id: one for one in cubes}
        for chosen in moves(decide(cubes, options, NOW), "text_to_weights"):
            for one in map(known.__getitem__, chosen):
                assert one.kind == "plaintext"
                assert one.sensitivity != "special"
                assert one.trust in ("system", "confirmed", "user")
                assert one.state not in ("frozen", "archived")
                assert one.expires_at is None
                assert one.valid_to is None
                assert not one.tags
                assert one.valid_from is None or one.valid_from <= NOW
                assert one.hits >= options.weights_min_hits
                assert NOW - one.stable_since >= options.weights_min_days * DAY

    @given(scenes(), BUDGETS)
    def test_text_becomes_keys_only_if_hits_times_tokens_exceed_the_cost(self, cubes, options):
        known = {one.id: one for one in cubes}
        for made in decide(cubes, options, NOW):
            if made.kind == "text_to_kv":
                texts = [known[i] for i in made.cubes]
                saved = sum(one.hits * one.tokens * options.prefill_seconds for one in texts)
                tokens = sum(one.tokens for one in texts)
                assert (
                    saved
                    > options.kv_build_fixed + tokens * options.kv_build_seconds
                    == pytest.approx(made.cost)
                )
                assert tokens <= options.prefix_tokens
                assert all(
                    one.pinned or one.sensitivity != "special" for one in texts if one.state != "frozen"
                )

    @given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 170), st.integers(1, 800)), min_size=2))
    def test_what_does_not_fit_leaves_by_value_not_by_age(self, sizes):
        """Defect 10: nothing that stays is worth less for its bytes than what leaves."""
        texts = [
            text(f"t{number:03}", hits=hits, idle=idle, bytes=size, since=170)
            for number, (hits, idle, size) in enumerate(sizes)
        ]
        total = sum(one.bytes for one in texts)
        options = OPTIONS.model_copy(update={"text_bytes": total // 2})
        gone = set().union(*moves(decide(texts, options, NOW), "archive"))
        assert gone
        assert sum(one.bytes for one in texts if one.id not in gone) <= total // 2

        def density(one):
            if one.last_used is None:
                return 0.0
            days = (NOW - one.last_used) / DAY
            return one.hits * 0.5 ** (days / HALF_LIFE_DAYS) * one.tokens / one.bytes

        worst = max(density(one) for one in texts if one.id in gone)
        assert all(density(one) >= worst - 1e-9 for one in texts if one.id not in gone)

    @given(scenes(), BUDGETS)
    def test_explanations_are_one_line_each_with_numbers_and_no_more(self, cubes, options):
        decisions = decide(cubes, options, NOW)
        lines = explain(decisions)
        assert len(lines) == len(decisions)
        assert all(
            made.reason in line and "\n" not in line for made, line in zip(decisions, lines, strict=True)
        )


class TestKeysAndValues:
    def test_a_text_that_is_used_often_enough_is_promoted(self):
        decisions = decide([text("a", hits=10), text("b", hits=2)], OPTIONS, NOW)
        (made,) = [made for made in decisions if made.kind == "text_to_kv"]
        assert set(made.cubes) == {"a"}
        assert made.gain > made.cost > 0
        assert made.bytes == 20 * 100

    def test_not_before_it_pays(self):
        dear = OPTIONS.model_copy(update={"kv_build_fixed": 2.0})
        assert not moves(decide([text("a", hits=10)], dear, NOW), "text_to_kv")
        assert "for" in reason_of(decide([text("a", hits=10)], dear, NOW), "a")
        assert moves(decide([text("a", hits=100)], dear, NOW), "text_to_kv") == [{"a"}]

    def test_uses_long_ago_count_less(self):
        assert not moves(decide([text("a", hits=10, idle=150)], OPTIONS, NOW), "text_to_kv")

    def test_they_decay_with_the_half_life_of_the_text(self):
        def promoted(half_life):
            cubes = [text("a", hits=10, idle=60, half_life_days=half_life)]
            return moves(decide(cubes, OPTIONS, NOW), "text_to_kv")

        assert not promoted(5.0)  # 10 uses are worth 0.002 by now
        assert promoted(None) == promoted(600.0) == [{"a"}]

    def test_what_is_kept_already_is_not_made_again(self):
        cubes = [text("a", hits=10), promotion("p", ["a"]), derived("k", ["a"])]
        assert {made.kind for made in decide(cubes, OPTIONS, NOW)} == {"keep"}

    def test_pinned_texts_without_keys_are_computed(self):
        assert moves(decide([text("a", hits=9, pinned=True)], OPTIONS, NOW), "text_to_kv") == [{"a"}]

    def test_another_text_makes_another_prefix(self):
        cubes = [text("a", hits=10), promotion("p", ["a"]), derived("k", ["a"]), text("b", hits=30)]
        decisions = decide(cubes, OPTIONS, NOW)
        assert moves(decisions, "text_to_kv") == [{"a", "b"}]
        assert moves(decisions, "demote_kv") == [{"k"}]
        kinds = [made.kind for made in decisions]
        assert kinds.index("demote_kv") < kinds.index("text_to_kv")

    def test_what_is_no_longer_used_leaves_the_prefix(self):
        cubes = [text("a", hits=10, idle=170), promotion("p", ["a"]), derived("k", ["a"], since=100)]
        assert moves(decide(cubes, OPTIONS, NOW), "demote_kv") == [{"a"}, {"k"}]

    def test_what_weights_know_needs_no_place(self):
        cubes = [text("a", hits=10), adapter("w", ["a"])]
        assert not moves(decide(cubes, OPTIONS, NOW), "text_to_kv")

    @pytest.mark.parametrize(
        "mark", [{"sensitivity": "special"}, {"trust": "web"}, {"state": "frozen"}, {"state": "archived"}]
    )
    def test_not_every_text_may_be_in_every_prompt(self, mark):
        decisions = decide([text("a", hits=50, **mark)], OPTIONS, NOW)
        assert [made.kind for made in decisions] == ["keep"]
        assert next(iter(mark.values())) in decisions[0].reason

    @pytest.mark.parametrize(("mark", "why"), DOUBTS)
    def test_nor_what_is_not_so_or_in_doubt(self, mark, why):
        decisions = decide([text("a", hits=50, **mark)], OPTIONS, NOW)
        assert [made.kind for made in decisions] == ["keep"]
        assert why in decisions[0].reason

    def test_what_is_over_leaves_the_prefix(self):
        over = text("a", hits=10, valid_to=NOW)
        cubes = [over, promotion("p", ["a"]), derived("k", ["a"])]
        assert moves(decide(cubes, OPTIONS, NOW), "demote_kv") == [{"a"}, {"k"}]
        earlier = decide(cubes, OPTIONS, NOW - DAY)
        assert not moves(earlier, "demote_kv")

    def test_outdated_keys_leave(self):
        cubes = [text("a", hits=1), derived("k", ["a", "z"], complete=False)]
        assert moves(decide(cubes, OPTIONS, NOW), "demote_kv") == [{"k"}]

    def test_the_least_valuable_keys_leave_not_the_oldest(self):
        small = OPTIONS.model_copy(update={"activation_bytes": 2500, "kv_build_fixed": 1e6})
        old, new = text("a", hits=50, pinned=True), text("b", hits=1, pinned=True)
        cubes = [old, new, derived("k", ["a"], since=29), derived("l", ["b"], since=0)]
        assert moves(decide(cubes, small, NOW), "demote_kv") == [{"l"}]


class TestWeights:
    TEXTS = (text("a", hits=40), text("b", hits=40))

    def test_stable_and_often_used_texts_become_weights(self):
        (made,) = [m for m in decide(self.TEXTS, OPTIONS, NOW) if m.kind == "text_to_weights"]
        assert set(made.cubes) == {"a", "b"}
        assert made.gain > made.cost > 0
        assert made.bytes == OPTIONS.lora_bytes

    @pytest.mark.parametrize(
        "change",
        [
            {"sensitivity": "special"},
            {"trust": "assistant"},
            {"state": "frozen"},
            {"hits": 4},
            {"since": 6},
            {"expires_at": NOW + DAY},
            {"valid_to": NOW + DAY},
            *(mark for mark, _ in DOUBTS),
        ],
    )
    def test_others_do_not(self, change):
        decisions = decide([self.TEXTS[0], text("b", **{"hits": 40, **change})], OPTIONS, NOW)
        assert not moves(decisions, "text_to_weights")

    def test_an_adapter_that_knows_them_all_is_left(self):
        assert not moves(decide([*self.TEXTS, adapter("w", ["a", "b"])], OPTIONS, NOW), "text_to_weights")

    def test_one_more_text_makes_another_adapter(self):
        decisions = decide([*self.TEXTS, text("c", hits=60), adapter("w", ["a", "b"])], OPTIONS, NOW)
        assert moves(decisions, "text_to_weights") == [{"a", "b", "c"}]

    def test_what_weights_refused_is_not_tried_again_until_something_is_new(self):
        no = derived("r", ["a", "b"], semantic_type=REJECTION, kind="parametric", bytes=0)
        decisions = decide([*self.TEXTS, no], OPTIONS, NOW)
        assert not moves(decisions, "text_to_weights")
        cubes = [*self.TEXTS, text("c", hits=40), no]
        assert moves(decide(cubes, OPTIONS, NOW), "text_to_weights") == [{"a", "b", "c"}]

    def test_adapters_of_outdated_or_cold_texts_leave(self):
        stale = adapter("w", ["a", "z"], complete=False)
        assert moves(decide([*self.TEXTS, stale], OPTIONS, NOW), "demote_weights") == [{"w"}]
        cold = [text("a", hits=40, idle=60), adapter("w", ["a"], since=50)]
        assert moves(decide(cold, OPTIONS, NOW), "demote_weights") == [{"w"}]

    def test_what_others_made_is_never_dropped(self):
        theirs = adapter("w", [], since=400, derived=False, bytes=10**9)
        assert [made.kind for made in decide([theirs], OPTIONS, NOW)] == ["keep"]


class TestLeaving:
    def test_expired_idle_and_frozen(self):
        cubes = [
            text("a", expires_at=NOW),
            text("b", since=200),
            text("c", since=200, pinned=True),
            text("d", since=200, state="frozen", expires_at=NOW - DAY),
            text("e", since=200, hits=1, idle=3),
        ]
        decisions = decide(cubes, OPTIONS, NOW)
        assert moves(decisions, "expire") == [{"a"}]
        assert moves(decisions, "archive") == [{"b"}]

    def test_what_was_made_from_them_leaves_too(self):
        cubes = [text("a", hits=40, expires_at=NOW), adapter("w", ["a"]), derived("k", ["a"])]
        decisions = decide(cubes, OPTIONS, NOW)
        assert moves(decisions, "demote_weights") == [{"w"}]
        assert moves(decisions, "demote_kv") == [{"k"}]


class TestFacts:
    def use(self, store, owner, cube_id, hits, strength):
        with store.writing() as connection:
            values = {"owner": owner, "cube_id": cube_id, "hits": hits, "strength": strength}
            connection.execute(insert(uses).values(**values, last_used=to_column(NOW)))

    def test_of_text(self, store):
        made = store.commit("alice", add=[CubeDraft.of("Two dogs.", trust="tool", sensitivity="special")])
        self.use(store, "alice", made.added[0], 3, 2.5)
        (one,) = facts_of(store, "alice", count=lambda given: len(given.split()))
        assert (one.tokens, one.bytes, one.hits, one.strength, one.last_used) == (2, 9, 3, 2.5, NOW)
        assert (one.trust, one.sensitivity, one.pinned, one.derived) == ("tool", "special", False, False)

    def test_of_validity_and_tags(self, store):
        header = {"valid_from": NOW - DAY, "valid_to": NOW, "tags": (UNCONFIRMED,)}
        store.commit("alice", add=[CubeDraft.of("Lives in Paris.", **header)])
        (one,) = facts_of(store, "alice")
        assert (one.valid_from, one.valid_to, one.tags) == (NOW - DAY, NOW, (UNCONFIRMED,))

    def test_other_owners_count_for_nothing(self, store):
        mine = store.commit("alice", add=[CubeDraft.of("Two dogs.")]).added[0]
        theirs = store.commit("bob", add=[CubeDraft.of("Two dogs.")]).added[0]
        self.use(store, "bob", theirs, 9, 9.0)
        assert [(one.id, one.hits) for one in facts_of(store, "alice")] == [(mine, 0)]

    def test_the_same_words_again_are_the_same_statement(self, store):
        early, late = NOW - 30 * DAY, NOW - DAY
        first = store.commit("alice", add=[CubeDraft.of("Two dogs.", created_at=early)]).added[0]
        self.use(store, "alice", first, 4, 3.0)
        drafts = [
            CubeDraft.of("Two  dogs.", parents=(first,), created_at=late),
            CubeDraft.of("Three dogs.", parents=(first,), created_at=late),
        ]
        store.commit("alice", retire=[first], add=drafts)
        facts = {one.bytes: one for one in facts_of(store, "alice")}
        assert (facts[10].hits, facts[10].stable_since) == (4, early)
        assert (facts[11].hits, facts[11].stable_since) == (0, late)

    def test_uses_of_all_versions_are_those_of_one_cube_at_every_later_time(self, store):
        """One formula: the scheduler's expectation is what `uses` says of the same uses of one cube."""
        first, one = store.commit("alice", add=[CubeDraft.of(t) for t in ("Two dogs.", "A cat.")]).added
        days = [-200, -190, -150, -20]
        for day in days:
            record(store, "alice", [one], NOW + day * DAY)
        for day in days[:3]:
            record(store, "alice", [first], NOW + day * DAY)
        again = CubeDraft.of("Two dogs.", parents=(first,))
        second = store.commit("alice", retire=[first], add=[again]).added[0]
        record(store, "alice", [second], NOW + days[3] * DAY)
        facts = {one.id: one for one in facts_of(store, "alice")}
        assert facts[second].strength == pytest.approx(facts[one].strength, abs=1e-6)
        scene = Scene(facts, OPTIONS, NOW)
        wanted = of(store, "alice")[one].at(NOW)
        assert scene.uses(facts[second]) == pytest.approx(wanted, abs=1e-6)
        assert scene.uses(facts[one]) == pytest.approx(wanted, abs=1e-6)

    def test_the_half_life_is_that_of_the_cube(self, store):
        given = store.commit("alice", add=[CubeDraft.of("Two dogs.", half_life_days=3.0)]).added[0]
        assert facts_of(store, "alice")[0].half_life_days == 3.0
        store.freeze("alice", given, "a dispute")
        assert facts_of(store, "alice")[0].half_life_days is None

    def test_of_what_was_derived(self, store):
        text_id = store.commit("alice", add=[CubeDraft.of("Two dogs.")]).added[0]
        source = Source.of(store.get("alice", text_id))
        common = {
            "kind": "parametric",
            "semantic_type": ADAPTER,
            "sources": (source,),
            "attributes": {"a": 1},
        }
        ours = {**common, "trust": "system", "origin": Origin(kind="derived")}
        drafts = [
            CubeDraft.of(**ours, payload={"m.A": torch.zeros(2)}),
            CubeDraft.of(**{**common, "origin": Origin(kind="derived")}),  # claims it, but is not trusted
        ]
        made = store.commit("alice", add=drafts).added
        facts = {one.id: one for one in facts_of(store, "alice")}
        assert [facts[i].derived for i in made] == [True, False]
        assert facts[made[0]].bytes > 8
        assert facts[made[0]].complete
        assert facts[made[0]].sources == (text_id,)
        store.commit("alice", retire=[text_id])
        assert not {one.id: one for one in facts_of(store, "alice")}[made[0]].complete

    def test_nobody(self, store):
        assert facts_of(store, "nobody") == ()
        assert decide((), OPTIONS, NOW) == ()
