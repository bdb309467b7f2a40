"""The lanes of one arena at fixed addresses, so that a CUDA graph captured once stays valid.

    symbol    field                    shape
    A, B      `LaneBuffers.data`       [slots, size]
    slot      `slots`                  [lanes, rows + 1] int32, -1 where a row has none
    used      `used`                   [lanes, rows + 1] int32, directions up to the last with a gate
    g         `gates`                  [lanes, rows + 1, rank] float32
    row(t)    `row_of_token`           [tokens] int32; tokens of no row: the last one, always empty
    segment   `segments`               [segments, 3] int32: (row, first token, tokens) of pieces of prompts
    tile      `tiles[site]`            [tiles, 5]: pieces of a site's output, see `_tiles`
    h         `hidden`                 scratch between the two launches of a site

Everything that changes from step to step stands in one tensor, `state`, of which the others are views: rows
join, leave and are steered by one copy into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Float32, Int, Int32, Int64
from torch import Tensor

from persona_sdk.engine.low_rank.lanes import Factors, Lane
from persona_sdk.engine.uploads import Staged, upload
from persona_sdk.errors import EngineError

TOKENS = 16  # of a segment: the least height of a product on tensor cores


@dataclass(frozen=True)
class Blocking:
    """How work is cut into programs. It depends on a site's shape only, so a row's sums do too.

    Args:
        split: columns of x that one program of the shrink reads.
        k: columns of x at a time.
        c: columns of y that one program of the expand writes.
    """

    split: int = 1024
    k: int = 128
    c: int = 128

    def splits(self, d_in: int) -> int:
        """Programs that share one dot product."""
        return -(-d_in // self.split)


class LaneBuffers:
    """The lanes of one arena, at fixed addresses.

    Args:
        factors: the arena.
        lanes: most patches of one row.
        rows: rows of a pass; those of `write` may be fewer.
        tokens: tokens of a pass, as many as rows when decoding.
        prompts: whether rows may have more than one token.
        device: of the tokens.
    """

    def __init__(
        self,
        factors: Factors,
        *,
        lanes: int,
        rows: int,
        tokens: int,
        prompts: bool,
        device: torch.device,
        blocking: Blocking = Blocking(),
    ) -> None:
        self.factors, self.lanes, self.rows, self.tokens = factors, lanes, rows, tokens
        self.data: Float[Tensor, "slots size"] = factors.arena.data
        places = (lanes, rows + 1)
        segments = rows + tokens // TOKENS if prompts else 0
        shapes = (places, places, (*places, factors.rank), (tokens,), (segments, 3))
        stops = np.cumsum([0, *(int(np.prod(shape)) for shape in shapes)]).tolist()
        self._staged = Staged(stops[-1], torch.int32, device)
        self.state: Int32[Tensor, " state"] = self._staged.tensor

        def views(flat: Any) -> list[Any]:
            parts = zip(shapes, stops[:-1], stops[1:], strict=True)
            return [flat[start:stop].reshape(shape) for shape, start, stop in parts]

        self._host = views(self._staged.host)
        self.slots, self.used, gates, self.row_of_token, self.segments = views(self.state)
        self.gates: Float32[Tensor, "lanes places rank"] = gates.view(torch.float32)
        wide = max(blocking.splits(site.d_in) * len(site.spans) for site in factors.sites.values())
        self.hidden: Float32[Tensor, " hidden"] = torch.empty(
            wide * lanes * tokens * factors.rank, dtype=torch.float32, device=device
        )
        self.blocking = blocking
        self.tiles = {index: upload(_tiles(factors, index, blocking.c), device) for index in factors.sites}
        self.write(())

    def fits(self, lanes: Sequence[Lane]) -> bool:
        """Whether these lanes can be written."""
        lengths = lanes[0].lengths if lanes else np.zeros(0, np.int64)
        total = int(lengths.sum())
        return (
            len(lanes) <= self.lanes
            and len(lengths) <= self.rows
            and total <= self.tokens
            and (bool(len(self.segments)) or int(lengths.max(initial=0)) <= 1)
        )

    def write(self, lanes: Sequence[Lane]) -> None:
        """Let the next pass use these lanes, all of this arena and one batch. Rows beyond theirs have none.

        One copy to the device; nothing is allocated and nothing waits, but for the copy before.
        """
        if not self.fits(lanes):
            rows, tokens = len(lanes[0].lengths), int(lanes[0].lengths.sum())
            raise EngineError(
                f"{len(lanes)} lanes of {rows} rows and {tokens} tokens "
                f"do not fit buffers of {self.lanes} lanes, {self.rows} rows and {self.tokens} tokens.",
                hint="Make larger buffers and capture the graph anew.",
            )
        self._staged.wait()
        slots, used, gates, row_of_token, segments = self._host
        slots.fill(-1)
        row_of_token.fill(self.rows)
        for array in (used, gates, segments):
            array.fill(0)
        for place, lane in enumerate(lanes):
            count, kept = len(lane.slots), lane.gates != 0
            if lane.slots.max(initial=-1) >= len(lane.data):
                raise EngineError(f"Slot {lane.slots.max()} is none of the arena's {len(lane.data)}.")
            last = np.where(kept.any(axis=1), kept.shape[1] - kept[:, ::-1].argmax(axis=1), 0)
            slots[place, :count] = lane.slots
            used[place, :count] = np.where(lane.slots >= 0, last, 0)
            gates[place, :count] = lane.gates.astype(np.float32, copy=False).view(np.int32)
        if lanes:
            lengths = lanes[0].lengths
            row_of_token[: lengths.sum()] = np.repeat(np.arange(len(lengths)), lengths)
            found = _segments(lengths) if len(segments) else np.zeros((0, 3), np.int32)
            segments[: len(found)] = found
        self.data = lanes[0].data if lanes else self.factors.arena.data
        self._staged.send()

    @property
    def addresses(self) -> tuple[int, ...]:
        """What a captured graph reads: it is void when one of them changes."""
        return self.data.data_ptr(), self.state.data_ptr(), self.hidden.data_ptr()


def _tiles(factors: Factors, site: int, width: int) -> Int64[Tensor, "tiles 5"]:
    """(module, B of its first column, d_out, first column in y, columns) of pieces of a site's output."""
    return torch.tensor(
        [
            (module, b + start, d_out, column + start, min(width, d_out - start))
            for module, (b, column, d_out) in enumerate(
                (span.b, span.module.column, span.module.d_out) for span in factors.sites[site].spans
            )
            for start in range(0, d_out, width)
        ],
        dtype=torch.int64,
    )


def _segments(lengths: Int[np.ndarray, " rows"]) -> Int32[np.ndarray, "segments 3"]:
    """(row, first token, tokens) of the pieces of every row, at most `TOKENS` long."""
    starts = np.cumsum(lengths) - lengths
    return np.array(
        [
            (row, start + begin, min(TOKENS, length - begin))
            for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True))
            for begin in range(0, length, TOKENS)
        ],
        dtype=np.int32,
    ).reshape(-1, 3)
