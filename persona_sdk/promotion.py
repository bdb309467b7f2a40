"""What the scheduler decides, done to a model and its store: text to keys and values or weights, and back.

    text_to_kv        a `promotion` cube names the texts of the stable prefix; `PersonaModel.warm` computes it
    text_to_weights   distil -> gate -> adapter ``<persona>/memory`` with its sources -> attach
    demote_kv         keys and values are retired, texts are taken out of the `promotion` cube
    demote_weights    the adapter and its attachments are retired
    archive, expire   handed to ``move``, if one is given

Texts stay what and where they are: derived cubes name them as sources, so forgetting a text erases what it
became, and a demotion drops tensors and never decodes them. An adapter that fails its gate is not stored; a
`rejection` cube keeps the report, so that the same texts are not tried again. Every commit carries the
decision's reason, which holds no text of a memory.

`Promoter.plan` writes nothing. In the background one thread of low priority takes the same steps; training
has a module tree of its own over the shared weights (`persona_sdk.adapters.twin`), so nobody waits for it.
"""

import logging
import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from persona_sdk.adapters.distillation import DistillationConfig, distil
from persona_sdk.adapters.distillation_data import probes_of
from persona_sdk.adapters.gate import Gate, GateReport, guesses
from persona_sdk.adapters.twin import twin
from persona_sdk.errors import NotFoundError, PersonaError
from persona_sdk.library import commit_edit
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, Origin, Source
from persona_sdk.memory.cube import PersonaKind, utc_now
from persona_sdk.memory.facts import PREFIX, PROMOTION, REJECTION, facts_of
from persona_sdk.memory.scheduler import Decision, SchedulerOptions, decide
from persona_sdk.persona import Persona
from persona_sdk.prompting import note

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

TITLE = "memory"  # of the adapter that holds a persona's texts
DISTILLATION = Origin(kind="derived", reference="distillation")

# (owner, cube ids, "archive" or "expire", reason): changes the state of life of cubes
Move: TypeAlias = Callable[[str, Sequence[str], str, str], None]

_KEPT = 1000  # outcomes and errors of background work

_log = logging.getLogger("persona_sdk.promotion")


@dataclass(frozen=True)
class Outcome:
    """What became of a decision; ``note`` says why it was not done."""

    decision: Decision
    status: Literal["done", "rejected", "failed", "skipped"]
    note: str = ""
    report: GateReport | None = None


class _StoppedError(Exception):
    """Background work was told to end."""


class Promoter:
    """Carries out the scheduler's decisions for the personas of one model.

    Args:
        model: the model and its store.
        options: budgets and prices; None takes sizes from the base model and the defaults for the rest.
        distillation: how weights are made of texts.
        gate: what they must reach.
        system: the system message the application puts in front, if any.
        move: changes the state of life of cubes; without it, nothing is archived or expired here.
    """

    def __init__(
        self,
        model: "PersonaModel",
        options: SchedulerOptions | None = None,
        *,
        distillation: DistillationConfig | None = None,
        gate: Gate | None = None,
        system: str = "",
        move: Move | None = None,
    ) -> None:
        self._model = model
        self._store = model.store
        self.distillation = distillation or DistillationConfig()
        self.options = options or SchedulerOptions(**_sizes(model, self.distillation))
        self.gate = gate or Gate()
        self._system = system
        self._move = move

    def plan(self, persona_id: str, *, now: datetime | None = None) -> tuple[Decision, ...]:
        """What would be done, and why; see `persona_sdk.memory.scheduler.explain`. Writes nothing."""
        facts = facts_of(self._store, persona_id, count=self._tokens)
        return decide(facts, self.options, now or utc_now())

    def run(self, persona_id: str, *, check: Callable[[], None] = lambda: None) -> tuple[Outcome, ...]:
        """Do what the plan says. A decision that fails changes nothing, and the others are done all the same.

        Args:
            persona_id: whose memory.
            check: called between small steps of work; what it raises ends it.
        """
        outcomes = []
        for decision in self.plan(persona_id):
            if decision.kind == "keep":
                continue
            check()
            try:
                outcome = self._execute(persona_id, decision, check)
            except PersonaError as error:
                _log.warning("%s of %r failed: %s", decision.kind, persona_id, error)
                outcome = Outcome(decision, "failed", str(error))
            outcomes.append(outcome)
        changed = {o.decision.kind for o in outcomes if o.status == "done"}
        if changed & {"text_to_weights", "demote_weights"} and "text_to_kv" not in changed:
            self._renew_prefix(persona_id)
        return tuple(outcomes)

    def run_in_background(
        self, persona_ids: Sequence[str] | None = None, *, interval: float = 60.0
    ) -> "Background":
        """Do the same again and again in one thread of low priority, until told to stop.

        Args:
            persona_ids: whose memory; None takes everybody in the store at the time.
            interval: seconds between two rounds.
        """
        return Background(self, persona_ids, interval)

    def _execute(self, owner: str, decision: Decision, check: Callable[[], None]) -> Outcome:
        if decision.kind == "text_to_weights":
            return self._to_weights(owner, decision, check)
        if decision.kind == "text_to_kv":
            return self._to_kv(owner, decision)
        if decision.kind == "demote_kv":
            self._leave_prefix(owner, decision)
        elif decision.kind == "demote_weights":
            self._drop_adapters(owner, decision)
        elif self._move is not None:
            self._move(owner, decision.cubes, decision.kind, decision.reason)
        else:
            return Outcome(decision, "skipped", "Nothing here changes states of life.")
        return Outcome(decision, "done")

    # Keys and values ----------------------------------------------------------------------------------

    def _to_kv(self, owner: str, decision: Decision) -> Outcome:
        before = self._live(owner, "activation", PROMOTION)
        texts = self._texts(owner, decision.cubes)
        self._promote(owner, texts, f"promote to KV: {decision.reason}")
        try:
            cube = self._warm(owner)
        except PersonaError as error:  # such as a prefix that leaves no room in the context
            sources = {s.cube_id for made in before for s in made.header.sources}
            self._promote(owner, self._texts(owner, sorted(sources)), "promotion to KV taken back")
            _log.warning("the prefix of %r could not be computed: %s", owner, error)
            return Outcome(decision, "failed", str(error))
        return Outcome(decision, "done", "" if cube else "Too few tokens to keep.")

    def _leave_prefix(self, owner: str, decision: Decision) -> None:
        leaving = set(decision.cubes)
        named = {
            s.cube_id for made in self._live(owner, "activation", PROMOTION) for s in made.header.sources
        }
        if named & leaving:
            self._promote(owner, self._texts(owner, sorted(named - leaving)), f"demote KV: {decision.reason}")
        self._retire(owner, leaving, "activation", f"demote KV: {decision.reason}")

    def _promote(self, owner: str, texts: Sequence[MemCube], message: str) -> None:
        """Make these the texts of the stable prefix."""
        sources = tuple(Source.of(cube) for cube in texts)
        header = CubeHeader(
            title="promoted texts",
            semantic_type=PROMOTION,
            trust="system",
            origin=Origin(kind="derived", reference="scheduler"),
            sources=sources,
            attributes={"texts": len(texts)},
        )
        add = [CubeDraft(kind="activation", header=header)] if texts else []

        def changes() -> dict[str, Any]:
            return {"retire": [cube.id for cube in self._live(owner, "activation", PROMOTION)]}

        commit_edit(self._store, owner, changes, kind=self._kind(owner), add=add, message=message)

    def _renew_prefix(self, owner: str) -> None:
        """Compute a kept prefix again under the adapters of now."""
        if self._live(owner, "activation", PREFIX):
            with suppress(PersonaError):
                self._warm(owner)

    def _warm(self, owner: str) -> MemCube | None:
        return self._model.warm(self._persona(owner), system=self._system)

    # Weights ------------------------------------------------------------------------------------------

    def _to_weights(self, owner: str, decision: Decision, check: Callable[[], None]) -> Outcome:
        cubes = self._texts(owner, decision.cubes)
        texts = [cube.text or "" for cube in cubes]
        adapter = distil(self._model.base, texts, self.distillation, progress=False, check=check)
        probes = probes_of(texts, rivals=guesses(twin(self._model.base), check=check))
        report = self.gate.test(self._model.base, adapter.tensors, probes, check=check)
        if not report.accepted:
            self._reject(owner, cubes, report)
            return Outcome(decision, "rejected", " ".join(report.reasons), report)
        if {cube.id for cube in self._texts(owner, decision.cubes)} != {cube.id for cube in cubes}:
            return Outcome(decision, "failed", "Some of the texts left while they were learned.", report)
        name = f"{owner}/{TITLE}"
        made = self._model.adapters.add(
            name,
            adapter,
            sources=cubes,
            kind=self._kind(owner),
            report=report.model_dump(mode="json"),
            origin=DISTILLATION,
            message=f"promote to weights: {decision.reason}",
        )
        try:
            self._persona(owner).attach(name)
        except PersonaError:
            self._retire(owner, {made.id}, "parametric", "promotion to weights taken back")
            raise
        self._retire(
            owner, self._ids(owner, "parametric", REJECTION), "parametric", "weights learned the texts"
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
            return {"retire": sorted(self._ids(owner, "parametric", REJECTION))}

        draft = CubeDraft(kind="parametric", header=header)
        message = f"weights refused: {' '.join(report.reasons)}"
        commit_edit(self._store, owner, changes, kind=self._kind(owner), add=[draft], message=message)

    def _drop_adapters(self, owner: str, decision: Decision) -> None:
        gone = set(decision.cubes)
        attached = {a.cube_id for a in self._model.adapters.attachments(owner) if a.adapter.cube_id in gone}
        self._retire(owner, gone | attached, "parametric", f"demote weights: {decision.reason}")

    # The store ----------------------------------------------------------------------------------------

    def _retire(self, owner: str, cube_ids: set[str], kind: str, message: str) -> None:
        """Retire those of the cubes that are live and of this kind."""

        def changes() -> dict[str, Any]:
            live = self._store.cubes(owner, kind=kind)
            return {"retire": [cube.id for cube in live if cube.id in cube_ids]}

        if changes()["retire"]:
            commit_edit(self._store, owner, changes, kind=self._kind(owner), message=message)

    def _live(self, owner: str, kind: str, semantic_type: str) -> list[MemCube]:
        cubes = self._store.cubes(owner, kind=kind)
        return [c for c in cubes if c.header.semantic_type == semantic_type and c.header.trust == "system"]

    def _ids(self, owner: str, kind: str, semantic_type: str) -> set[str]:
        return {cube.id for cube in self._live(owner, kind, semantic_type)}

    def _texts(self, owner: str, cube_ids: Sequence[str]) -> list[MemCube]:
        """Those of the texts that are live, oldest first."""
        wanted = set(cube_ids)
        return [cube for cube in self._store.cubes(owner, kind="plaintext") if cube.id in wanted]

    def _tokens(self, text: str) -> int:
        return len(self._model.base.tokenizer(f"{note(text)}\n", add_special_tokens=False)["input_ids"])

    def _kind(self, owner: str) -> PersonaKind:
        kind = self._store.kind_of(owner)
        if kind is None:
            raise NotFoundError(f"There is no persona {owner!r}.", hint="It may have been forgotten.")
        return kind

    def _persona(self, owner: str) -> Persona:
        return Persona(self._model, owner, kind=self._kind(owner))


class Background:
    """One thread that promotes and demotes. Made by `Promoter.run_in_background`; a context manager.

    ``errors`` and ``outcomes`` are what happened last, oldest first.
    """

    def __init__(self, promoter: Promoter, persona_ids: Sequence[str] | None, interval: float) -> None:
        self.errors: list[Exception] = []
        self.outcomes: list[Outcome] = []
        self._promoter, self._ids, self._interval = promoter, persona_ids, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="persona-promotion", daemon=True)
        self._thread.start()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        """Whether the thread is alive."""
        return self._thread.is_alive()

    def stop(self, timeout: float | None = None) -> None:
        """End the work at its next small step and wait for that; nothing half-done is left in the store."""
        self._stop.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _check(self) -> None:
        if self._stop.is_set():
            raise _StoppedError

    def _work(self) -> None:
        _lower_priority()
        store = self._promoter._store
        with suppress(_StoppedError):
            while not self._stop.is_set():
                try:
                    ids = self._ids if self._ids is not None else [one.id for one in store.personas()]
                    for persona_id in ids:
                        self._one(persona_id)
                except PersonaError as error:  # the store is closed, for one
                    self._failed("reading the store", error)
                self._stop.wait(self._interval)

    def _one(self, persona_id: str) -> None:
        try:
            self.outcomes += self._promoter.run(persona_id, check=self._check)
            del self.outcomes[:-_KEPT]
        except _StoppedError:
            raise
        except Exception as error:  # whatever it was, the next persona is not to suffer from it
            self._failed(f"promoting for {persona_id!r}", error)

    def _failed(self, what: str, error: Exception) -> None:
        _log.error("%s failed: %s", what, error, exc_info=error)
        self.errors.append(error)
        del self.errors[:-_KEPT]


def _lower_priority() -> None:
    """Give this thread the lowest priority, where threads have one of their own."""
    with suppress(AttributeError, OSError):
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


def _sizes(model: "PersonaModel", distillation: DistillationConfig) -> dict[str, Any]:
    """Bytes of a token's keys and values, and of an adapter, of this base model."""
    base = model.base
    config = base.module.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    itemsize = next(base.module.parameters()).element_size()
    rows = sum(d_in + d_out for d_in, d_out in base.linear_shapes().values())
    return {
        "kv_bytes": 2 * config.num_hidden_layers * heads * width * itemsize,
        "lora_bytes": 4 * distillation.rank * rows,
        "prefix_tokens": base.context_length // 2,
    }
