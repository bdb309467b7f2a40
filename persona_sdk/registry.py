"""Adapter families by name.

A family is an entry point of the group ``persona_sdk.adapters`` whose object is a subclass of
`persona_sdk.adapters.Adapter` with that name as its ``family``. The families of this package are declared
the same way, so another package adds one with two lines of its ``pyproject.toml``:

    [project.entry-points."persona_sdk.adapters"]
    my_family = "my_package.my_module:MyAdapter"

Nothing is imported until a family is asked for. A family that cannot be loaded is logged and raises when
asked for by name; the others work on.
"""

import logging
from functools import cache
from importlib.metadata import EntryPoint, entry_points
from typing import TYPE_CHECKING

from persona_sdk.errors import AdapterError, NotFoundError

if TYPE_CHECKING:
    from persona_sdk.adapters.base import Adapter

logger = logging.getLogger("persona_sdk.registry")

GROUP = "persona_sdk.adapters"
_OWN = "persona-sdk"


def families() -> tuple[str, ...]:
    """Names of all declared families, sorted; loads none of them."""
    return tuple(sorted(_declared()))


@cache
def family(name: str) -> type["Adapter"]:
    """The adapter class of a family.

    Raises:
        NotFoundError: no such family is declared; names those that are.
        AdapterError: it is declared but cannot be loaded, or is no adapter family.
    """
    from persona_sdk.adapters.base import Adapter

    declared = _declared()
    if name not in declared:
        raise NotFoundError(
            f"There is no adapter family {name!r}.", hint=f"Known: {', '.join(sorted(declared)) or 'none'}."
        )
    point = declared[name]
    try:
        found = point.load()
    except Exception as error:  # a plug-in may fail in any way while it is imported
        raise _broken(point, f"{type(error).__name__}: {error}") from error
    if not (isinstance(found, type) and issubclass(found, Adapter)):
        raise _broken(point, f"{found!r} is no subclass of Adapter")
    if getattr(found, "family", None) != name:
        raise _broken(point, f"its class calls itself {getattr(found, 'family', None)!r}")
    return found


def _declared() -> dict[str, EntryPoint]:
    """Entry points by name. Two of one name: this package's own wins, else the first in order of package."""
    points: dict[str, EntryPoint] = {}
    for point in sorted(entry_points(group=GROUP), key=lambda p: (_package(p) != _OWN, _package(p))):
        known = points.setdefault(point.name, point)
        if known.value != point.value:
            logger.warning(
                "Adapter family %r of package %s is hidden by that of %s.",
                point.name,
                _package(point),
                _package(known),
            )
    return points


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist else "?"


def _broken(point: EntryPoint, reason: str) -> AdapterError:
    logger.warning("Adapter family %r of package %s is broken: %s", point.name, _package(point), reason)
    return AdapterError(
        f"Adapter family {point.name!r} of package {_package(point)} cannot be used: {reason}.",
        hint="Update or uninstall that package; the other families work without it.",
    )
