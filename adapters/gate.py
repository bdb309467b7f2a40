"""Whether an adapter may be used: it must know what it was made to know, and not have forgotten the rest.

    recall      share of held-out questions whose right end is likelier than the wrong ones
    ability     mean over unrelated questions of  (1/n) Σ_t log p(a_t | question, a_<t)     nats a token
    choice      as recall, over unrelated questions

    accepted  iff  recall_after - recall_before >= min_recall_gain
              and  ability_before - ability_after <= max_ability_loss
              and  choice_before - choice_after <= max_choice_loss

An end is scored by its mean log-likelihood a token after the same question and beginning. ``before`` is the
base model without the memory in its context.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from persona_sdk.adapters.probes import Probe, Rivals
from persona_sdk.adapters.twin import applied, twin
from persona_sdk.config import FrozenConfig
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import Message, control_tokens, encode, text_ids, with_passages
from persona_sdk.tensors import TensorBundle

_KNOWN = (
    ("What is the capital of France?", "The capital of France is", ("Paris", "London", "Madrid", "Rome"), 0),
    (
        "How many legs does a spider have?",
        "A spider has",
        ("four legs", "six legs", "eight legs", "ten legs"),
        2,
    ),
    ("What colour is grass?", "Grass is", ("blue", "green", "red", "black"), 1),
    ("Which planet do we live on?", "We live on", ("Mars", "Venus", "Jupiter", "Earth"), 3),
    ("What do cows give?", "Cows give", ("milk", "wool", "eggs", "honey"), 0),
    ("What is 2 plus 2?", "2 plus 2 is", ("3", "5", "4", "22"), 2),
    ("What is the opposite of hot?", "The opposite of hot is", ("warm", "cold", "dry", "late"), 1),
    ("What falls from clouds?", "From clouds falls", ("sand", "oil", "smoke", "rain"), 3),
    ("What do we use to see?", "We see with our", ("eyes", "ears", "hands", "feet"), 0),
    ("Which month comes after March?", "After March comes", ("June", "May", "April", "July"), 2),
    ("What do fish live in?", "Fish live in", ("trees", "water", "fire", "caves"), 1),
    ("What is the sun?", "The sun is a", ("planet", "moon", "rock", "star"), 3),
)
_GUESSES = 6  # of which the distinct ones are taken
ABILITY = tuple(Probe(*known) for known in _KNOWN)


class Scores(FrozenConfig):
    """How a model did."""

    recall: float
    ability: float
    choice: float


class GateReport(FrozenConfig):
    """What an adapter gained and lost, and whether that is good enough; ``reasons`` says why not."""

    accepted: bool
    reasons: tuple[str, ...]
    before: Scores
    after: Scores
    questions: int


class Gate(FrozenConfig):
    """What an adapter must reach."""

    min_recall_gain: float = Field(0.25, ge=-1, le=1)
    max_ability_loss: float = Field(0.25, description="nats a token")
    max_choice_loss: float = Field(0.1, ge=-1, le=1)

    def judge(self, before: Scores, after: Scores, questions: int) -> GateReport:
        """Compare two scores."""
        reasons = []
        if after.recall - before.recall < self.min_recall_gain:
            reasons.append(
                f"Recall rose from {before.recall:.2f} to {after.recall:.2f}; "
                f"{self.min_recall_gain:.2f} more were expected."
            )
        if before.ability - after.ability > self.max_ability_loss:
            reasons.append(
                f"Unrelated answers lost {before.ability - after.ability:.2f} nats a token; "
                f"{self.max_ability_loss:.2f} may be lost."
            )
        if before.choice - after.choice > self.max_choice_loss:
            reasons.append(
                f"Unrelated questions answered right fell from {before.choice:.2f} to {after.choice:.2f}."
            )
        return GateReport(
            accepted=not reasons, reasons=tuple(reasons), before=before, after=after, questions=questions
        )

    def test(
        self,
        model: LanguageModel,
        bundle: TensorBundle,
        probes: Sequence[Probe],
        *,
        check: Callable[[], None] = lambda: None,
    ) -> GateReport:
        """Examine a low-rank update beside a base model, which may be in use meanwhile.

        Raises:
            InvalidInputError: there is nothing to ask.
        """
        if not probes:
            raise InvalidInputError("There is no question to examine with.", hint="Give at least one probe.")
        own = twin(model)
        before, after = (score(own, probes, given, check=check) for given in (None, bundle))
        return self.judge(before, after, len(probes))


@dataclass(frozen=True)
class _Answered:
    """One probe's ends: mean log-likelihood of each."""

    right: int
    means: Float[Tensor, " options"]

    @property
    def correct(self) -> bool:
        return int(self.means.argmax()) == self.right


def score(
    model: LanguageModel,
    probes: Sequence[Probe],
    bundle: TensorBundle | None = None,
    *,
    known: Sequence[str] = (),
    check: Callable[[], None] = lambda: None,
) -> Scores:
    """How a base model does with a low-rank update, or with texts in its context, or with neither.

    Args:
        model: a twin, since hooks are put on it.
        probes: questions about memories.
        bundle: the update.
        known: texts that stand in the system message.
        check: called before every question; what it raises ends the examination.
    """
    with applied(model, bundle) as module, torch.inference_mode():

        def answered(probe: Probe) -> _Answered:
            check()
            return _Answered(probe.right, ends(module, model.tokenizer, probe, known))

        about, general = [answered(p) for p in probes], [answered(p) for p in ABILITY]
    return Scores(
        recall=_share(about),
        ability=sum(float(one.means[one.right]) for one in general) / len(general),
        choice=_share(general),
    )


def ends(module: Any, tokenizer: Any, probe: Probe, known: Sequence[str] = ()) -> Float[Tensor, " options"]:
    """Mean log-likelihood a token of every end of a probe."""
    prompt = encode(tokenizer, with_passages([Message(role="user", content=probe.question)], known))
    control = control_tokens(tokenizer)

    rows = [text_ids(tokenizer, f"{probe.lead} {option}".strip(), control) for option in probe.options]
    lead = text_ids(tokenizer, probe.lead, control) if probe.lead else []
    starts = [_common(lead, row[:-1]) for row in rows]
    width = max(map(len, rows))
    device = next(module.parameters()).device
    batch = torch.tensor([[*prompt, *row, *[0] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * (len(prompt) + len(row)) + [0] * (width - len(row)) for row in rows])
    logits = module(input_ids=batch, attention_mask=mask.to(device), use_cache=False).logits.float()
    logp = logits[:, len(prompt) - 1 : -1].log_softmax(-1)
    means = []
    for index, (row, start) in enumerate(zip(rows, starts, strict=True)):
        places = torch.arange(start, len(row), device=device)
        means.append(logp[index, places, torch.tensor(row[start:], device=device)].mean())
    return torch.stack(means).cpu()


def guesses(model: LanguageModel, *, check: Callable[[], None] = lambda: None) -> Rivals:
    """Wrong values that are hard to tell: what the base itself would say, the likeliest first."""
    control = control_tokens(model.tokenizer)

    @torch.inference_mode()
    def of(question: str, lead: str, words: int) -> list[str]:
        check()
        prompt = encode(model.tokenizer, [Message(role="user", content=question)])
        begun = text_ids(model.tokenizer, lead, control) if lead else []
        ids = torch.tensor([[*prompt, *begun]], device=model.device)
        first = model.module(input_ids=ids, use_cache=False).logits[0, -1].topk(_GUESSES).indices[:, None]
        rows = torch.cat([ids.expand(_GUESSES, -1), first], dim=1)
        for _ in range(2 * words):
            last = model.module(input_ids=rows, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            rows = torch.cat([rows, last], dim=1)
        said = [model.tokenizer.decode(row, skip_special_tokens=True) for row in rows[:, ids.shape[1] :]]
        cut = [re.split(r"[.,;:!?\n]", text.strip())[0].split()[:words] for text in said]
        return [" ".join(one) for one in cut if one]

    return of


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning."""
    shorter = min(len(one), len(other))
    return next((i for i in range(shorter) if one[i] != other[i]), shorter)


def _share(answered: Sequence[_Answered]) -> float:
    return sum(one.correct for one in answered) / len(answered)
