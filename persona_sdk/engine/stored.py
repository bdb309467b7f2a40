"""Numbers as compiled loops read and write them: float32 as it is, bfloat16 as its bits.

numba knows no bfloat16. Its bits are the upper half of a float32's, so a loop computes in float32 and

    widened(bits)          = float32 of  bits << 16                      exact
    rounded(number, into)  = the bits of the nearest bfloat16            ties to even, as torch rounds

Both are decided by the type of what is stored, so that one loop serves both precisions. Numba does not see
changes of this file in machine code it has kept: touch the loops that use it, too.
"""

from functools import cache
from typing import Any, no_type_check

import numpy as np
import torch
from torch import Tensor

STORED = (torch.float32, torch.bfloat16)


def numbers(tensor: Tensor) -> Any:
    """The memory of a CPU tensor of a dtype in `STORED`, or of integers, for a compiled loop."""
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(np.uint16)
    return tensor.numpy()


def widened(number: Any) -> Any:
    """In a compiled loop: the float32 value of a stored number."""
    raise NotImplementedError


def rounded(number: Any, into: Any) -> Any:
    """In a compiled loop: a float32 as the array `into` stores it."""
    raise NotImplementedError


def prefetch(line: Any, place: Any) -> None:
    """In a compiled loop: let the memory of an array's element come nearer; any place is allowed."""
    raise NotImplementedError


@cache
def teach_numba() -> None:
    """Tell numba what these functions compile to."""
    from llvmlite import ir  # type: ignore[import-untyped]
    from numba import types
    from numba.core import cgutils
    from numba.extending import intrinsic, overload

    @no_type_check
    def widened_of(number):
        if number == types.uint16:
            return lambda number: np.uint32(np.uint32(number) << 16).view(np.float32)
        return lambda number: number

    @no_type_check
    def bits_of(number, into):
        bits = np.float32(number).view(np.uint32)
        nearest = np.uint32(bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))
        return np.uint16((nearest if number == number else np.uint32(0x7FC00000)) >> np.uint32(16))

    @no_type_check
    def rounded_of(number, into):
        return bits_of if into.dtype == types.uint16 else lambda number, into: number

    @intrinsic
    @no_type_check
    def fetch(_typing, address):
        def generate(context, builder, _signature, args):
            byte, number = ir.IntType(8).as_pointer(), ir.IntType(32)
            kind = ir.FunctionType(ir.VoidType(), [byte, number, number, number])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            how = [ir.Constant(number, value) for value in (0, 2, 1)]  # to read, into the second cache, data
            builder.call(function, [builder.inttoptr(args[0], byte), *how])
            return context.get_dummy_value()

        return types.void(types.int64), generate

    @no_type_check
    def prefetch_of(line, place):
        return lambda line, place: fetch(line.ctypes.data + place * line.itemsize)

    overload(widened)(widened_of)
    overload(rounded)(rounded_of)
    overload(prefetch)(prefetch_of)
