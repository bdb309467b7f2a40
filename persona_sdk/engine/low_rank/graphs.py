"""Decode steps as CUDA graphs: one capture per bucket of rows, replayed whoever the rows are.

    rows of a step    1   2   3   4   5 ... 8   9 ... 16
    bucket            1   2   4   4   8     8   16           free rows carry slot -1 and cost an early exit

A captured step reads fixed addresses. `StaticBatch` is the low-rank branches of such a step: rows that join,
leave or are steered are written into its buffers between replays. `GraphPool` captures, replays, and captures
anew when an address that a graph reads has changed, as when an arena grew.

A graph need not know how many adapters are in use, as grids depend on rows and sites only: buckets times the
arenas in use are all the captures there are.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from persona_sdk.engine.low_rank.lane_buffers import LaneBuffers
from persona_sdk.engine.low_rank.lanes import Factors, Lane
from persona_sdk.engine.low_rank.sites import Site
from persona_sdk.engine.low_rank.triton_indexed import TritonIndexed

logger = logging.getLogger("persona_sdk.engine")

_WARM_UPS = 2  # the first compiles kernels, the second allocates as the captured one will


class StaticBatch:
    """The branches of decode steps of one bucket: `Branches` whose tensors keep their addresses.

    Args:
        arenas: with the most patches a row may have in each. Rows add them in this order.
        rows: the bucket.
        device: of the tokens.
    """

    def __init__(self, arenas: Sequence[tuple[Factors, int]], rows: int, device: torch.device) -> None:
        self._parts: Mapping[int, TritonIndexed] = {
            id(factors): TritonIndexed(
                LaneBuffers(factors, lanes=lanes, rows=rows, tokens=rows, prompts=False, device=device)
            )
            for factors, lanes in arenas
        }
        self._of_site: dict[int, list[TritonIndexed]] = {}
        for (factors, _), part in zip(arenas, self._parts.values(), strict=True):
            for site in factors.sites:
                self._of_site.setdefault(site, []).append(part)

    def buffers(self, factors: Factors) -> LaneBuffers:
        """What kernels read of one arena."""
        return self._parts[id(factors)].buffers

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether `write` takes these lanes."""
        return all(
            number in self._parts and self._parts[number].buffers.fits(own)
            for number, own in _by_arena(lanes).items()
        )

    def write(self, lanes: Sequence[Lane]) -> None:
        """Let the next step use these lanes; arenas without any add nothing."""
        found = _by_arena(lanes)
        for number, part in self._parts.items():
            part.buffers.write(found.get(number, ()))

    @property
    def moved(self) -> bool:
        """Whether an arena has other blocks than were written last."""
        return any(part.buffers.data is not part.buffers.factors.arena.data for part in self._parts.values())

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph reads; see `GraphPool.run`."""
        return tuple(address for part in self._parts.values() for address in part.buffers.addresses)

    def add(self, site: Site, x: Float[Tensor, "tokens d_in"], y: Float[Tensor, "tokens width"]) -> None:
        """Add all branches of all rows in place."""
        for part in self._of_site.get(site.index, ()):
            part.add(site.index, x, y)


def _by_arena(lanes: Sequence[Lane]) -> dict[int, list[Lane]]:
    found: dict[int, list[Lane]] = {}
    for lane in lanes:
        found.setdefault(id(lane.factors), []).append(lane)
    return found


@runtime_checkable
class Recorded(Protocol):
    """A step that can be repeated."""

    def replay(self) -> Tensor:
        """Run it again on what its buffers hold now. The result is overwritten by the next replay."""
        ...


Step = Callable[[], Tensor]
Record = Callable[[Step], Recorded]


@dataclass(frozen=True)
class Eager:
    """A step that is not captured: on CPUs, or where capturing failed."""

    step: Step

    def replay(self) -> Tensor:
        """Run the step."""
        return self.step()


@dataclass(frozen=True)
class Captured:
    """A step as a CUDA graph."""

    graph: torch.cuda.CUDAGraph
    output: Tensor

    def replay(self) -> Tensor:
        """Launch the graph."""
        self.graph.replay()
        return self.output


def cuda_recorder(device: torch.device) -> Record:
    """Captures steps of a device. The graphs share their memory, so one may run at a time."""
    memory = torch.cuda.graph_pool_handle()

    def record(step: Step) -> Recorded:
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        # Other threads go on loading adapters: their calls must not break the capture.
        with torch.cuda.graph(graph, pool=memory, stream=stream, capture_error_mode="thread_local"):
            output = step()
        return Captured(graph, output)

    return record


class GraphPool:
    """Captured steps by key, the least recently used of them dropped.

    Args:
        device: of the steps. Nothing is captured on CPUs.
        kept: captures at a time.
        record: how to capture, instead of as a CUDA graph.
    """

    def __init__(self, device: torch.device, *, kept: int = 32, record: Record | None = None) -> None:
        self._record: Record = record or (cuda_recorder(device) if device.type == "cuda" else Eager)
        self._kept = kept
        self._steps: OrderedDict[Hashable, tuple[Hashable, Recorded]] = OrderedDict()

    def run(self, step: Step, key: Hashable, reads: Hashable = ()) -> Tensor:
        """Replay what was captured under `key`, or capture `step` first.

        Args:
            step: works on fixed buffers only, and may run several times on the same ones. Its result's first
                axis is the bucket's rows.
            key: the bucket, and all else that makes it another step.
            reads: addresses the step reads that may change, as `StaticBatch.addresses`.
        """
        known = self._steps.get(key)
        if known is None or known[0] != reads:
            # The old graph goes first: its memory is the new one's.
            known = None
            self._steps.pop(key, None)
            self._steps[key] = (reads, self._recorded(step, key))
            while len(self._steps) > self._kept:
                self._steps.popitem(last=False)
        self._steps.move_to_end(key)
        return self._steps[key][1].replay()

    def _recorded(self, step: Step, key: Hashable) -> Recorded:
        try:
            return self._record(step)
        except RuntimeError as error:  # an operation that cannot be captured, or no memory for the graph
            logger.warning("The step %s cannot be captured and runs uncaptured: %s", key, error)
            return Eager(step)

    def clear(self) -> None:
        """Drop all captures and their memory."""
        self._steps.clear()

    def __len__(self) -> int:
        return len(self._steps)
