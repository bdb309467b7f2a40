"""Who is next, and whose prompt is computed: policy over counts and step numbers alone.

Admission is fair between *scopes*, the personas that requests are for. Each scope has a lane, which waits
since its oldest request arrived or since its last oldest request got a row, whichever is later:

    a lane waited max_wait steps     its oldest request is first of all, the longest wait before others; if
                                     it does not fit now, nobody overtakes it
    else  fewest active rows         then lanes with a request whose adapters are resident, then the longest
          of the scope               wait; in a lane resident ones first, then by arrival. Who does not fit
                                     now is overtaken

So a lane that is being served does not age however many requests it holds, and a flood of one scope cannot
push the others aside by growing old. The n-th request of a lane waits at most n times max_wait, and the
time to serve the lanes that aged before it. Requests without a scope have a lane each.

Prefill gives half of a step's tokens to the oldest rows and the rest to those with the least to do:
short prompts end early, and the oldest row always moves on by at least half a step's budget.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from heapq import heapify, heappop, heappush
from typing import Any, Generic, TypeVar

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError

EntryT = TypeVar("EntryT", bound=tuple[Any, ...])
_Lane = str | int  # a scope, or the ticket of a request without one
_Ready = tuple[bool, int, int]  # not resident, arrived, ticket
_Age = tuple[int, int]  # since, ticket of the oldest
_Key = tuple[int, bool, int, int]  # active rows, not resident, since, ticket


class ScheduleOptions(FrozenConfig):
    """Budgets of one step."""

    prefill_tokens: int = Field(256, ge=1, description="prompt tokens computed per step")
    max_wait: int = Field(128, ge=0, description="steps until a waiting request goes before all younger ones")
    look_ahead: int = Field(16, ge=0, description="requests per step that may be overtaken as not fitting")


@dataclass(frozen=True)
class Waiting:
    """A request in line. ``resident``: its adapters are on the device; ``arrived``: a step number."""

    ticket: int
    arrived: int
    scopes: tuple[str, ...]
    tokens_to_prefill: int
    kv_tokens: int
    resident: bool


@dataclass(frozen=True)
class Prefilling:
    """A row whose prompt has `remaining` tokens to compute."""

    row: int
    remaining: int


class Fit(Enum):
    """What a request meets that wants a row."""

    YES = "yes"
    NOT_NOW = "not now"
    NEVER = "never"


@dataclass(frozen=True)
class Admission:
    """Tickets that left the queue, in order: those that got a row, and those that never can."""

    admitted: tuple[int, ...] = ()
    failed: tuple[int, ...] = ()


class _Heap(Generic[EntryT]):
    """A heap whose entries may go stale. Stale ones are dropped on top, or all at once when they are most."""

    def __init__(self, valid: Callable[[EntryT], bool]) -> None:
        self._valid = valid
        self._entries: list[EntryT] = []
        self._bound = 64

    def push(self, entry: EntryT) -> None:
        heappush(self._entries, entry)
        if len(self._entries) > self._bound:
            self._entries = list({entry for entry in self._entries if self._valid(entry)})
            heapify(self._entries)
            self._bound = 2 * len(self._entries) + 64

    def top(self) -> EntryT | None:
        while self._entries and not self._valid(self._entries[0]):
            heappop(self._entries)
        return self._entries[0] if self._entries else None


@dataclass
class _LaneState:
    """The requests of one scope, by readiness and by arrival, and its present places in the queue's heaps."""

    ready: _Heap[_Ready]
    arrivals: _Heap[tuple[int, int]]
    served: int = 0  # the step at which its last oldest request got a row
    age: _Age | None = None
    key: _Key | None = None


@dataclass
class Queue:
    """Requests that wait for a row. Every change costs O(log n); a step without a free row costs O(1)."""

    options: ScheduleOptions = field(default_factory=ScheduleOptions)

    def __post_init__(self) -> None:
        self._waiting: dict[int, Waiting] = {}
        self._aside: set[int] = set()  # did not fit in the present call
        self._lanes: dict[_Lane, _LaneState] = {}
        self._active: dict[_Lane, int] = {}
        self._keys: _Heap[_Key] = _Heap(self._is_key)
        self._ages: _Heap[_Age] = _Heap(self._is_age)

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, ticket: int) -> bool:
        return ticket in self._waiting

    def add(self, request: Waiting) -> None:
        """Put a request in line. Tickets break ties, so they should rise with time."""
        if request.ticket in self._waiting:
            raise InvalidInputError(
                f"Ticket {request.ticket} waits already.", hint="Give every request a ticket of its own."
            )
        self._waiting[request.ticket] = request
        lane = self._lanes.get(_lane(request))
        if lane is None:
            lane = self._lanes[_lane(request)] = _LaneState(_Heap(self._is_ready), _Heap(self._is_waiting))
        lane.ready.push(_ready(request))
        lane.arrivals.push((request.arrived, request.ticket))
        self._refresh(_lane(request))

    def remove(self, ticket: int) -> bool:
        """Take a request out of the line; false if it is not in it."""
        request = self._waiting.pop(ticket, None)
        if request is None:
            return False
        self._refresh(_lane(request))
        return True

    def set_resident(self, ticket: int, resident: bool = True) -> None:
        """Note that the adapters of a waiting request came onto the device, or left it."""
        request = self._waiting.get(ticket)
        if request is not None and request.resident != resident:
            request = self._waiting[ticket] = replace(request, resident=resident)
            self._lanes[_lane(request)].ready.push(_ready(request))
            self._refresh(_lane(request))

    def admit(
        self, fits: Callable[[int], Fit], active: Mapping[str, int], *, step: int, room: Callable[[], int]
    ) -> Admission:
        """Ask `fits` for one ticket after the other while there is room; who gets an answer leaves the line.

        ``YES`` means that the row exists already, so `fits` reserves what it needs before it answers.
        ``active`` counts the running rows per first scope; `room` says how many rows are free.
        """
        if not self._waiting or room() <= 0:
            return Admission()
        self._recount(active)
        admitted: list[int] = []
        failed: list[int] = []
        try:
            while room() > 0 and len(self._aside) <= self.options.look_ahead:
                age, key = self._ages.top(), self._keys.top()
                overdue = age is not None and step - age[0] >= self.options.max_wait
                choice = age if overdue else key
                if choice is None:
                    break
                ticket = choice[-1]
                name = _lane(self._waiting[ticket])
                fit = fits(ticket)
                if fit is Fit.NOT_NOW and overdue:
                    break
                if fit is Fit.NOT_NOW:
                    self._aside.add(ticket)
                    self._refresh(name)
                    continue
                if fit is Fit.YES:
                    admitted.append(ticket)
                    self._active[name] = self._active.get(name, 0) + 1
                    lane = self._lanes[name]
                    if lane.age is not None and lane.age[1] == ticket:
                        lane.served = step
                else:
                    failed.append(ticket)
                self.remove(ticket)
        finally:
            self._return_aside()
        return Admission(tuple(admitted), tuple(failed))

    def _recount(self, active: Mapping[str, int]) -> None:
        """Make `active` the counts that lanes are ordered by. Few scopes run, so few lanes change."""
        before, self._active = self._active, dict(active.items())
        for name in before.keys() | self._active.keys():
            if name in self._lanes and before.get(name, 0) != self._active.get(name, 0):
                self._refresh(name)

    def _return_aside(self) -> None:
        tickets, self._aside = self._aside, set()
        for request in [self._waiting[ticket] for ticket in tickets if ticket in self._waiting]:
            self._lanes[_lane(request)].ready.push(_ready(request))
            self._refresh(_lane(request))

    def _refresh(self, name: _Lane) -> None:
        """Bring a lane's places in the two heaps up to date after a change."""
        lane = self._lanes[name]
        oldest, ready = lane.arrivals.top(), lane.ready.top()
        if oldest is None:
            del self._lanes[name]
            return
        age = (max(oldest[0], lane.served), oldest[1])
        if age != lane.age:
            lane.age = age
            self._ages.push(age)
        key = (self._active.get(name, 0), ready[0], age[0], ready[2]) if ready is not None else None
        if key != lane.key:
            lane.key = key
            if key is not None:
                self._keys.push(key)

    def _is_waiting(self, entry: tuple[int, int]) -> bool:
        request = self._waiting.get(entry[1])
        return request is not None and request.arrived == entry[0]

    def _is_ready(self, entry: _Ready) -> bool:
        request = self._waiting.get(entry[2])
        return request is not None and entry[2] not in self._aside and _ready(request) == entry

    def _is_age(self, entry: _Age) -> bool:
        lane = self._lane_of(entry[1])
        return lane is not None and lane.age == entry

    def _is_key(self, entry: _Key) -> bool:
        lane = self._lane_of(entry[3])
        return lane is not None and lane.key == entry

    def _lane_of(self, ticket: int) -> _LaneState | None:
        request = self._waiting.get(ticket)
        return None if request is None else self._lanes.get(_lane(request))


def chunks(prefilling: Sequence[Prefilling], budget: int) -> list[tuple[int, int]]:
    """How many tokens of which rows to compute in a step: ``(row, count)`` in the order given, oldest first.

    All of the budget is spent while there is work for it.
    """
    counts = [0] * len(prefilling)

    def spend(order: Iterable[int], tokens: int) -> int:
        for place in order:
            if tokens <= 0:
                break
            count = min(prefilling[place].remaining - counts[place], tokens)
            counts[place] += count
            tokens -= count
        return tokens

    half = budget // 2
    left = spend(range(len(prefilling)), budget - half) + half
    spend(sorted(range(len(prefilling)), key=lambda p: prefilling[p].remaining - counts[p]), left)
    return [(part.row, count) for part, count in zip(prefilling, counts, strict=True) if count]


def _lane(request: Waiting) -> _Lane:
    return request.scopes[0] if request.scopes else request.ticket


def _ready(request: Waiting) -> _Ready:
    return (not request.resident, request.arrived, request.ticket)
