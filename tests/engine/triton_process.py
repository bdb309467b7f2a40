"""Runs in a process of its own, started by test_triton_indexed.py.

Triton decides when it is imported whether it interprets.

TRITON_INTERPRET=1    the kernels against the dense formula, on CPUs
without, -k compiled  the kernels become machine code; needs no device
without, -k formula   as the first, on a device
"""

import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from persona_sdk.engine.low_rank.blocks import BlockLayout
from persona_sdk.engine.low_rank.lane_buffers import Blocking, LaneBuffers
from persona_sdk.engine.low_rank.lanes import Factors, Lane
from persona_sdk.engine.low_rank.sites import Site, SiteModule
from persona_sdk.engine.low_rank.triton_indexed import TritonIndexed, kernels, runs_on

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
BLOCKING = Blocking(split=16, k=16, c=16)  # small, so that small shapes are cut too
SLOTS = 3


@dataclass
class Arena:
    layout: BlockLayout
    data: Tensor


@dataclass(frozen=True)
class Case:
    """Lanes on one patched site (index 1, behind another patched one) and the pass they are in."""

    lanes: list[Lane]
    x: Tensor
    y: Tensor

    @property
    def site(self) -> Site:
        return self.lanes[0].factors.arena.layout.sites[1]

    def buffers(self, spare: int = 0) -> LaneBuffers:
        lengths = self.lanes[0].lengths
        return LaneBuffers(
            self.lanes[0].factors,
            lanes=len(self.lanes) + spare,
            rows=len(lengths) + spare,
            tokens=len(self.x) + spare,
            prompts=bool((lengths > 1).any()),
            device=DEVICE,
            blocking=BLOCKING,
        )

    def added(self, buffers: LaneBuffers) -> Tensor:
        buffers.write(self.lanes)
        spare = buffers.tokens - len(self.x)
        x, y = (torch.nn.functional.pad(t, (0, 0, 0, spare)).to(DEVICE) for t in (self.x, self.y))
        TritonIndexed(buffers).add(1, x, y)
        assert not y[len(self.x) :].any(), "a token of no row was changed"
        return y[: len(self.x)].cpu()

    def formula(self, of=np.asarray) -> np.ndarray:
        """In float64, one token and direction at a time: y + B diag(g) A x, or of all numbers' sizes."""
        found, x = of(self.y.double().numpy()).copy(), of(self.x.double().numpy())
        for lane in self.lanes:
            data, layout = of(lane.data.double().cpu().numpy()), lane.factors.arena.layout
            for token, (slot, gate) in enumerate(zip(lane.token_slots, lane.token_gates, strict=True)):
                for span in layout.spans[1] if slot >= 0 else ():
                    column, d_out = span.module.column, span.module.d_out
                    for k in np.flatnonzero(gate):
                        A = data[slot, span.a + k * self.site.d_in :][: self.site.d_in]
                        B = data[slot, span.b + k * d_out :][:d_out]
                        found[token, column : column + d_out] += of(gate[k]) * (A @ x[token]) * B
        return found


def numbers(generator: np.random.Generator, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(generator.standard_normal(shape)).to(dtype)


@st.composite
def cases(draw: st.DrawFn, prompts: bool) -> Case:
    dtypes = st.sampled_from([torch.float32, torch.bfloat16])
    factor_dtype, x_dtype, y_dtype = draw(dtypes), draw(dtypes), draw(dtypes)
    rank = draw(st.sampled_from([1, 3, 8, 16, 20]))
    d_in, widths = draw(st.integers(1, 40)), draw(st.lists(st.integers(1, 20), min_size=1, max_size=3))
    columns = np.cumsum([0, *widths]).tolist()
    modules = tuple(SiteModule(str(n), width, columns[n]) for n, width in enumerate(widths))
    sites = (Site(0, 3, (SiteModule("first", 2, 0),)), Site(1, d_in, modules))
    patched = draw(st.sets(st.sampled_from([module.path for module in modules]), min_size=1))
    layout = BlockLayout(rank, sites, frozenset(patched | {"first"}))
    rows = draw(st.integers(1, 3))
    lengths = np.array(
        draw(st.lists(st.integers(0, 20), min_size=rows, max_size=rows)) if prompts else [1] * rows
    )
    generator = np.random.default_rng(draw(st.integers(0, 999)))
    slots = np.array([draw(st.lists(st.integers(-1, SLOTS - 1), min_size=rows, max_size=rows))
                      for _ in range(draw(st.integers(1, 2)))])  # fmt: skip
    gates = generator.choice([0, 1, -0.5, 3], (*slots.shape, rank)).astype(np.float32)
    gates[..., draw(st.integers(0, rank)) :] = 0  # padded directions
    # Whatever no row asks for holds NaN: a kernel that reads it cannot hide it.
    data = torch.full((SLOTS, layout.size), torch.nan, dtype=factor_dtype)
    for slot, k in {(s, k) for s, g in zip(slots.flat, gates.reshape(-1, rank), strict=True)
                    for k in np.flatnonzero(g) if s >= 0}:  # fmt: skip
        for site, spans in zip(sites, layout.spans, strict=True):
            for span in spans:
                for start, width in ((span.a, site.d_in), (span.b, span.module.d_out)):
                    data[slot, start + k * width :][:width] = numbers(generator, (width,), factor_dtype)
    factors = Factors(Arena(layout, data.to(DEVICE)))
    lanes = [Lane(factors, factors.arena.data, s, g, lengths, {}) for s, g in zip(slots, gates, strict=True)]
    tokens = int(lengths.sum())
    x, y = numbers(generator, (tokens, d_in), x_dtype), numbers(generator, (tokens, columns[-1]), y_dtype)
    return Case(lanes, x, y)


def assert_is_formula(case: Case, spare: int) -> None:
    found, expected = case.added(case.buffers(spare)).double().numpy(), case.formula()
    # Sums are float32, also between bfloat16s; on a device h meets bfloat16 factors as TF32. Then y is
    # rounded: the interpreter cuts bits off where a device takes the nearest.
    rounding = 2.0**-7 if case.y.dtype == torch.bfloat16 else 0.0
    products = case.lanes[0].data.dtype == torch.bfloat16 and case.lanes[0].lengths.max() > 1
    sums = 2.0**-10 if DEVICE.type == "cuda" and products else 2e-6
    bound = rounding * np.abs(expected) + sums * case.formula(np.abs) + 1e-30
    np.testing.assert_array_less(np.abs(found - expected), bound)


@settings(max_examples=25, deadline=None)
@given(case=cases(prompts=False), spare=st.integers(0, 1))
def test_decoding_is_the_formula(case, spare):
    assert_is_formula(case, spare)


@settings(max_examples=20, deadline=None)
@given(case=cases(prompts=True), spare=st.integers(0, 1))
def test_prompts_are_the_formula(case, spare):
    assert_is_formula(case, spare)


@pytest.mark.parametrize("prompts", [False, True])
@settings(max_examples=5, deadline=None)
@given(data=st.data())
def test_a_row_beside_others_has_the_bits_of_its_formula_alone(prompts, data):
    case = data.draw(cases(prompts=prompts))
    lengths = case.lanes[0].lengths
    row = data.draw(st.integers(0, len(lengths) - 1))
    start = int(lengths[:row].sum())
    own = slice(start, start + int(lengths[row]))
    alone = [
        Lane(lane.factors, lane.data, lane.slots[[row]], lane.gates[[row]], lengths[[row]], {})
        for lane in case.lanes
    ]
    x, y = case.x.clone(), case.y.clone()
    for others in (x[: own.start], x[own.stop :]):
        others.fill_(torch.nan)
    buffers = case.buffers()
    together = Case(case.lanes, x, y).added(buffers)[own]
    # The same buffers, so that the same kernels run: a graph does not know how many rows it has.
    assert together.equal(Case(alone, x[own], y[own]).added(buffers))


@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_are_compiled_without_spills(capability, tmp_path, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    integers = {"rows": "i32", "lanes": "i32", "tokens": "i32", "size": "i64", "first_a": "i32"}
    types = {
        "x": "*bf16",
        "y": "*bf16",
        "data": "*bf16",
        "hidden": "*fp32",
        "gates": "*fp32",
        "tiles": "*i64",
    }
    types |= dict.fromkeys(("slots", "used", "row_of_token", "segments"), "*i32") | integers
    types |= {"x_stride": "i32", "y_stride": "i32"}
    constants = {"D_IN": 4096, "RANK": 16, "MODULES": 3, "SPLITS": 4, "SPLIT": 1024, "K_BLOCK": 128}
    constants |= {"C_BLOCK": 128, "R_BLOCK": 16, "TOKENS": 16, "SAME": True, "PRECISION": "tf32"}
    for name in ("shrink_rows", "expand_rows", "shrink_segments", "expand_segments"):
        kernel = getattr(kernels(), name)
        names = kernel.arg_names
        source = ASTSource(
            fn=kernel,
            signature={arg: types.get(arg, "constexpr") for arg in names},
            constexprs={arg: constants[arg] for arg in names if arg not in types},
            attrs={(place,): [["tt.divisibility", 16]] for place, arg in enumerate(names) if arg in types},
        )
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert ("mma" in compiled.asm["ptx"]) == name.endswith("segments"), "prompts run on tensor cores"
        (tmp_path / name).write_bytes(compiled.asm["cubin"])
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        usage = subprocess.run(
            [tool, "-res-usage", tmp_path / name], capture_output=True, text=True, check=True
        )
        assert "STACK:0" in usage.stdout
        assert "LOCAL:0" in usage.stdout


def test_cpu_blocks_are_left_to_other_kernels():
    assert not runs_on(torch.zeros(2, 3))
