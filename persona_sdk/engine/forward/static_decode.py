"""A decode step at fixed addresses: what a CUDA graph of the forward pass reads of its rows.

    places     | row 4 | row 0 | row 7 | free |            rows, a power of two
    tokens     |   t   |   t   |   t   |   0  |
    positions  |  12   |   3   |  40   |   0  |
    slots      |   s   |   s   |   s   |   1  |            1: the scratch slot, which no row can own
    tables     |  12+1 slots, then 0 up to the width  |    width, a power of two; a free place sees slot 1

All of it stands in one tensor, of which the batch's tensors are views: rows join and leave by one copy. A
free place computes something from its own scratch, and nobody reads what comes out.
"""

from collections.abc import Sequence

import numpy as np
import torch
from jaxtyping import Int64
from torch import Tensor

from persona_sdk.engine.forward.batch import PackedBatch, RowTokens, packed_size, packed_views
from persona_sdk.engine.forward.pool import SCRATCH
from persona_sdk.engine.uploads import Staged
from persona_sdk.errors import EngineError


class StaticDecode:
    """The inputs of decode steps of one bucket.

    Args:
        rows: places.
        width: most positions a row may have, the new one included.
        device: of the pass.
    """

    def __init__(self, rows: int, width: int, device: torch.device) -> None:
        self.rows, self.width = rows, width
        self._staged = Staged(packed_size(rows, rows, width), torch.int64, device)
        self._host = packed_views(self._staged.host, rows, rows, width)
        self.state: Int64[Tensor, " state"] = self._staged.tensor
        self.write(())

    def fits(self, new: Sequence[RowTokens]) -> bool:
        """Whether `write` takes these rows."""
        return len(new) <= self.rows and all(
            len(row.tokens) == 1 and len(row.table) <= self.width and row.vectors is None for row in new
        )

    def write(self, new: Sequence[RowTokens]) -> None:
        """Let the next step compute these rows' tokens, in the first places. One copy to the device.

        Raises:
            EngineError: they do not fit.
        """
        if not self.fits(new):
            raise EngineError(
                f"{len(new)} rows do not fit a step of {self.rows} rows with one token each and "
                f"{self.width} positions.",
                hint="Take a larger step.",
            )
        self._staged.wait()
        tokens, positions, slots, tables = self._host
        for array in (tokens, positions, tables):
            array.fill(0)
        slots.fill(SCRATCH)
        tables[len(new) :, 0] = SCRATCH
        for place, row in enumerate(new):
            tokens[place], positions[place] = row.tokens[0], row.positions[0]
            tables[place, : len(row.table)] = row.table
        slots[: len(new)] = tables[np.arange(len(new)), positions[: len(new)]]
        self._staged.send()

    def batch(self) -> PackedBatch:
        """Views of the buffers. Its Python side is that of the bucket, whoever the rows are."""
        tokens, positions, slots, tables = packed_views(self.state, self.rows, self.rows, self.width)
        return PackedBatch(
            tokens=tokens,
            positions=positions,
            slots=slots,
            lengths=(1,) * self.rows,
            tables=tables,
            seen=(self.width,) * self.rows,
            wanted=tuple(range(self.rows)),
        )
