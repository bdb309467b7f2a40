"""Which row uses which slots with which gates, and the branches of one forward pass made from it.

    y += sum over the row's patches of  B (gate * (A x))          at every site, every row its own patches

`PatchTable` changes when a row joins, leaves or is steered. `PatchTable.batch` turns the rows of a pass into
lanes (lanes.py), gives each to the kernel that costs least (costs.py), and keeps the result until something
changes: a decode step that repeats the last one builds nothing.

A factor that is NaN stays in the rows that use it: no kernel multiplies one row with another's factors except
`dense`, which is not used with a block that holds NaN or infinity.
"""

from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor

from persona_sdk.engine.low_rank import indexed, triton_indexed
from persona_sdk.engine.low_rank.batch import LowRankBatch
from persona_sdk.engine.low_rank.calibration import cost_model
from persona_sdk.engine.low_rank.costs import CostModel
from persona_sdk.engine.low_rank.lanes import Arena, BoundPatch, Factors, Lane, lanes_of
from persona_sdk.errors import EngineError

__all__ = ["BoundPatch", "LowRankBatch", "PatchTable"]

_KEPT = 4  # batches kept at a time: a decode step and the prompt chunks between
_KEPT_DIGESTS = 4096


class PatchTable:
    """Patches of all rows. One thread at a time.

    Args:
        calibrate: choose kernels by measuring this machine once; else by fixed costs.
        kernel: use this one for every lane it can run; for tests and measurements.
    """

    def __init__(self, *, calibrate: bool = True, kernel: str | None = None) -> None:
        self._calibrate, self._kernel = calibrate, kernel
        self._rows: dict[int, tuple[BoundPatch, ...]] = {}
        self._factors: dict[int, Factors] = {}  # by id of the arena, which it keeps alive
        self._finite: dict[str, bool] = {}  # by digest of the block
        self._batches: OrderedDict[object, tuple[LowRankBatch, tuple[tuple[Arena, Tensor], ...]]] = (
            OrderedDict()
        )
        self._decoding: tuple[tuple[int, ...], tuple[Lane, ...]] | None = None

    def bind(self, row: int, patches: Sequence[BoundPatch]) -> None:
        """Give a row its patches, in the order they are added. Replaces those it had."""
        self._rows[row] = tuple(patches)
        self._changed()

    def unbind(self, row: int) -> None:
        """Take a row's patches; a row without any may be unbound too."""
        if self._rows.pop(row, None):
            self._changed()

    def steer(self, row: int, patch_index: int, gate: tuple[float, ...]) -> None:
        """Change the gate of one patch of a row; holds from the next batch on."""
        patches = list(self.patches(row))
        if not 0 <= patch_index < len(patches):
            raise EngineError(f"Row {row} has {len(patches)} patches, none with number {patch_index}.")
        patches[patch_index] = BoundPatch(patches[patch_index].slot, gate)
        self.bind(row, patches)

    def patches(self, row: int) -> tuple[BoundPatch, ...]:
        """The patches of a row, in order."""
        return self._rows.get(row, ())

    def batch(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> LowRankBatch | None:
        """The branches of a pass over `lengths[i]` tokens of row `rows[i]`, packed one row after another.

        None if no row has a patch. Good until the table or an arena changes.
        """
        if not any(self._rows.get(row) for row in rows):
            return None
        key = (tuple(rows), tuple(lengths), device)
        if key in self._batches:
            batch, read = self._batches[key]
            if all(arena.data is data for arena, data in read):
                self._batches.move_to_end(key)
                return batch
            self._batches.clear()  # an arena moved: let go of its old blocks at once
        lanes = self._lanes(rows, lengths)
        model = cost_model(device, calibrate=self._calibrate)
        batch = LowRankBatch([(self._choose(lane, model), lane) for lane in lanes], device)
        self._batches[key] = (batch, tuple((lane.factors.arena, lane.data) for lane in lanes))
        if len(self._batches) > _KEPT:
            self._batches.popitem(last=False)
        return batch

    def decoding(self, rows: Sequence[int]) -> tuple[Lane, ...]:
        """The lanes of a pass over one token of every row: the same object until the table or an arena of
        theirs changes.
        """
        key = tuple(rows)
        if self._decoding is not None and self._decoding[0] == key:
            lanes = self._decoding[1]
            if all(lane.factors.arena.data is lane.data for lane in lanes):
                return lanes
        lanes = tuple(self._lanes(rows, [1] * len(rows)))
        self._decoding = (key, lanes)
        return lanes

    def _changed(self) -> None:
        self._batches.clear()
        self._decoding = None

    def _lanes(self, rows: Sequence[int], lengths: Sequence[int]) -> list[Lane]:
        """The lanes of all arenas, those in `Factors.order`."""
        used: dict[int, list[list[BoundPatch]]] = {}
        for place, row in enumerate(rows):
            for patch in self.patches(row):
                arena = patch.slot.arena
                if id(arena) not in used:
                    used[id(arena)] = [[] for _ in rows]
                    self._factors.setdefault(id(arena), Factors(arena))
                used[id(arena)][place].append(patch)
        factors = sorted((self._factors[number] for number in used), key=lambda found: found.order)
        return [lane for one in factors for lane in lanes_of(one, used[id(one.arena)], lengths)]

    def _choose(self, lane: Lane, model: CostModel) -> str:
        able = {"batched", "segments"}
        if indexed.runs_on(lane.data):
            able.add("indexed")
        if triton_indexed.runs_on(lane.data):
            able.add("triton")  # only when asked for: its costs on a device are not known yet
        # One product per run would make the operators of a decode step grow with the adapters in it.
        costed = able if lane.shape.prompt else able - {"segments"}
        # Asked last: it reads the blocks.
        wanted = self._kernel or model.choose(lane.shape, costed | {"dense"})
        if wanted == "dense" and self._all_finite(lane):
            able.add("dense")
        return wanted if wanted in able else model.choose(lane.shape, costed)

    def _all_finite(self, lane: Lane) -> bool:
        """Whether all blocks a dense product reads are known to hold only numbers."""
        if lane.shape.blocks != lane.shape.slots:
            return False  # unused blocks in between hold anything
        if len(self._finite) > _KEPT_DIGESTS:
            self._finite.clear()
        for slot, digest in lane.digests.items():
            if digest not in self._finite:
                self._finite[digest] = bool(lane.data[slot].sum().isfinite())
        return all(self._finite[digest] for digest in lane.digests.values())
