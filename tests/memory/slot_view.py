"""What an owner's statements say at a time, for tests that compare it."""

from collections.abc import Iterable
from datetime import datetime

from persona_sdk.memory import MemCube
from persona_sdk.memory.slots import Held


def view(statements: Iterable[MemCube], moment: datetime) -> dict[str, MemCube]:
    """By slot, the statement that holds at a time in the world."""
    return {
        cube.header.slot: cube
        for cube in sorted(statements, key=lambda cube: Held.of(cube).start)
        if cube.header.slot and cube.header.valid(moment) and not cube.header.expired(moment)
    }
