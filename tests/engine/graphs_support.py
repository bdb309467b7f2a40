"""Captured steps without a device: a recorder that notices what a CUDA graph would not survive, and the
branches' operator in torch.
"""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from persona_sdk.engine import Engine
from persona_sdk.engine.decode_graphs import DecodeGraphs
from persona_sdk.engine.forward import fused, norms

CPU = torch.device("cpu")


class Tape(TorchDispatchMode):
    """Every operator with all that a graph bakes in: numbers, shapes, and addresses from outside the step.

    What an operator writes in place, and every view, belongs to whom the memory belonged before.
    """

    def __init__(self):
        super().__init__()
        self.lines, self._kept = [], []
        self._inside, self._outside = set(), set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        told = self._told((args, kwargs or {}))
        out = function(*args, **(kwargs or {}))
        self.lines.append((function.name(), told))
        self._kept.append(out)  # so that no address is that of something before
        self._inside |= {id_of(tensor) for tensor in flat(out)} - self._outside
        return out

    def _told(self, value):
        if isinstance(value, Tensor):
            if not strided(value):
                return ("weight", id(value))
            if id_of(value) in self._inside:
                return ("inside", tuple(value.shape), value.stride(), value.dtype)
            self._outside.add(id_of(value))
            return (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype)
        if isinstance(value, tuple | list):
            return tuple(map(self._told, value))
        if isinstance(value, dict):
            return tuple((name, self._told(own)) for name, own in sorted(value.items()))
        return value


def strided(tensor: Tensor) -> bool:
    """Whether it has an address; packed weights have none."""
    return tensor.layout == torch.strided and not tensor.is_mkldnn


def id_of(tensor: Tensor) -> int:
    """The same for all views of one memory."""
    return tensor.untyped_storage().data_ptr() or id(tensor)


def flat(out: object) -> list[Tensor]:
    """All tensors of an operator's result."""
    if isinstance(out, tuple | list):
        return [tensor for one in out for tensor in flat(one)]
    return [out] if isinstance(out, Tensor) and strided(out) else []


class Strict:
    """Records as a graph does, without a device: a replay whose operators, numbers or addresses are not those
    of the recording fails. Like a graph's, the result stands in one place and is overwritten.
    """

    def __init__(self):
        self.recorded = 0

    def record(self, step):
        self.recorded += 1
        return _Taped(step)


class _Taped:
    def __init__(self, step):
        self._step = step
        with Tape() as tape:
            self._output = step()
        self._lines = tape.lines

    def replay(self):
        with Tape() as tape:
            output = self._step()
        assert tape.lines == self._lines
        return self._output.copy_(output)


def without_compiled_loops(monkeypatch) -> None:
    """What runs on a device: torch's own attention and norms, seen by a dispatch mode."""
    monkeypatch.setattr(fused, "decode_attention", lambda *_: None)
    monkeypatch.setattr(norms, "_kernel", lambda: None)


def low_rank_add(
    x, y, data, slots, used, gates, row_of_token, segments, tiles, hidden, first_a, modules, split, k, c
):
    """The operator's formula, from the same buffers as the kernels."""
    (lanes, _, rank), d_in = gates.shape, x.shape[1]
    assert len(segments) == 0, "one token a row"
    for token, row in enumerate(row_of_token.tolist()):
        for lane in range(lanes):
            kept = gates[lane, row].nonzero()[:, 0]
            if slots[lane, row] < 0 or not used[lane, row]:
                continue
            assert kept.max() < used[lane, row]
            block, gate = data[slots[lane, row]].double(), gates[lane, row, kept].double()
            A = block[first_a:][: modules * rank * d_in].view(modules, rank, d_in)[:, kept]
            h = gate * (A @ x[token].double())
            for module, b, d_out, column, count in tiles.tolist():
                B = block[b:].as_strided((rank, count), (d_out, 1))[kept]
                y[token, column : column + count] += (h[module] @ B).to(y.dtype)


@contextmanager
def branches_in_torch() -> Iterator[None]:
    """`persona_sdk::low_rank_add` on CPUs without Triton."""
    library = torch.library.Library("persona_sdk", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it takes the place of another is what it is for
        library.impl("low_rank_add", low_rank_add, "CPU", allow_override=True)
    try:
        yield
    finally:
        library._destroy()


def on_graphs(engine: Engine, record=None, least_width: int = 8) -> DecodeGraphs:
    """Let an engine on the CPU run its decode steps as on a device."""
    engine.ready()
    loop = engine._loop
    assert loop is not None
    assert loop.graphs is None, "no graphs on CPUs"
    loop.graphs = DecodeGraphs(
        loop.forward,
        loop.table.pool,
        loop.table.patches,
        CPU,
        reads=lambda _: True,
        record=record,
        least_width=least_width,
    )
    return loop.graphs
