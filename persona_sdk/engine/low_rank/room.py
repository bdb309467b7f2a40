"""Room for lanes in captured steps: which arenas, and how many lanes of each.

    step needs          arena 8: 1 lane     arena 8: 3, arena 16: 1     arena 16: 1     none
    room                8: 1                8: 4, 16: 1                 8: 4, 16: 1     8: 4, 16: 1

A captured step is made for a certain room. If every step had exactly its own, each combination of adapters
would be captured; so room only grows, to powers of two, and a smaller step leaves some of it empty. An
empty arena costs two launches per site that end at once, therefore one that no step needed for long is let
go of.
"""

from collections import Counter
from collections.abc import Sequence

from persona_sdk.engine.low_rank.lanes import Factors, Lane

_IDLE = 4096  # steps: enough that capturing anew, once per bucket, is nothing beside them

Room = tuple[tuple[Factors, int], ...]


def bucket_of(count: int) -> int:
    """The least power of two that holds so many."""
    return 1 << max(count - 1, 0).bit_length()


class LaneRoom:
    """See the module's docstring.

    Args:
        idle: steps after which an arena is let go of.
    """

    def __init__(self, idle: int = _IDLE) -> None:
        self._idle = idle
        self._steps = 0
        self._needed: dict[int, int] = {}  # by id of the factors: the last step that needed them
        self._room: Room = ()

    def holding(self, lanes: Sequence[Lane]) -> Room:
        """Arenas, in `Factors.order`, with the lanes there is room for: the same tuple until that changes."""
        self._steps += 1
        counts = Counter(id(lane.factors) for lane in lanes)
        factors = {id(lane.factors): lane.factors for lane in lanes} | {id(f): f for f, _ in self._room}
        most = {id(held): count for held, count in self._room}
        for number, count in counts.items():
            self._needed[number] = self._steps
            most[number] = max(most.get(number, 0), bucket_of(count))
        for number in [n for n in most if self._steps - self._needed[n] > self._idle]:
            del most[number], self._needed[number]
        room = tuple(
            (factors[number], most[number]) for number in sorted(most, key=lambda n: factors[n].order)
        )
        if room != self._room:
            self._room = room
        return self._room
