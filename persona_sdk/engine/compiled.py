"""Compiling the engine's own loops for CPUs, with numba, in one way.

Machine code is kept beside the source, or in the user's cache folder where that is read-only, or nowhere.
The functions themselves carry ``@no_type_check``: numba compiles what is written, not what a type checker
wrapped around it.
"""

import logging
from collections.abc import Callable
from typing import Any

from persona_sdk.engine import stored

logger = logging.getLogger("persona_sdk.engine")

# "nnan" and "ninf" stay off: a row with NaN must stay NaN, so that it is found and stopped.
_FAST = {"nsz", "arcp", "contract", "afn", "reassoc"}


def compiled(function: Callable[..., None], signature: str | None = None) -> Callable[..., None] | None:
    """The function as machine code; None where numba cannot be imported, and torch does the work.

    Args:
        function: loops over numpy arrays.
        signature: compile for these types now, not at the first call with each combination.
    """
    try:
        import numba
    except ImportError:
        logger.info("numba cannot be imported; the engine's loops run in torch.")
        return None
    stored.teach_numba()
    options: dict[str, Any] = {"fastmath": _FAST, "nogil": True, "error_model": "numpy"}
    made: Callable[..., None]
    try:
        made = numba.njit(signature, cache=True, **options)(function)
    except RuntimeError:  # no folder to keep machine code in
        made = numba.njit(signature, **options)(function)
    return made
