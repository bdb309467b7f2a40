"""What became of a decision of the scheduler."""

from dataclasses import dataclass
from typing import Literal

from persona_sdk.adapters.gate import GateReport
from persona_sdk.memory.scheduler import Decision


@dataclass(frozen=True)
class Outcome:
    """What became of a decision; ``note`` says why it was not done."""

    decision: Decision
    status: Literal["done", "rejected", "failed", "skipped"]
    note: str = ""
    report: GateReport | None = None
