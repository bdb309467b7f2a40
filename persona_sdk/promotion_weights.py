"""Texts to weights and back: distil -> gate -> adapter ``<persona>/memory`` with its sources -> attach.

An adapter that fails its gate is not stored; a `rejection` cube keeps the report, so that the same texts are
not tried again.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persona_sdk.adapters.distillation import DistillationConfig, distil
from persona_sdk.adapters.distillation_data import probes_of
from persona_sdk.adapters.gate import Gate, GateReport, guesses
from persona_sdk.adapters.twin import twin
from persona_sdk.errors import PersonaError
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, Origin, Source
from persona_sdk.memory.facts import REJECTION
from persona_sdk.memory.scheduler import Decision
from persona_sdk.promotion_cubes import PromotionCubes
from persona_sdk.promotion_outcome import Outcome

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

TITLE = "memory"  # of the adapter that holds a persona's texts
DISTILLATION = Origin(kind="derived", reference="distillation")


class TextsToWeights:
    """Makes, attaches and drops the adapters of a model's personas."""

    def __init__(self, model: "PersonaModel", distillation: DistillationConfig, gate: Gate) -> None:
        self._model = model
        self._cubes = PromotionCubes(model)
        self._distillation, self._gate = distillation, gate

    def learn(self, owner: str, decision: Decision, check: Callable[[], None]) -> Outcome:
        """Make an adapter of texts, and attach it if it passes the gate."""
        cubes = self._cubes.texts(owner, decision.cubes)
        texts = [cube.text or "" for cube in cubes]
        adapter = distil(self._model.base, texts, self._distillation, progress=False, check=check)
        probes = probes_of(texts, rivals=guesses(twin(self._model.base), check=check))
        report = self._gate.test(self._model.base, adapter.tensors, probes, check=check)
        if not report.accepted:
            self._reject(owner, cubes, report)
            return Outcome(decision, "rejected", " ".join(report.reasons), report)
        if {cube.id for cube in self._cubes.texts(owner, decision.cubes)} != {cube.id for cube in cubes}:
            return Outcome(decision, "failed", "Some of the texts left while they were learned.", report)
        name = f"{owner}/{TITLE}"
        made = self._model.adapters.add(
            name,
            adapter,
            sources=cubes,
            kind=self._cubes.kind(owner),
            report=report.model_dump(mode="json"),
            origin=DISTILLATION,
            message=f"promote to weights: {decision.reason}",
        )
        try:
            self._cubes.persona(owner).attach(name)
        except PersonaError:
            self._cubes.retire(owner, {made.id}, "parametric", "promotion to weights taken back")
            raise
        self._cubes.retire(
            owner, self._cubes.ids(owner, "parametric", REJECTION), "parametric", "weights learned the texts"
        )
        return Outcome(decision, "done", report=report)

    def _reject(self, owner: str, cubes: Sequence[MemCube], report: GateReport) -> None:
        header = CubeHeader(
            title="not learned",
            semantic_type=REJECTION,
            trust="system",
            origin=DISTILLATION,
            sources=tuple(Source.of(cube) for cube in cubes),
            attributes={"report": report.model_dump(mode="json")},
        )

        def changes() -> dict[str, Any]:
            return {"retire": sorted(self._cubes.ids(owner, "parametric", REJECTION))}

        draft = CubeDraft(kind="parametric", header=header)
        message = f"weights refused: {' '.join(report.reasons)}"
        self._cubes.edit(owner, message, changes, add=[draft])

    def drop(self, owner: str, decision: Decision) -> None:
        """Retire adapters and their attachments."""
        gone = set(decision.cubes)
        attached = {a.cube_id for a in self._model.adapters.attachments(owner) if a.adapter.cube_id in gone}
        self._cubes.retire(owner, gone | attached, "parametric", f"demote weights: {decision.reason}")
