"""Sampling against the formula over the whole vocabulary, and that against transformers' own warpers."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from persona_sdk.config import GenerationOptions
from persona_sdk.engine.sampling import Laws, RowSampler, choose, choose_on_device, sample
from persona_sdk.plan import DecodingRule

CPU = torch.device("cpu")


def uniforms(seed: int, count: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.cat(
        [torch.rand(64, generator=generator, dtype=torch.float64) for _ in range(-(-count // 64))]
    )


def reference(logits: torch.Tensor, draw: float, options: GenerationOptions) -> int:
    """The formula as it stands for one row, over the whole vocabulary in float64."""
    if not options.do_sample:
        return int(logits.argmax())
    scores = logits.double() / torch.tensor(options.temperature)
    if options.top_k:
        scores[scores < scores.topk(min(options.top_k, len(scores))).values[-1]] = -torch.inf
    if options.top_p < 1:
        largest = scores.sort(descending=True).values
        likely = largest.softmax(0)
        kept = largest[likely.cumsum(0) - likely < torch.tensor(options.top_p)]
        scores[scores < kept[-1]] = -torch.inf
    cumulative = scores.softmax(0).cumsum(0)
    return int(torch.searchsorted(cumulative, draw * cumulative[-1], right=True))


class Row:
    """A row by the dense formula: bias and seen ids as vectors over the vocabulary."""

    def __init__(
        self, options: GenerationOptions, rules: Sequence[DecodingRule], seed: int, prompt: list[int]
    ):
        self.arguments = (options, rules, seed, prompt)
        self.tokens: list[int] = []

    def sampler(self, vocab: int, device: torch.device = CPU) -> RowSampler:
        return RowSampler(*self.arguments, vocab=vocab, device=device)

    def next(self, logits: torch.Tensor) -> int:
        options, rules, seed, prompt = self.arguments
        logits = logits.float()
        for rule in rules:
            for token, value in rule.bias:
                logits[token] += value
        seen = torch.zeros(len(logits), dtype=torch.bool)
        seen[prompt + self.tokens] = True
        penalty = torch.tensor(options.repetition_penalty)
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
        draw = float(uniforms(seed, len(self.tokens) + 1)[len(self.tokens)])
        self.tokens.append(reference(logits, draw, options))
        return self.tokens[-1]


OPTIONS = st.builds(
    GenerationOptions,
    max_new_tokens=st.just(2),  # samplers must go on past it
    do_sample=st.sampled_from([True, True, False]),
    temperature=st.sampled_from([0.1, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 0, 1, 5, 50, 120, 127, 128, 129, 10_000]),
    top_p=st.sampled_from([1.0, 1.0, 0.999, 0.9, 0.5, 0.01]),
    repetition_penalty=st.sampled_from([1.0, 1.0, 1.3, 0.8]),
)


@st.composite
def tables(draw) -> tuple[int, list[Row]]:
    vocab = draw(st.sampled_from([2, 40, 63, 64, 65, 128, 1000, 9001]))
    ids = st.integers(0, vocab - 1)
    # the last id is never banned, so that something is left
    values = st.sampled_from([-torch.inf, -3.0, 0.1, 2.5])
    pair = st.tuples(st.integers(0, vocab - 2), values) | st.tuples(st.just(vocab - 1), st.just(1.5))
    rule = st.builds(DecodingRule, bias=st.lists(pair, max_size=4).map(tuple), origin=st.just("rule"))
    row = st.builds(
        Row,
        options=OPTIONS,
        rules=st.lists(rule, max_size=2),
        seed=st.integers(0, 2**63 - 1),
        prompt=st.lists(ids, min_size=1, max_size=5),
    )
    return vocab, draw(st.lists(row, min_size=1, max_size=6))


@given(
    table=tables(),
    seed=st.integers(0, 1000),
    scale=st.sampled_from([0.1, 1.0, 3.0, 20.0]),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16]),
    ties=st.booleans(),
)
@settings(max_examples=120)
def test_tokens_are_those_of_the_formula_over_the_whole_vocabulary(table, seed, scale, dtype, ties):
    vocab, rows = table
    samplers = [row.sampler(vocab) for row in rows]
    generator = torch.Generator().manual_seed(seed)
    for _ in range(4):
        logits = (scale * torch.randn(len(rows), vocab, generator=generator)).to(dtype)
        logits = logits.round() if ties else logits
        expected = [row.next(line.clone()) for row, line in zip(rows, logits, strict=True)]
        chosen = choose(logits, samplers)
        assert list(chosen.ids) == chosen.tokens.tolist() == expected
        assert not any(chosen.bad)


@given(table=tables(), seed=st.integers(0, 1000), scale=st.sampled_from([0.1, 3.0]))
def test_the_formula_for_other_devices_chooses_the_same(table, seed, scale):
    vocab, rows = table
    samplers = [row.sampler(vocab) for row in rows if row.arguments[0].do_sample]
    if samplers:
        logits = scale * torch.randn(len(samplers), vocab, generator=torch.Generator().manual_seed(seed))
        for line, sampler in zip(logits, samplers, strict=True):
            sampler.adjust(line)
        found = sample(logits, Laws.of(samplers, CPU))
        expected = [reference(z, s.draw(), s.options) for z, s in zip(logits, samplers, strict=True)]
        assert found.tolist() == expected


@given(
    seed=st.integers(0, 100),
    temperature=st.sampled_from([0.3, 1.0, 2.0]),
    top_k=st.sampled_from([0, 1, 5, 50]),
    top_p=st.sampled_from([0.1, 0.8, 1.0]),
)
def test_distribution_is_that_of_transformers(seed, temperature, top_k, top_p):
    logits = 2 * torch.randn(1, 40, generator=torch.Generator().manual_seed(seed))
    scores = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    sweep = (torch.arange(4000, dtype=torch.float64)[:, None] + 0.5) / 4000  # the distribution itself
    law = [torch.full_like(sweep, value) for value in (temperature, top_k, top_p)]
    tokens = sample(logits.expand(4000, -1), Laws(sweep, *law, widest=top_k, nucleus=top_p < 1))
    found = torch.bincount(tokens, minlength=40) / 4000
    torch.testing.assert_close(found, scores.softmax(dim=1)[0], atol=6e-4, rtol=0)


def test_bias_and_repetition_penalty_are_those_of_transformers_while_a_row_goes_on():
    prompt, bias = [3, 4, 4], {(3,): 2.0, (5,): -1.0}
    rule = DecodingRule(bias=tuple((k[0], v) for k, v in bias.items()), origin="bias")
    sampler = RowSampler(GenerationOptions(repetition_penalty=1.5), [rule], 0, prompt, vocab=30, device=CPU)
    for _ in range(20):
        logits = torch.randn(1, 30)
        scores = SequenceBiasLogitsProcessor([[list(k), v] for k, v in bias.items()])(
            torch.tensor([prompt]), logits.clone()
        )
        expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt]), scores)
        token = choose(logits, [sampler]).ids[0]
        torch.testing.assert_close(logits, expected)  # overwritten
        assert token == expected.argmax()
        prompt.append(token)


@given(table=tables(), seed=st.integers(0, 1000), ties=st.booleans())
def test_a_row_does_not_depend_on_its_neighbours(table, seed, ties):
    vocab, rows = table
    together, alone = ([row.sampler(vocab) for row in rows] for _ in range(2))
    logits = 2 * torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    logits = logits.round() if ties else logits
    expected = [choose(logits[i : i + 1].clone(), [row]).ids[0] for i, row in enumerate(alone)]
    assert list(choose(logits, together).ids) == expected


@given(table=tables(), seed=st.integers(0, 1000), data=st.data())
def test_rows_that_are_not_numbers_say_so_and_leave_the_others_alone(table, seed, data):
    vocab, rows = table
    logits = torch.randn(len(rows), vocab, generator=torch.Generator().manual_seed(seed))
    good = choose(logits.clone(), [row.sampler(vocab) for row in rows])
    faults = data.draw(
        st.lists(st.sampled_from(["", "nan", "inf", "empty"]), min_size=len(rows), max_size=len(rows))
    )
    for line, fault in zip(logits, faults, strict=True):
        place = data.draw(st.integers(0, vocab - 1))
        if fault == "empty":
            line.fill_(-torch.inf)
        elif fault:
            line[place] = float(fault)
    samplers = [row.sampler(vocab) for row in rows]
    chosen = choose(logits, samplers)
    assert chosen.bad == tuple(map(bool, faults))
    for i, fault in enumerate(faults):
        assert chosen.ids[i] == (0 if fault else good.ids[i])
        assert samplers[i].count == (0 if fault else 1)


def test_a_row_whose_rules_ban_everything_is_bad():
    ban = DecodingRule(bias=tuple((token, -torch.inf) for token in range(5)), origin="ban")
    options = GenerationOptions(do_sample=True)
    rows = [RowSampler(options, rules, 0, [1], vocab=5, device=CPU) for rules in ([ban], [])]
    assert choose(torch.randn(2, 5), rows).bad == (True, False)


def test_token_number_n_uses_uniform_number_n():
    sampler = RowSampler(GenerationOptions(do_sample=True), [], 7, [1], vocab=5, device=CPU)
    found = []
    for _ in range(200):
        assert sampler.draw() == sampler.draw()
        found.append(sampler.draw())
        sampler.accept(1)
    assert found == uniforms(7, 200)[:200].tolist()
    assert found[:5] != uniforms(8, 5)[:5].tolist()


class Fixed(RowSampler):
    """Draws one number."""

    uniform = 0.0

    def draw(self) -> float:
        return self.uniform


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("options", [{"top_k": 2}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0}])
def test_extreme_draws_never_leave_what_is_kept(options, uniform):
    logits = torch.full((1, 700), -torch.inf)
    logits[0, 300:302] = torch.tensor([0.0, 1.0])
    row = Fixed(GenerationOptions(do_sample=True, **options), [], 0, [1], vocab=700, device=CPU)
    row.uniform = uniform
    assert choose(logits, [row]).ids[0] == (301 if uniform else 300)


@pytest.mark.parametrize("options", [{}, {"top_k": 0}, {"top_k": 0, "top_p": 0.5}, {"top_p": 1e-60}])
def test_extreme_temperatures_stay_numbers(options):
    logits = torch.randn(1, 500)
    for temperature in (1e-300, 1e-30):
        cold = GenerationOptions(do_sample=True, temperature=temperature, **options)
        row = RowSampler(cold, [], 0, [1], vocab=500, device=CPU)
        assert choose(logits, [row]).ids[0] == logits.argmax()
        assert sample(logits, Laws.of([row], CPU))[0] == logits.argmax()
    hot = GenerationOptions(do_sample=True, temperature=1e300, **options)
    row = RowSampler(hot, [], 0, [1], vocab=500, device=CPU)
    kept = {int(choose(logits, [row]).ids[0]) for _ in range(300)}
    assert len(kept) == 1 if options.get("top_p") == 1e-60 else len(kept) > 20


@given(table=tables())
def test_nothing_is_read_back_from_another_device(table):
    vocab, rows = table
    meta = torch.device("meta")  # holds no numbers: reading one raises
    logits = torch.empty(len(rows), vocab, device=meta)
    tokens, bad = choose_on_device(logits, [row.sampler(vocab, meta) for row in rows])
    assert tokens.shape == bad.shape == (len(rows),)
    assert tokens.device == bad.device == meta


@pytest.mark.gpu
def test_cuda_chooses_the_same_and_waits_once():
    options = [
        GenerationOptions(),
        GenerationOptions(do_sample=True),
        GenerationOptions(do_sample=True, top_k=0, top_p=0.9, repetition_penalty=1.2),
    ]
    rule = DecodingRule(bias=((3, 2.0), (4, -torch.inf)), origin="rule")
    logits = torch.randn(3, 1000)
    cuda = torch.device("cuda")
    there, here = (
        [RowSampler(o, [rule], 1, [1, 2], vocab=1000, device=device) for o in options]
        for device in (cuda, CPU)
    )
    moved = logits.to(cuda)
    for _ in range(3):
        torch.cuda.set_sync_debug_mode("error")
        try:
            choose_on_device(moved.clone(), there)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert choose(moved.clone(), there).ids == choose(logits.clone(), here).ids
