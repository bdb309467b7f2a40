"""Texts to weights and back: distil -> gate -> adapter ``<persona>/memory`` with its sources -> attach.

An adapter that fails its gate is not stored. A `rejection` cube keeps why, so that the same texts are not
tried again; the same goes for texts that cannot be asked about, training that diverges, and an adapter that
cannot be attached.

To file and to attach are two commits, since an attachment names the adapter's cube. `heal` makes up for a
crash between them: the scheduler counts the texts of a filed adapter as known.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from persona_sdk.adapters.distillation import DistillationConfig, distil
from persona_sdk.adapters.gate import Gate, GateReport, guesses
from persona_sdk.adapters.probes import probes_of
from persona_sdk.adapters.statements import Fact
from persona_sdk.adapters.twin import twin
from persona_sdk.errors import AdapterError, PersonaError
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, Origin, Source
from persona_sdk.memory.facts import ADAPTER, REJECTION
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
        facts = [_fact(cube) for cube in cubes]
        known = [_fact(cube) for cube in self._cubes.persona(owner).memories()]
        rivals = guesses(twin(self._model.base), check=check)
        probes = probes_of(facts, known=known, rivals=rivals)
        if not probes:
            return self._refused(owner, decision, cubes, ["Nothing can be asked about these texts."])
        try:
            adapter = distil(self._model.base, facts, self._distillation, progress=False, check=check)
        except AdapterError as error:  # diverged; so it would the next time
            return self._refused(owner, decision, cubes, [error.message])
        report = self._gate.test(self._model.base, adapter.tensors, probes, check=check)
        if not report.accepted:
            return self._refused(owner, decision, cubes, report.reasons, report)
        if {cube.id for cube in self._cubes.texts(owner, decision.cubes)} != {cube.id for cube in cubes}:
            return Outcome(decision, "failed", "Some of the texts left while they were learned.", report)
        made = self._model.adapters.add(
            f"{owner}/{TITLE}",
            adapter,
            sources=cubes,
            kind=self._cubes.kind(owner),
            report=report.model_dump(mode="json"),
            origin=DISTILLATION,
            message=f"promote to weights: {decision.reason}",
        )
        self._attach(owner, made)
        return Outcome(decision, "done", report=report)

    def heal(self, owner: str) -> None:
        """Attach an adapter that a crash left filed and never attached; what was detached since stays so."""
        made = [cube for cube in self._cubes.live(owner, "parametric", ADAPTER) if _is_ours(cube)]
        used = {attached.adapter.cube_id for attached in self._model.adapters.attachments(owner)}
        loose = [cube for cube in made if cube.id not in used]
        if loose:
            ever = self._cubes.ever_attached(owner)
            for cube in loose:
                if cube.id not in ever:
                    self._attach(owner, cube)

    def _attach(self, owner: str, made: MemCube) -> None:
        try:
            self._cubes.persona(owner).attach(f"{owner}/{TITLE}")
        except PersonaError as error:
            self._cubes.retire(owner, {made.id}, "parametric", "promotion to weights taken back")
            if not error.retryable:  # it does not go with what else is attached; nor would the next one
                texts = self._cubes.texts(owner, [source.cube_id for source in made.header.sources])
                self._reject(owner, texts, ["The adapter could not be attached."])
            raise
        refused = self._cubes.ids(owner, "parametric", REJECTION)
        self._cubes.retire(owner, refused, "parametric", "weights learned the texts")

    def _refused(
        self,
        owner: str,
        decision: Decision,
        cubes: Sequence[MemCube],
        reasons: Sequence[str],
        report: GateReport | None = None,
    ) -> Outcome:
        self._reject(owner, cubes, reasons, report)
        return Outcome(decision, "rejected", " ".join(reasons), report)

    def _reject(
        self, owner: str, cubes: Sequence[MemCube], reasons: Sequence[str], report: GateReport | None = None
    ) -> None:
        """Keep why weights did not learn these texts, so that they are not tried again as they are."""
        told = {} if report is None else {"report": report.model_dump(mode="json")}
        header = CubeHeader(
            title="not learned",
            semantic_type=REJECTION,
            trust="system",
            origin=DISTILLATION,
            sources=tuple(Source.of(cube) for cube in cubes),
            attributes={"reasons": list(reasons), **told},
        )

        def changes() -> dict[str, Any]:
            return {"retire": sorted(self._cubes.ids(owner, "parametric", REJECTION))}

        draft = CubeDraft(kind="parametric", header=header)
        self._cubes.edit(owner, f"weights refused: {' '.join(reasons)}", changes, add=[draft])

    def drop(self, owner: str, decision: Decision) -> None:
        """Retire adapters and their attachments."""
        gone = set(decision.cubes)
        attached = {a.cube_id for a in self._model.adapters.attachments(owner) if a.adapter.cube_id in gone}
        self._cubes.retire(owner, gone | attached, "parametric", f"demote weights: {decision.reason}")


def _is_ours(cube: MemCube) -> bool:
    return cube.header.title == TITLE and cube.header.origin == DISTILLATION


def _fact(cube: MemCube) -> Fact:
    """A text with the attribute and value that its writer noted, if one did."""
    noted = [cube.header.attributes.get(name) for name in ("attribute", "value")]
    attribute, value = (given if isinstance(given, str) else None for given in noted)
    return Fact(cube.text or "", attribute, value)
