"""Compiling our loops: in folders that cannot be written to as well, and without numba not at all."""

import sys
from typing import no_type_check

import numba
import numpy as np
import pytest

from persona_sdk.engine.compiled import compiled


@no_type_check
def _double(x, out):
    for place in range(x.shape[0]):
        out[place] = 2 * x[place]


@pytest.mark.parametrize("signature", [None, "void(float32[::1], float32[::1])"])
@pytest.mark.parametrize("cached", [True, False])
def test_what_is_compiled_computes(signature, cached, monkeypatch):
    real = numba.njit

    def njit(*given, cache=False, **options):
        if cache and not cached:
            raise RuntimeError("cannot cache function: no locator available")
        return real(*given, **options)

    monkeypatch.setattr(numba, "njit", njit)
    double = compiled(_double, signature)
    assert double is not None
    x, out = np.arange(5, dtype=np.float32), np.zeros(5, np.float32)
    x[1] = np.nan
    double(x, out)
    np.testing.assert_array_equal(out, 2 * x)  # NaN stays NaN


def test_without_numba_torch_does_the_work(monkeypatch):
    monkeypatch.setitem(sys.modules, "numba", None)
    assert compiled(_double) is None
