"""What the scheduler decides, done to a model and its store: text to keys and values or weights, and back.

    text_to_kv        a `promotion` cube names the texts of the stable prefix; `PersonaModel.warm` computes it
    text_to_weights   a gated adapter; see `persona_sdk.promotion_weights`
    demote_kv         keys and values are retired, texts are taken out of the `promotion` cube
    demote_weights    the adapter and its attachments are retired
    archive, expire   handed to ``move``, if one is given

Texts stay what and where they are: derived cubes name them as sources, so forgetting a text erases what it
became, and a demotion drops tensors and never decodes them. Every commit carries the decision's reason, which
holds no text of a memory.

`Promoter.plan` writes nothing. In the background one thread of low priority takes the same steps; training
has a module tree of its own over the shared weights (`persona_sdk.adapters.twin`), so nobody waits for it.
"""

import logging
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeAlias

from persona_sdk.adapters.distillation import DistillationConfig
from persona_sdk.adapters.gate import Gate
from persona_sdk.compose import promoted_ids
from persona_sdk.errors import PersonaError
from persona_sdk.memory import CubeDraft, CubeHeader, MemCube, Origin, Source
from persona_sdk.memory.cube import utc_now
from persona_sdk.memory.facts import PREFIX, PROMOTION, facts_of
from persona_sdk.memory.scheduler import Decision, SchedulerOptions, decide
from persona_sdk.promotion_background import Background
from persona_sdk.promotion_cubes import PromotionCubes
from persona_sdk.promotion_outcome import Outcome
from persona_sdk.promotion_weights import TextsToWeights
from persona_sdk.prompting import note

if TYPE_CHECKING:
    from persona_sdk.model import PersonaModel

# (owner, cube ids, "archive" or "expire", reason): changes the state of life of cubes
Move: TypeAlias = Callable[[str, Sequence[str], str, str], None]

_log = logging.getLogger("persona_sdk.promotion")


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
        self._cubes = PromotionCubes(model)
        self._weights = TextsToWeights(model, self.distillation, self.gate)
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
        try:
            self._weights.heal(persona_id)
        except PersonaError as error:
            _log.warning("an adapter of %r could not be attached: %s", persona_id, error)
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
    ) -> Background:
        """Do the same again and again in one thread of low priority, until told to stop.

        Args:
            persona_ids: whose memory; None takes everybody in the store at the time.
            interval: seconds between two rounds.
        """
        ids = self._cubes.owners if persona_ids is None else lambda: persona_ids
        return Background(self.run, ids, interval)

    def _execute(self, owner: str, decision: Decision, check: Callable[[], None]) -> Outcome:
        if decision.kind == "text_to_weights":
            return self._weights.learn(owner, decision, check)
        if decision.kind == "text_to_kv":
            return self._to_kv(owner, decision)
        if decision.kind == "demote_kv":
            self._leave_prefix(owner, decision)
        elif decision.kind == "demote_weights":
            self._weights.drop(owner, decision)
        elif self._move is not None:
            self._move(owner, decision.cubes, decision.kind, decision.reason)
        else:
            return Outcome(decision, "skipped", "Nothing here changes states of life.")
        return Outcome(decision, "done")

    # Keys and values ----------------------------------------------------------------------------------

    def _to_kv(self, owner: str, decision: Decision) -> Outcome:
        before = self._promoted(owner)
        texts = self._cubes.texts(owner, decision.cubes)
        self._promote(owner, texts, f"promote to KV: {decision.reason}")
        try:
            cube = self._warm(owner)
        except PersonaError as error:  # such as a prefix that leaves no room in the context
            texts = self._cubes.texts(owner, sorted(before))
            self._promote(owner, texts, "promotion to KV taken back")
            _log.warning("the prefix of %r could not be computed: %s", owner, error)
            return Outcome(decision, "failed", str(error))
        return Outcome(decision, "done", "" if cube else "Too few tokens to keep.")

    def _leave_prefix(self, owner: str, decision: Decision) -> None:
        leaving, message = set(decision.cubes), f"demote KV: {decision.reason}"
        named = self._promoted(owner)
        if named & leaving:
            self._promote(owner, self._cubes.texts(owner, sorted(named - leaving)), message)
        self._cubes.retire(owner, leaving, "activation", message)

    def _promoted(self, owner: str) -> set[str]:
        return promoted_ids(self._cubes.live(owner, "activation", PROMOTION))

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
            return {"retire": [cube.id for cube in self._cubes.live(owner, "activation", PROMOTION)]}

        self._cubes.edit(owner, message, changes, add=add)

    def _renew_prefix(self, owner: str) -> None:
        """Compute a kept prefix again under the adapters of now."""
        if self._cubes.live(owner, "activation", PREFIX):
            with suppress(PersonaError):
                self._warm(owner)

    def _warm(self, owner: str) -> MemCube | None:
        return self._model.warm(self._cubes.persona(owner), system=self._system)

    def _tokens(self, text: str) -> int:
        return len(self._model.base.tokenizer(f"{note(text)}\n", add_special_tokens=False)["input_ids"])


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
