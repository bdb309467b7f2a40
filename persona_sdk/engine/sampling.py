"""Per-row choice of the next token. Order and meaning of the steps are those of transformers:
logit bias, repetition penalty, then for sampled rows temperature, top-k, top-p.

    z_i <- z_i + bias_i;   z_i <- z_i / penalty if z_i >= 0 else z_i * penalty, for ids seen before
    w_i = exp((z_i - max z) / temperature)        for kept ids, else 0
    token = the first i with  w_0 + ... + w_i > draw * sum w

    z        logits row                         [vocab]
    bias     RowSampler._bias_ids, _bias        [n], [n]
    penalty  RowSampler._penalty                [1]
    draw     RowSampler.draw()                  number n of the uniforms of the row's seed, for its token n

Ids that tie with the last one kept are kept too, and the quantile runs through the vocabulary in order: so
neither ties nor neighbours decide a row's token. Probabilities are float64.

On CPUs the cost is in the passes over the vocabulary. One pass finds the *peaks*, the maxima of blocks of
ids. The argmax, and whether the row is made of numbers at all, follow from the peaks and one block. The
`_CANDIDATES` largest logits lie in as many blocks with the largest peaks; if the least candidate falls under
the cut of top-k or top-p then everything above the cut is a candidate, so the choice among candidates is the
choice among all. Rows where it does not are worked out over the whole vocabulary, without sorting it.
On other devices nothing depends on data, so that the only wait for the device is reading the tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from persona_sdk.config import GenerationOptions
from persona_sdk.engine.uploads import upload
from persona_sdk.plan import DecodingRule

_BLOCK = 64  # uniforms are drawn in blocks of one size, so that a longer run starts like a shorter one
_WIDTH = 64  # ids per peak
_CANDIDATES = 128
_TIES = 16  # candidates beyond top-k: room for ids that tie with the last one kept
_BUCKETS, _BUCKETS_PER_NAT = 2048, 64
_FLOAT = torch.finfo(torch.float32)


class RowSampler:
    """What one row needs to choose its tokens. It lives as long as the row and knows no other row.

    Args:
        options: of the row's plan.
        rules: of the row's plan; their biases add up.
        seed: of the row's uniforms; unused by greedy rows.
        prompt: token ids that count as seen by the repetition penalty.
        vocab: width of the logits.
        device: where the logits will be.
    """

    def __init__(
        self,
        options: GenerationOptions,
        rules: Sequence[DecodingRule],
        seed: int,
        prompt: Sequence[int],
        *,
        vocab: int,
        device: torch.device,
    ) -> None:
        self.options = options
        self.count = 0
        # Held as float32 numbers. At the ends of the range they stay finite and positive.
        self.temperature, self.top_p = (
            torch.tensor([options.temperature, options.top_p]).clamp(_FLOAT.tiny, _FLOAT.max).tolist()
        )
        self.top_k = min(options.top_k, vocab)
        self._generator = torch.Generator().manual_seed(seed)
        self._draws: list[float] = []

        pairs = [pair for rule in rules for pair in rule.bias]
        places = {token: place for place, token in enumerate(dict.fromkeys(token for token, _ in pairs))}
        self._bias_ids = torch.tensor(list(places), dtype=torch.long, device=device)
        which = torch.tensor([places[token] for token, _ in pairs], dtype=torch.long)
        values = torch.tensor([value for _, value in pairs], dtype=torch.float32)
        self._bias = torch.zeros(len(places)).index_add_(0, which, values).to(device)

        self._seen: set[int] = set()
        self._penalty: Tensor | None = None
        if options.repetition_penalty != 1.0:
            self._penalty = torch.tensor([options.repetition_penalty], dtype=torch.float32, device=device)
            room = min(vocab, len(set(prompt)) + options.max_new_tokens)
            self._seen_ids = torch.zeros(room, dtype=torch.long)
            self._see(prompt)
            self._seen_ids = self._seen_ids.to(device)

    @property
    def ruled(self) -> bool:
        """Whether `adjust` changes anything."""
        return self._penalty is not None or len(self._bias_ids) > 0

    def draw(self) -> float:
        """The uniform of the next token, in [0, 1)."""
        while len(self._draws) <= self.count:
            block = torch.rand(_BLOCK, generator=self._generator, dtype=torch.float64)
            self._draws += block.tolist()
        return self._draws[self.count]

    def adjust(self, logits: Float[Tensor, " vocab"]) -> None:
        """Add the bias to one row of logits and penalize what was seen, in place."""
        if len(self._bias_ids):
            logits[self._bias_ids] = logits[self._bias_ids] + self._bias
        if self._penalty is not None and self._seen:
            ids = self._seen_ids[: len(self._seen)]
            logits[ids] = penalize_repetition(logits[ids], self._penalty)

    def accept(self, token: int) -> None:
        """Take note of the token that was chosen."""
        self.count += 1
        if self._penalty is not None:
            self._see((token,))

    def _see(self, tokens: Iterable[int]) -> None:
        for token in tokens:
            if token not in self._seen:
                if len(self._seen) == len(self._seen_ids):  # went on past max_new_tokens
                    self._seen_ids = torch.cat([self._seen_ids, torch.zeros_like(self._seen_ids)])
                self._seen_ids[len(self._seen)] = token
                self._seen.add(token)


@dataclass(frozen=True)
class Chosen:
    """One token per row, on the device of the logits and on the host.

    ``bad`` marks rows whose logits are not numbers: a NaN, a positive infinity, or nothing above -inf. Their
    token is 0 and their sampler did not move.
    """

    tokens: Int[Tensor, " rows"]
    ids: tuple[int, ...]
    bad: tuple[bool, ...]


def choose(logits: Float[Tensor, "rows vocab"], samplers: Sequence[RowSampler]) -> Chosen:
    """The next token of every row. Float32 logits of rows with a bias or a penalty are overwritten."""
    tokens, bad = choose_on_device(logits, samplers)
    ids, flags = torch.stack([tokens, bad.long()]).tolist()
    for sampler, token, flag in zip(samplers, ids, flags, strict=True):
        if not flag:
            sampler.accept(token)
    return Chosen(tokens, tuple(ids), tuple(map(bool, flags)))


def choose_on_device(
    logits: Float[Tensor, "rows vocab"], samplers: Sequence[RowSampler]
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Tokens and bad rows. Reads nothing back unless the logits are on the CPU, and moves no sampler."""
    logits = logits.float()
    for row, sampler in enumerate(samplers):
        if sampler.ruled:
            sampler.adjust(logits[row])
    sampled = [row for row, sampler in enumerate(samplers) if sampler.options.do_sample]
    if logits.device.type == "cpu":
        peaks = _peaks(logits)
        top, tokens = _best(logits, peaks)
        bad = ~top.isfinite()
        if sampled:
            flags = bad.tolist()
            sampled = [row for row in sampled if not flags[row]]
        if sampled:
            tokens[torch.tensor(sampled)] = _sample_on_cpu(logits, peaks, top, sampled, samplers)
    else:
        top, tokens = logits.max(dim=1)
        bad = ~top.isfinite()
        if sampled:
            rows = upload(torch.tensor(sampled), logits.device)
            tokens[rows] = sample(logits[rows], Laws.of([samplers[row] for row in sampled], logits.device))
    return tokens.masked_fill(bad, 0), bad


@dataclass(frozen=True)
class Laws:
    """How rows are sampled, as float64 columns. ``widest`` and ``nucleus`` are known without the device."""

    draws: Float[Tensor, "rows 1"]
    temperature: Float[Tensor, "rows 1"]
    top_k: Float[Tensor, "rows 1"]
    top_p: Float[Tensor, "rows 1"]
    widest: int
    nucleus: bool

    @staticmethod
    def of(samplers: Sequence[RowSampler], device: torch.device) -> "Laws":
        """The laws of rows that are about to choose."""
        table = [[s.draw(), s.temperature, s.top_k, s.top_p] for s in samplers]
        draws, temperature, top_k, top_p = upload(torch.tensor(table, dtype=torch.float64), device).mT
        widest, nucleus = max(s.top_k for s in samplers), any(s.top_p < 1 for s in samplers)
        return Laws(draws[:, None], temperature[:, None], top_k[:, None], top_p[:, None], widest, nucleus)


def sample(logits: Float[Tensor, "rows vocab"], laws: Laws) -> Int[Tensor, " rows"]:
    """One sampled token per row by the formula as it stands, over the whole vocabulary of all rows."""
    vocab = logits.shape[1]
    scores = logits.double() / laws.temperature
    if laws.widest:
        keep = laws.top_k.long().clamp(max=vocab)
        largest = torch.topk(scores, min(laws.widest, vocab), dim=1).values
        last = largest.gather(1, (keep - 1).clamp(min=0)).masked_fill(keep == 0, -torch.inf)
        scores = scores.masked_fill(scores < last, -torch.inf)
    if laws.nucleus:
        largest = scores.sort(dim=1, descending=True).values
        likely = largest.softmax(dim=1)
        before = likely.cumsum(dim=1) - likely  # 0 for the most likely token, which always stays
        cut = (before >= laws.top_p) & (laws.top_p < 1)
        last = largest.masked_fill(cut, torch.inf).amin(dim=1, keepdim=True)
        scores = scores.masked_fill(scores < last, -torch.inf)
    return _quantile(scores.softmax(dim=1), laws.draws)[:, 0]


def penalize_repetition(logits: Float[Tensor, "*n"], penalty: Float[Tensor, "*m"]) -> Float[Tensor, "*n"]:
    """Divide positive and multiply negative logits by `penalty`."""
    return torch.where(logits < 0, logits * penalty, logits / penalty)


def _quantile(weights: Float[Tensor, "rows n"], draws: Float[Tensor, "rows 1"]) -> Int[Tensor, "rows 1"]:
    """The first place whose cumulative weight exceeds ``draws`` of the row's total."""
    cumulative = weights.cumsum(dim=1)
    target = draws * cumulative[:, -1:]
    return torch.searchsorted(cumulative, target, right=True).clamp(max=weights.shape[1] - 1)


def _blocks(logits: Float[Tensor, "rows vocab"]) -> tuple[Float[Tensor, "rows blocks width"], int]:
    """The logits in blocks of ids (a view), and the number of ids in them; the rest is less than a block."""
    rows, vocab = logits.shape
    count = vocab // _WIDTH
    return logits[:, : count * _WIDTH].view(rows, count, _WIDTH), count * _WIDTH


def _peaks(logits: Float[Tensor, "rows vocab"]) -> Float[Tensor, "rows blocks"]:
    """Maxima of the blocks of ids, and of what is left over; NaN where there is one."""
    blocks, whole = _blocks(logits)
    peaks = blocks.amax(dim=2)
    if whole == logits.shape[1]:
        return peaks
    return torch.cat([peaks, logits[:, whole:].amax(dim=1, keepdim=True)], dim=1)


def _best(
    logits: Float[Tensor, "rows vocab"], peaks: Float[Tensor, "rows blocks"]
) -> tuple[Float[Tensor, " rows"], Int[Tensor, " rows"]]:
    """Every row's largest logit and the first id that has it."""
    top = peaks.amax(dim=1)
    start = peaks.argmax(dim=1, keepdim=True) * _WIDTH
    ids = (start + torch.arange(_WIDTH)).clamp(max=logits.shape[1] - 1)
    return top, start[:, 0] + logits.gather(1, ids).argmax(dim=1)


def _sample_on_cpu(
    logits: Float[Tensor, "rows vocab"],
    peaks: Float[Tensor, "rows blocks"],
    top: Float[Tensor, " rows"],
    sampled: Sequence[int],
    samplers: Sequence[RowSampler],
) -> Int[Tensor, " sampled"]:
    """Tokens of the rows `sampled`, all of which hold numbers: among candidates where that is enough."""
    scratch = torch.empty(logits.shape[1], dtype=torch.float64)
    found: dict[int, int] = {}
    rows = [
        row
        for row in sampled
        if 0 < samplers[row].top_k < _CANDIDATES or (not samplers[row].top_k and samplers[row].top_p < 1)
    ]
    if rows:
        totals = [
            float(_weigh(logits[row], top[row], samplers[row].temperature, scratch).sum())
            if not samplers[row].top_k
            else 0.0
            for row in rows
        ]
        index = torch.tensor(rows)
        ranks = [samplers[row].top_k for row in rows]
        count = max(ranks) + _TIES if all(ranks) else _CANDIDATES
        tokens, enough = _sample_candidates(
            *_candidates(logits, peaks, index, count),
            top[index, None],
            torch.tensor(totals, dtype=torch.float64)[:, None],
            Laws.of([samplers[row] for row in rows], logits.device),
        )
        found = {
            row: token
            for row, token, known in zip(rows, tokens.tolist(), enough.tolist(), strict=True)
            if known
        }
    for row in sampled:
        if row not in found:
            found[row] = _sample_line(logits[row], top[row], samplers[row], scratch)
    return torch.tensor([found[row] for row in sampled])


def _weigh(
    line: Float[Tensor, " n"], top: Float[Tensor, ""], temperature: float, out: Float[Tensor, " n"]
) -> Float[Tensor, " n"]:
    """``exp((line - top) / temperature)`` in float64, into `out`."""
    return out.copy_(line).sub_(top).div_(temperature).exp_()


def _candidates(
    logits: Float[Tensor, "all vocab"],
    peaks: Float[Tensor, "all blocks"],
    rows: Int[Tensor, " rows"],
    count: int,
) -> tuple[Float[Tensor, "rows n"], Int[Tensor, "rows n"]]:
    """The `count` largest logits of some rows, falling, and their ids; all of them where there are fewer."""
    blocks, whole = _blocks(logits)
    best = peaks[rows, : blocks.shape[1]].topk(min(count, blocks.shape[1]), sorted=False).indices
    pool = torch.cat([blocks[rows[:, None], best].flatten(1), logits[rows, whole:]], dim=1)
    values, places = pool.topk(min(count, pool.shape[1]))
    # The pool is made of the best blocks and, as one more, of what is left over behind all blocks.
    starts = torch.cat([best * _WIDTH, torch.full((len(rows), 1), whole)], dim=1)
    return values, starts.gather(1, places // _WIDTH) + places % _WIDTH


def _sample_candidates(
    values: Float[Tensor, "rows n"],
    ids: Int[Tensor, "rows n"],
    top: Float[Tensor, "rows 1"],
    totals: Float[Tensor, "rows 1"],
    laws: Laws,
) -> tuple[Int[Tensor, " rows"], Bool[Tensor, " rows"]]:
    """Tokens chosen among candidates, and whether the candidates hold all that top-k and top-p keep.

    ``totals`` are the weights of the whole vocabulary, for rows without top-k.
    """
    weights = ((values.double() - top) / laws.temperature).exp()
    place = (laws.top_k.long() - 1).clamp(0, values.shape[1] - 1)
    last = values.gather(1, place).masked_fill(laws.top_k == 0, -torch.inf).clamp(min=_FLOAT.min)
    weights = weights.masked_fill(values < last, 0.0)
    if laws.nucleus:
        cumulative = weights.cumsum(dim=1)
        total = torch.where(laws.top_k > 0, cumulative[:, -1:], totals)
        cut = (cumulative - weights >= laws.top_p * total) & (laws.top_p < 1)
        kept = values.masked_fill(cut, torch.inf).amin(dim=1, keepdim=True)
        last = torch.maximum(last, kept)
        weights = weights.masked_fill(values < last, 0.0)
    ids, order = ids.sort(dim=1)
    tokens = ids.gather(1, _quantile(weights.gather(1, order), laws.draws))
    return tokens[:, 0], values[:, -1] < last[:, 0]


def _sample_line(
    line: Float[Tensor, " n"], top: Float[Tensor, ""], sampler: RowSampler, scratch: Float[Tensor, " n"]
) -> int:
    """One sampled token over the whole vocabulary of one row."""
    weights = _weigh(line, top, sampler.temperature, scratch)
    if sampler.top_k:
        weights.mul_(line >= line.topk(sampler.top_k).values[-1])
    if sampler.top_p < 1:
        weights.mul_(line >= _nucleus_edge(line, weights, top, sampler))
    draw = torch.tensor([[sampler.draw()]], dtype=torch.float64)
    return int(_quantile(weights[None], draw))


def _nucleus_edge(
    line: Float[Tensor, " n"], weights: Float[Tensor, " n"], top: Float[Tensor, ""], sampler: RowSampler
) -> Float[Tensor, ""]:
    """The least logit that top-p keeps.

    Buckets of falling logits are weighed as a whole; only the one in which the mass is reached is sorted.
    """
    scale = min(_BUCKETS_PER_NAT / sampler.temperature, 1e30)
    buckets = (top - line).mul_(scale).clamp_(max=_BUCKETS - 1).long()
    cumulative = torch.bincount(buckets, weights, minlength=_BUCKETS).cumsum(0)
    needed = sampler.top_p * cumulative[-1:]
    edge = int(torch.searchsorted(cumulative, needed).clamp(max=_BUCKETS - 1))
    inside = (buckets == edge).nonzero()[:, 0]
    values, order = line[inside].sort(descending=True)
    within = weights[inside[order]]
    before = within.cumsum(0) - within + (cumulative[edge - 1] if edge else 0.0)
    return values[int((before < needed).sum().clamp(min=1)) - 1]
