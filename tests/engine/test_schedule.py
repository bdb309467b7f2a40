"""Admission against a model that looks at everybody each time, and what holds of whole runs."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.engine.schedule import Admission, Fit, Prefilling, Queue, ScheduleOptions, Waiting, chunks
from persona_sdk.errors import InvalidInputError


def waiting(ticket: int, scope: str = "", arrived: int = 0, resident: bool = False, kv: int = 1) -> Waiting:
    return Waiting(ticket, arrived, (scope,) if scope else (), 1, kv, resident)


def take(
    queue: Queue, rows: int, active: Counter[str] | None = None, *, step: int = 0, refuse=None
) -> Admission:
    """Admit up to `rows`; `refuse` gives the answer for tickets that do not fit."""
    free = [rows]

    def fits(ticket: int) -> Fit:
        answer = (refuse or {}).get(ticket, Fit.YES)
        free[0] -= answer is Fit.YES
        return answer

    return queue.admit(fits, active or Counter(), step=step, room=lambda: free[0])


class NaiveQueue:
    """The policy of the module's docstring, by looking at every request for every decision."""

    def __init__(self, options: ScheduleOptions):
        self.options, self.line, self.served = options, {}, {}

    @staticmethod
    def lane(request: Waiting) -> str | int:
        return request.scopes[0] if request.scopes else request.ticket

    def remove(self, ticket: int) -> None:
        gone = self.line.pop(ticket)
        if not any(self.lane(r) == self.lane(gone) for r in self.line.values()):
            self.served.pop(self.lane(gone), None)

    def admit(self, fits: Callable[[int], Fit], active: Counter[str], *, step: int, room: Callable[[], int]):
        active, admitted, failed, aside = Counter(active), [], [], set()
        while room() > 0 and self.line and len(aside) <= self.options.look_ahead:
            lanes: dict[str | int, list[Waiting]] = {}
            for request in sorted(self.line.values(), key=lambda r: (r.arrived, r.ticket)):
                lanes.setdefault(self.lane(request), []).append(request)
            since = {name: max(lane[0].arrived, self.served.get(name, 0)) for name, lane in lanes.items()}
            aged = [(since[n], lane[0].ticket) for n, lane in lanes.items()]
            first, oldest = min(aged)
            overdue = step - first >= self.options.max_wait
            keys = []
            for name, lane in lanes.items():
                for r in lane:
                    if r.ticket not in aside:
                        keys.append(((not r.resident, r.arrived, r.ticket), name))
            best = {}
            for ready, name in sorted(keys, reverse=True):
                best[name] = (active[name], ready[0], since[name], ready[2])
            if not overdue and not best:
                break
            ticket = oldest if overdue else min(best.values())[3]
            name = self.lane(self.line[ticket])
            fit = fits(ticket)
            if fit is Fit.NOT_NOW:
                if overdue:
                    break
                aside.add(ticket)
                continue
            (admitted if fit is Fit.YES else failed).append(ticket)
            if fit is Fit.YES:
                active[name] += 1
                if lanes[name][0].ticket == ticket:
                    self.served[name] = step
            self.remove(ticket)
        return Admission(tuple(admitted), tuple(failed))


@given(
    seed=st.integers(0, 2**32),
    scopes=st.integers(1, 6),
    max_wait=st.sampled_from([0, 3, 10, 1000]),
    look_ahead=st.sampled_from([0, 2, 16]),
    rows=st.integers(1, 4),
)
def test_decisions_are_those_of_the_plain_policy(seed, scopes, max_wait, look_ahead, rows):
    chance = random.Random(seed)
    options = ScheduleOptions(max_wait=max_wait, look_ahead=look_ahead)
    queue, naive = Queue(options), NaiveQueue(options)
    running: list[str] = []
    ticket = 0
    for step in range(60):
        for _ in range(chance.choice([0, 0, 1, 2, 5])):
            ticket += 1
            scope = chance.choice(["", *map(str, range(scopes))])
            request = waiting(ticket, scope, step, chance.random() < 0.5)
            queue.add(request)
            naive.line[ticket] = request
        for other in chance.sample(sorted(naive.line), min(len(naive.line), chance.choice([0, 0, 1]))):
            naive.remove(other)
            assert queue.remove(other)
        for other in chance.sample(sorted(naive.line), min(len(naive.line), chance.choice([0, 1]))):
            resident = chance.random() < 0.5
            old = naive.line[other]
            naive.line[other] = Waiting(other, old.arrived, old.scopes, 1, 1, resident)
            queue.set_resident(other, resident)
        running = [scope for scope in running if chance.random() < 0.8]
        refuse = {
            t: chance.choice([Fit.NOT_NOW, Fit.NOT_NOW, Fit.NEVER])
            for t in naive.line
            if chance.random() < 0.3
        }
        scope_of = {t: r.scopes for t, r in naive.line.items()}
        free = rows - len(running)
        active = Counter(scope for scope in running if scope)
        assert set(naive.line) == {t for t in range(ticket + 1) if t in queue}
        expected = take(naive, free, active, step=step, refuse=refuse)
        assert take(queue, free, active, step=step, refuse=refuse) == expected
        assert len(queue) == len(naive.line)
        running += [(scope_of[t] or ("",))[0] for t in expected.admitted]


@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), capacity=st.integers(8, 20))
def test_waits_are_bounded_and_no_row_idles_that_could_run(seed, rows, capacity):
    """Random arrivals, sizes and service times, requests of every size up to all of the memory."""
    chance = random.Random(seed)
    max_wait, longest, step = 20, 5, 0
    queue = Queue(ScheduleOptions(max_wait=max_wait, look_ahead=1000))
    line: dict[int, Waiting] = {}
    running: dict[int, tuple[Waiting, int]] = {}
    place: dict[int, int] = {}  # in the lane, on arrival
    waits: dict[int, int] = {}
    most_lanes = 0

    def used() -> int:
        return sum(r.kv_tokens for r, _ in running.values())

    def fits(ticket: int) -> Fit:
        if used() + line[ticket].kv_tokens > capacity:
            return Fit.NOT_NOW
        running[ticket] = (line[ticket], step + chance.randint(1, longest))
        return Fit.YES

    while step < 80 or line:
        for _ in range(chance.choice([0, 0, 1, 3]) if step < 80 else 0):
            kv, ticket = chance.choice([1, 2, 4, capacity]), len(place)
            line[ticket] = waiting(
                ticket, chance.choice(["", "a", "b", "c"]), step, chance.random() < 0.5, kv
            )
            queue.add(line[ticket])
            lanes = Counter(map(NaiveQueue.lane, line.values()))
            place[ticket], most_lanes = lanes[NaiveQueue.lane(line[ticket])], max(most_lanes, len(lanes))
        for ticket in [ticket for ticket, (_, end) in running.items() if end <= step]:
            del running[ticket]
        active = Counter(r.scopes[0] for r, _ in running.values() if r.scopes)
        aged = [r for r in line.values() if step - r.arrived >= max_wait]
        for ticket in queue.admit(fits, active, step=step, room=lambda: rows - len(running)).admitted:
            waits[ticket] = step - line.pop(ticket).arrived
        if len(running) < rows and not aged:  # nobody was held back for an aged one
            assert not any(used() + r.kv_tokens <= capacity for r in line.values())
        step += 1
    assert len(queue) == 0
    assert waits.keys() == place.keys()
    # Every place in the lane costs max_wait; then the lanes that aged before are served, at worst one at a
    # time, each for as long as the longest runs.
    assert all(waits[t] <= place[t] * (max_wait + (most_lanes + 1) * longest) for t in waits)


def test_the_aged_go_first_by_age_and_are_not_overtaken():
    queue = Queue(ScheduleOptions(max_wait=10))
    for ticket, scope, arrived in ((1, "a", 0), (2, "b", 1), (3, "c", 8)):
        queue.add(waiting(ticket, scope, arrived, resident=ticket == 3))
    busy = Counter(a=5, b=4)
    assert take(queue, 9, busy, step=11, refuse={1: Fit.NOT_NOW}) == Admission()
    assert take(queue, 9, busy, step=11).admitted == (1, 2, 3)


def test_the_young_that_do_not_fit_are_overtaken_and_keep_their_place():
    queue = Queue(ScheduleOptions(max_wait=10))
    for ticket in (1, 2, 3, 4):
        queue.add(waiting(ticket, "a" if ticket < 3 else "", arrived=ticket))
    assert take(queue, 1, step=5, refuse={1: Fit.NOT_NOW, 2: Fit.NOT_NOW}).admitted == (3,)
    assert take(queue, 9, step=5).admitted == (1, 4, 2)  # lane a has an active row when 2 is up


def test_who_never_fits_fails_and_takes_no_row():
    queue = Queue()
    for ticket in (1, 2, 3):
        queue.add(waiting(ticket))
    assert take(queue, 1, refuse={1: Fit.NEVER, 2: Fit.NEVER}) == Admission((3,), (1, 2))
    assert len(queue) == 0


def test_fewest_active_rows_then_resident_then_arrival():
    queue = Queue()
    for ticket, scope, resident in ((1, "a", True), (2, "b", False), (3, "c", True), (4, "d", True)):
        queue.add(waiting(ticket, scope, ticket, resident))
    assert take(queue, 9, Counter(a=2, d=1), step=5).admitted == (3, 2, 4, 1)


@pytest.mark.parametrize("rows", [1, 8])
def test_a_flood_of_one_scope_does_not_starve_the_others_however_old_it_is(rows):
    queue = Queue(ScheduleOptions(max_wait=50))
    for ticket in range(2000):
        queue.add(waiting(ticket, "flood", 0, resident=True))
    running: list[str] = []
    shares: Counter[str] = Counter()
    for step in range(1000):  # every request runs for one step; two others always have one waiting
        for offset, name in ((10_000, "b"), (20_000, "c")):
            if not any(offset + s in queue for s in range(max(0, step - 60), step)):
                queue.add(waiting(offset + step, name, step, resident=True))
        done = take(queue, rows, Counter(running), step=step)
        running = ["flood" if t < 10_000 else "b" if t < 20_000 else "c" for t in done.admitted]
        shares.update(running)
    if rows == 1:  # turn by turn
        assert min(shares.values()) >= 250
    else:  # nobody of b and c ever waits
        assert shares["b"] == shares["c"] == 1000


def test_an_older_request_of_a_lane_is_not_starved_by_resident_younger_ones():
    queue = Queue(ScheduleOptions(max_wait=10))
    queue.add(waiting(0, "a", 0, resident=False))
    for step in range(1, 30):
        queue.add(waiting(step, "a", step, resident=True))
        if 0 in take(queue, 1, step=step).admitted:
            assert step == 10
            return
    pytest.fail("never admitted")


def test_cancelled_requests_leave_and_a_ticket_waits_once():
    queue = Queue()
    queue.add(waiting(1, "a"))
    queue.add(waiting(2, "a"))
    with pytest.raises(InvalidInputError, match="Ticket 1 waits already"):
        queue.add(waiting(1, "b"))
    assert queue.remove(1)
    assert not queue.remove(1)
    assert 1 not in queue
    assert 2 in queue
    assert take(queue, 9).admitted == (2,)
    assert not queue.remove(2)


def test_an_error_while_asking_loses_nobody():
    queue = Queue(ScheduleOptions(max_wait=100))
    for ticket in (1, 2, 3):
        queue.add(waiting(ticket, "a"))

    def fits(ticket: int) -> Fit:
        if ticket == 2:
            raise RuntimeError("broken")
        return Fit.NOT_NOW

    with pytest.raises(RuntimeError):
        queue.admit(fits, {}, step=0, room=lambda: 1)
    assert take(queue, 9).admitted == (1, 2, 3)


def test_a_long_line_costs_nothing_while_no_row_is_free_and_little_while_nothing_fits():
    queue = Queue(ScheduleOptions(max_wait=10, look_ahead=4))
    for ticket in range(5000):
        queue.add(waiting(ticket, str(ticket % 700), 0))
    asked: list[int] = []

    def full(ticket: int) -> Fit:
        asked.append(ticket)
        return Fit.NOT_NOW

    queue.admit(full, Counter(), step=5, room=lambda: 0)
    assert asked == []
    queue.admit(full, Counter(), step=5, room=lambda: 3)
    assert len(asked) == 5
    queue.admit(full, Counter(), step=50, room=lambda: 3)  # the aged one holds all others back
    assert len(asked) == 6


@pytest.mark.parametrize("seed", range(3))
def test_memory_follows_the_line_not_its_history(seed):
    chance = random.Random(seed)
    queue = Queue()
    for ticket in range(1000):
        queue.add(waiting(ticket, chance.choice(["", "a", "b"]), ticket))
        queue.set_resident(ticket)
        if chance.random() < 0.9:
            queue.remove(ticket)
            queue.remove(ticket - 50)
    lanes = queue._lanes.values()
    heaps = [queue._keys, queue._ages, *(h for lane in lanes for h in (lane.ready, lane.arrivals))]
    for heap in heaps:
        assert len(heap._entries) <= 4 * len(queue) + 64
    for ticket in range(1000):
        queue.remove(ticket)
    assert not queue._lanes


PROMPTS = st.lists(st.integers(1, 300), max_size=12)


@given(lengths=PROMPTS, budget=st.integers(1, 400))
def test_chunks_spend_the_budget_and_no_more(lengths, budget):
    rows = [Prefilling(10 + i, n) for i, n in enumerate(lengths)]
    plan = chunks(rows, budget)
    remaining = {r.row: r.remaining for r in rows}
    assert sum(count for _, count in plan) == min(budget, sum(lengths))
    assert all(0 < count <= remaining[row] for row, count in plan)
    assert [row for row, _ in plan] == sorted({row for row, _ in plan})  # the given order, once each


@given(lengths=PROMPTS.filter(bool), budget=st.integers(1, 64), data=st.data())
def test_prompts_end_within_bounded_steps_whatever_arrives(lengths, budget, data):
    rows = dict(enumerate(lengths))
    due = {}
    share = -(-budget // 2)
    for row in rows:  # all tokens up to this row's last, at the share of the oldest
        due[row] = -(-sum(lengths[: row + 1]) // share)
    newcomer = len(rows)
    for step in range(1, max(due.values()) + 1):
        rows[newcomer] = data.draw(st.integers(1, 8), label="short prompt")
        newcomer += 1
        for row, count in chunks([Prefilling(r, n) for r, n in rows.items()], budget):
            rows[row] -= count
            if not rows[row]:
                del rows[row]
        assert not [row for row in rows if row in due and step >= due[row]]
        if step > 30:
            break


@given(long=st.integers(500, 5000), short=st.integers(1, 60), budget=st.integers(128, 256))
def test_a_short_prompt_behind_a_long_one_ends_in_its_first_step(long, short, budget):
    assert dict(chunks([Prefilling(0, long), Prefilling(1, short)], budget)) == {0: budget - short, 1: short}
    assert chunks([Prefilling(0, long)], 0) == []
