"""Training on rewards: replies are sampled under λ, and the better ones of a prompt become likelier.

    R_j  = Σ_i λ_i r_i(x, y_j) - κ (log π_λ(y_j|x) - log ref(y_j|x))       y_j ~ π_λ(. | x),  j = 1..n
    loss = -(1/n) Σ_j (R_j - mean of the others) log π_λ(y_j|x)            `objectives.leave_one_out`

The linear aggregation of the objectives is this one scalar reward with one divergence. The λ of an update is
the one its replies were sampled under. Replies are sampled from the model as it is (temperature 1, no
cut-off), else the gradient would belong to another policy.

Reference: Ahmadian et al. 2024, RLOO, arXiv 2402.14740.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_sdk.adapters.objectives import leave_one_out, log_likelihood, penalised
from persona_sdk.adapters.panacea_config import PanaceaConfig
from persona_sdk.adapters.preference_data import Reward
from persona_sdk.adapters.preference_student import Student
from persona_sdk.adapters.random_state import same_random_state
from persona_sdk.adapters.svd_layers import Layers
from persona_sdk.adapters.training_data import IGNORED, Row, collate, pad_token
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.prompting import encode, parse_messages

_FORM = "Expected a list of prompts, with rewards={dimension: function of prompt and reply}."


@dataclass(frozen=True)
class Prompt:
    """A prompt as text, for the rewards, and as token ids."""

    text: str
    ids: tuple[int, ...]

    def as_row(self) -> dict[str, Any]:
        """The prompt as a row of training data; the Trainer groups by the length of ``input_ids``."""
        return {"input_ids": list(self.ids), "text": self.text}


def encode_prompts(model: LanguageModel, data: Any, longest: int) -> list[Prompt]:
    """Prompts with room for a reply.

    Raises:
        InvalidInputError: no list of texts, or one that is blank or too long.
    """
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise InvalidInputError(f"The data is a {type(data).__name__}.", hint=_FORM)
    found = []
    for index, text in enumerate(data):
        if not isinstance(text, str) or not text.strip():
            raise InvalidInputError(f"Prompt {index} is {text!r:.80}.", hint=_FORM)
        ids = tuple(encode(model.tokenizer, parse_messages(text)))
        if len(ids) > longest:
            raise InvalidInputError(
                f"Prompt {index} has {len(ids)} tokens; {longest} leave room for a reply.",
                hint="Shorten it, or raise max_length.",
            )
        found.append(Prompt(text, ids))
    if not found:
        raise InvalidInputError("There is no prompt.", hint=_FORM)
    return found


def check_rewards(rewards: Mapping[str, Reward] | None, dimensions: Sequence[str]) -> dict[str, Reward]:
    """The rewards in the order of the dimensions; raises `InvalidInputError` unless there is one for each."""
    if not isinstance(rewards, Mapping) or set(rewards) != set(dimensions):
        given = "none" if not rewards else ", ".join(map(str, rewards))
        raise InvalidInputError(
            f"The dimensions are {', '.join(dimensions)} and there are rewards for {given}.", hint=_FORM
        )
    useless = [name for name in dimensions if not callable(rewards[name])]
    if useless:
        raise InvalidInputError(
            f"The reward {useless[0]!r} is a {type(rewards[useless[0]]).__name__}.", hint=_FORM
        )
    return {name: rewards[name] for name in dimensions}


class RewardStudent(Student):
    """Samples, scores and learns; see the module."""

    def __init__(
        self, model: LanguageModel, layers: Layers, options: PanaceaConfig, rewards: Mapping[str, Reward]
    ) -> None:
        super().__init__(model.module, layers, options)
        self._model, self._rewards = model, rewards

    def forward(self, prompts: list[Prompt], **_: Tensor) -> dict[str, Tensor]:
        """Loss of one batch of prompts. Their tensors are for the Trainer, which counts tokens."""
        options, n = self.options, self.options.samples_per_prompt
        drawn, draw = self.draw(len(prompts))
        preference = drawn.repeat_interleave(n, dim=0)
        asked = [prompt for prompt in prompts for _ in range(n)]
        at = (preference[0] if options.preference_sampling == "batch" else preference).to(self._model.device)
        with self.layers.preference.at(at), same_random_state():
            torch.manual_seed(int(draw.integers(2**62)))  # of this step and process alone
            rows = sample_replies(self._model, asked, options.max_new_tokens)
        gained = score(self._model, asked, rows, self._rewards)
        rewards = (preference * gained).sum(1)
        batch = collate(rows, pad_token(self._model.tokenizer))
        parts = [batch[name].to(self._model.device) for name in ("input_ids", "attention_mask", "labels")]
        self.count(2 * int(batch["attention_mask"].sum()))
        with torch.no_grad(), self.layers.preference.at(None):
            reference = log_likelihood(self.module, *parts)
        with self.layers.preference.at(at):
            policy = log_likelihood(self.module, *parts)
        shaped = penalised(rewards.to(policy), policy, reference, options.kl)
        weight = leave_one_out(shaped.reshape(-1, n)).flatten()
        return {"loss": -(weight * policy).mean() + self.penalty()}


def collate_prompts(batch: Sequence[dict[str, Any]], pad_id: int) -> dict[str, Any]:
    """The prompts of a batch, padded on the left, as a reply follows."""
    prompts = [Prompt(row["text"], tuple(row["input_ids"])) for row in batch]
    ids, mask = _padded(prompts, pad_id)
    return {"prompts": prompts, "input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def sampled_rewards(
    model: LanguageModel,
    layers: Layers,
    prompts: Sequence[Prompt],
    rewards: Mapping[str, Reward],
    preference: Float[Tensor, " m"] | None,
    options: PanaceaConfig,
) -> list[Tensor]:
    """What each reward gives one sampled reply to every prompt under λ; None is the base model."""
    found = []
    with layers.preference.at(None if preference is None else preference.to(model.device)):
        for first in range(0, len(prompts), options.per_device_eval_batch_size):
            asked = prompts[first : first + options.per_device_eval_batch_size]
            replies = sample_replies(model, asked, options.max_new_tokens)
            found.append(score(model, asked, replies, rewards))
    return list(torch.cat(found).unbind(1))


def sample_replies(model: LanguageModel, prompts: Sequence[Prompt], tokens: int) -> list[Row]:
    """A reply to each prompt, as rows whose labels are its tokens, the end token included."""
    from transformers import GenerationConfig

    pad, end = pad_token(model.tokenizer), model.tokenizer.eos_token_id
    ids, mask = (part.to(model.device) for part in _padded(prompts, pad))
    how = GenerationConfig(
        do_sample=True,
        top_k=0,
        top_p=1.0,
        max_new_tokens=tokens,
        pad_token_id=pad,
        eos_token_id=end,
        use_cache=True,
    )
    module: Any = model.module
    before = getattr(module, "generation_config", None)
    module.generation_config = GenerationConfig()  # the model's own would fill in what `how` leaves open
    try:
        with torch.no_grad():
            made = module.generate(input_ids=ids, attention_mask=mask, generation_config=how)
    finally:
        module.generation_config = before
    rows = []
    for prompt, reply in zip(prompts, made[:, ids.shape[1] :].tolist(), strict=True):
        stop = reply.index(end) + 1 if end in reply else len(reply)
        labels = [IGNORED] * len(prompt.ids) + reply[:stop]
        rows.append({"input_ids": [*prompt.ids, *reply[:stop]], "labels": labels})
    return rows


def score(
    model: LanguageModel, prompts: Sequence[Prompt], rows: Sequence[Row], rewards: Mapping[str, Reward]
) -> Float[Tensor, "rows m"]:
    """What every reward gives every reply.

    Raises:
        InvalidInputError: a reward that is no finite number.
    """
    found = []
    for prompt, row in zip(prompts, rows, strict=True):
        ids = [label for label in row["labels"] if label != IGNORED]
        reply = str(model.tokenizer.decode(ids, skip_special_tokens=True))
        values = {name: reward(prompt.text, reply) for name, reward in rewards.items()}
        for name, value in values.items():
            if not isinstance(value, int | float) or not math.isfinite(value):
                raise InvalidInputError(
                    f"The reward {name!r} of {reply!r:.60} is {value!r:.40}.",
                    hint="Expected a finite number.",
                )
        found.append([float(value) for value in values.values()])
    return torch.tensor(found)


def _padded(prompts: Sequence[Prompt], pad: int) -> tuple[Int[Tensor, "n t"], Int[Tensor, "n t"]]:
    """Token ids padded on the left, and their mask."""
    longest = max(len(prompt.ids) for prompt in prompts)
    ids = [[pad] * (longest - len(prompt.ids)) + list(prompt.ids) for prompt in prompts]
    mask = [[0] * (longest - len(prompt.ids)) + [1] * len(prompt.ids) for prompt in prompts]
    return torch.tensor(ids), torch.tensor(mask)
