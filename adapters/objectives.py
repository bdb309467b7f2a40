"""What one preference dimension wants, as a number to maximise, of likelihoods of whole replies.

    log π(y|x) = Σ_t log π(y_t | x, y_<t)                                     over the tokens of the reply

    SFT      J = log π(y|x)
    DPO      J = log sigmoid(β [(log π(y_w) - log ref(y_w)) - (log π(y_l) - log ref(y_l))])
    reward   J = E_{y ~ π}[r(x, y)] - κ KL(π ‖ ref)
             ∇J = E[(R_j - mean of the other R) ∇ log π(y_j)]
             R_j = Σ_i λ_i r_i - κ (log π(y_j) - log ref(y_j))

| symbol | argument               | shape                                         |
|--------|------------------------|-----------------------------------------------|
| π, ref | log-likelihoods        | [n]; ref is the base model, adapters off      |
| β      | ``beta``               | number                                        |
| κ      | ``kl``                 | number                                        |
| R      | ``rewards``            | [prompts, samples]                            |

Sums over tokens, not means: a mean would weigh dimensions with short replies more than λ says. With sums
the optimum of SFT under λ is the mixture Σ_i λ_i p_i, that of DPO has the margin logit(λ_1) on a pair on
which two dimensions disagree, and that of rewards is ref · exp(Σ_i λ_i r_i / κ).

References: Rafailov et al. 2023, DPO, arXiv 2305.18290; Ahmadian et al. 2024, RLOO, arXiv 2402.14740.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from persona_sdk.adapters.training_data import IGNORED, Row, collate, pad_token
from persona_sdk.models import LanguageModel


def log_likelihood(
    module: Any,
    input_ids: Int[Tensor, "n t"],
    attention_mask: Int[Tensor, "n t"],
    labels: Int[Tensor, "n t"],
) -> Float[Tensor, " n"]:
    """Log-likelihood of the labelled tokens of each row, float32. Logits are made only where needed."""
    targets = labels[:, 1:]
    needed = (targets != IGNORED).any(0).nonzero()[:, 0]
    keep = (
        {"logits_to_keep": needed} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    )
    logits = module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **keep).logits
    if not keep:
        logits = logits[:, needed]
    targets = targets[:, needed]
    counted = targets != IGNORED
    nats = -F.cross_entropy(logits[counted].float(), targets[counted], reduction="none")
    per_token = nats.new_zeros(targets.shape).masked_scatter(counted, nats)
    return per_token.sum(-1)


@torch.no_grad()
def log_likelihoods(
    model: LanguageModel,
    rows: Sequence[Row],
    batch: int,
    *,
    advance: Callable[[], None] = lambda: None,
) -> Float[Tensor, " rows"]:
    """`log_likelihood` of every row, on the CPU, with rows of like length together.

    Args:
        model: its module is run as it is, with whatever adapter is in it.
        rows: encoded rows.
        batch: rows at once.
        advance: called after every batch.
    """
    order = sorted(range(len(rows)), key=lambda place: len(rows[place]["input_ids"]))
    found = torch.empty(len(rows))
    for first in range(0, len(order), batch):
        places = order[first : first + batch]
        encoded = collate([rows[place] for place in places], pad_token(model.tokenizer))
        parts = (encoded[name].to(model.device) for name in ("input_ids", "attention_mask", "labels"))
        found[places] = log_likelihood(model.module, *parts).float().cpu()
        advance()
    return found


def direct_preference(
    chosen: Float[Tensor, "*n"],
    rejected: Float[Tensor, "*n"],
    reference_chosen: Float[Tensor, "*n"],
    reference_rejected: Float[Tensor, "*n"],
    beta: float,
) -> Float[Tensor, "*n"]:
    """DPO's J of each pair; at most 0, and -log 2 for the base model itself."""
    return F.logsigmoid(beta * ((chosen - reference_chosen) - (rejected - reference_rejected)))


def penalised(
    rewards: Float[Tensor, "*n"], policy: Float[Tensor, "*n"], reference: Float[Tensor, "*n"], kl: float
) -> Float[Tensor, "*n"]:
    """R: the reward less the sampled divergence from the base. A constant for the gradient."""
    return rewards - kl * (policy.detach() - reference)


def leave_one_out(rewards: Float[Tensor, "prompts samples"]) -> Float[Tensor, "prompts samples"]:
    """Each reward less the mean of the others of its prompt: an unbiased, centred weight of its gradient."""
    samples = rewards.shape[1]
    others = (rewards.sum(1, keepdim=True) - rewards) / (samples - 1)
    return rewards - others
