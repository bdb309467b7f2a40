"""Per-row choice of the next token. Order and meaning of the steps are those of transformers:
logit bias, repetition penalty, then for sampled rows temperature, top-k, top-p.

A sampled row draws from a stream of uniforms that depends on its seed alone, by inversion of its own
distribution. So a row's tokens depend on neither its neighbours nor its place in the batch.
"""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from persona_sdk.config import GenerationOptions
from persona_sdk.plan import DecodingRule

_BLOCK = 64  # uniforms are drawn in blocks of one size, so that a longer run starts like a shorter one


def uniforms(seed: int, count: int) -> Float[Tensor, " n"]:
    """The first `count` uniforms (rounded up to a block) of a seed's stream, float64 in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    blocks = [
        torch.rand(_BLOCK, generator=generator, dtype=torch.float64) for _ in range(-(-count // _BLOCK))
    ]
    return torch.cat(blocks)


def penalize_repetition(
    logits: Float[Tensor, "rows vocab"], seen: Tensor, penalty: Float[Tensor, "rows 1"]
) -> Float[Tensor, "rows vocab"]:
    """Divide positive and multiply negative logits of tokens in `seen` ([rows, vocab] bool) by `penalty`."""
    penalized = torch.where(logits < 0, logits * penalty, logits / penalty)
    return torch.where(seen, penalized, logits)


def sample(
    logits: Float[Tensor, "rows vocab"],
    draws: Float[Tensor, " rows"],
    *,
    temperature: Float[Tensor, "rows 1"],
    top_k: Int[Tensor, "rows 1"],
    top_p: Float[Tensor, "rows 1"],
) -> Int[Tensor, " rows"]:
    """One token per row: the quantile `draws` of the tempered, top-k and top-p filtered distribution.

    ``top_k`` of 0 keeps the whole vocabulary. Tokens that tie with the last one kept are kept too, and the
    quantile runs through the vocabulary in order, so that neither ties nor what a row's neighbours ask for
    decide its token. Probabilities are float64.
    """
    vocab = logits.shape[1]
    scores = logits.double() / temperature
    if bool((top_k > 0).any()):
        keep = top_k.clamp(max=vocab)
        largest = torch.topk(scores, int(keep.max()), dim=1).values
        last = largest.gather(1, (keep - 1).clamp(min=0)).masked_fill(keep == 0, -torch.inf)
        scores = scores.masked_fill(scores < last, -torch.inf)
    if bool((top_p < 1).any()):
        width = int(torch.isfinite(scores).sum(dim=1).max())
        largest = torch.topk(scores, width, dim=1).values
        likely = largest.softmax(dim=1)
        before = likely.cumsum(dim=1) - likely  # 0 for the most likely token, which always stays
        last = largest.masked_fill(before >= top_p, torch.inf).min(dim=1, keepdim=True).values
        scores = scores.masked_fill(scores < last, -torch.inf)
    cumulative = scores.softmax(dim=1).cumsum(dim=1)
    target = draws[:, None].to(cumulative) * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=vocab - 1)


class TokenChooser:
    """Holds what the rows of one batch need to choose tokens, as tensors indexed by row."""

    def __init__(
        self,
        options: Sequence[GenerationOptions],
        rules: Sequence[Sequence[DecodingRule]],
        seeds: Sequence[int],
        prompts: Sequence[Sequence[int]],
        *,
        vocab: int,
        device: torch.device,
    ) -> None:
        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self._sampled = torch.tensor([o.do_sample for o in options]).nonzero()[:, 0].to(device)
        picked = [options[int(row)] for row in self._sampled]
        self._temperature = column([o.temperature for o in picked])
        self._top_k = column([o.top_k for o in picked])
        self._top_p = column([o.top_p for o in picked])
        self._draws: Tensor | None = None
        if picked:
            longest = max(o.max_new_tokens for o in options)  # a finished row goes on with the batch
            streams = [uniforms(seeds[int(row)], longest) for row in self._sampled]
            self._draws = torch.stack(streams).to(device)

        self._penalty: Tensor | None = None
        if any(o.repetition_penalty != 1.0 for o in options):
            self._penalty = column([o.repetition_penalty for o in options])
            self._seen = torch.zeros(len(options), vocab, dtype=torch.bool)
            for row, prompt in enumerate(prompts):
                self._seen[row, torch.tensor(prompt)] = True
            self._seen = self._seen.to(device)

        self._bias: Tensor | None = None
        if any(rules):
            bias = torch.zeros(len(options), vocab)
            for row, row_rules in enumerate(rules):
                for rule in row_rules:
                    for token, value in rule.bias:
                        bias[row, token] += value
            self._bias = bias.to(device)

    def adjusted(self, logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows vocab"]:
        """Logits after bias and repetition penalty."""
        logits = logits.float()
        if self._bias is not None:
            logits = logits + self._bias
        if self._penalty is not None:
            logits = penalize_repetition(logits, self._seen, self._penalty)
        return logits

    def choose(self, logits: Float[Tensor, "rows vocab"], step: int) -> Int[Tensor, " rows"]:
        """The next token of every row; `step` counts generated tokens from 0."""
        logits = self.adjusted(logits)
        tokens = logits.argmax(dim=1)
        if self._draws is not None:
            tokens[self._sampled] = sample(
                logits[self._sampled],
                self._draws[:, step],
                temperature=self._temperature,
                top_k=self._top_k,
                top_p=self._top_p,
            )
        if self._penalty is not None:
            self._seen.scatter_(1, tokens[:, None], True)
        return tokens
