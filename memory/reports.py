"""How turns become statements, as configuration, and what came of it, as reports."""

from dataclasses import dataclass

from pydantic import Field

from persona_sdk.config import FrozenConfig
from persona_sdk.memory.cube import MemCube
from persona_sdk.memory.duplicates import DuplicateConfig
from persona_sdk.memory.enrichment import Change
from persona_sdk.memory.salience import SalienceConfig
from persona_sdk.memory.screening import Screen


class WriterConfig(FrozenConfig):
    """How turns become statements."""

    salience: SalienceConfig = SalienceConfig()
    duplicates: DuplicateConfig = DuplicateConfig()
    screen: Screen = Screen()
    batch: int = Field(32, ge=1, description="turns of one owner in one commit")
    attempts: int = Field(3, ge=1, description="after so many failures a task is left alone")
    corrections: bool = Field(True, description="also distil corrections to rules")


@dataclass(frozen=True)
class Observed:
    """What `MemoryWriter.observe` stored. ``problem``: why the turns have no vector yet, "" if they have."""

    turns: tuple[MemCube, ...]
    queued: int
    quarantined: int = 0
    problem: str = ""


@dataclass(frozen=True)
class Failure:
    """A task that failed, and how often. ``error`` is known to the process that tried, else ""."""

    owner: str
    cube_id: str
    task: str
    attempts: int
    error: str = ""


@dataclass(frozen=True)
class FlushReport:
    """What a flush did. ``ok`` is False if anything failed; ``waiting`` counts what is left in the queue."""

    turns: int = 0
    added: tuple[str, ...] = ()
    retired: tuple[str, ...] = ()
    repeated: tuple[str, ...] = ()
    unconfirmed: int = 0
    below_threshold: int = 0
    problems: tuple[str, ...] = ()
    failures: tuple[Failure, ...] = ()
    waiting: int = 0

    @property
    def ok(self) -> bool:
        """Whether every task was done."""
        return not self.failures

    @classmethod
    def of(cls, change: Change, added: tuple[str, ...], *, turns: int = 0) -> "FlushReport":
        """What came of a change; `added` are the ids that its drafts were given."""
        return cls(
            turns=turns,
            added=added,
            retired=tuple(change.retire),
            repeated=tuple(change.repeated),
            unconfirmed=change.unconfirmed,
        )

    def __add__(self, other: "FlushReport") -> "FlushReport":
        """Both together."""
        return FlushReport(
            *(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__)
        )
