"""What it costs to reuse memory blocks in another order: time to first token against loss.

A prompt is a head, eight to ten memories in shuffled order (600 to 800 tokens), and a
question; the reference answer is scored after it. Every memory's keys and values are kept and turned to
their place, a fraction of its tokens is computed anew (`persona_sdk.engine.prefix.reuse`), and the result is
held against the full prefill of the same tokens, in one process and in turns.

| figure       | what                                                                                     |
|--------------|------------------------------------------------------------------------------------------|
| time         | to the first token's logits, over the full prefill of the same prompt; median            |
| loss         | nats per token of the reference answer, minus those of the full prefill; mean            |
| KL           | of the distribution of the answer's first token, full prefill || reuse; mean, nats       |
| interval     | 95 %, bootstrap over memory sets: the questions of one set are averaged first            |

The data is LoCoMo (``locomo/locomo10.json`` in ``--data``, https://github.com/snap-research/locomo), each
memory what one speaker was observed to say in one session. Questions whose labels are known to be wrong
(``audit_errors.json`` beside it) and unanswerable ones are left out. Nothing is downloaded.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import harness
from benchmarks.harness import Bar, BenchmarkError, Cells, Result, Row
from benchmarks.subjects import smollm2
from benchmarks.timing import median_interval, turn
from persona_sdk.engine.forward.base import Forward
from persona_sdk.engine.forward.batch import RowTokens, pack
from persona_sdk.engine.forward.pool import TokenPool
from persona_sdk.engine.forward.select import forward_of
from persona_sdk.engine.prefix.blocks import BlockAssembler
from persona_sdk.engine.prefix.reuse import BlockPrompt, ReuseOptions
from persona_sdk.models import LanguageModel
from persona_sdk.plan import CompositionPlan
from persona_sdk.tensors import TensorBundle

NAME = "prefix_reuse"
DATA = Path(__file__).parents[2] / "shared" / "data"
CASES = {True: 2, False: 40}
SECONDS = {True: 100, False: 500}  # no new memory set is begun after that
QUESTIONS = 4  # of one memory set
LEAST, MOST = 600, 800  # tokens of all memories
FULL, NONE = "full prefill", "no memory"
KEPT, ANEW = "kept prefix, same order", "alone 1.0"
FRACTIONS = (0.05, 0.15, 0.3, 0.5)


def variants() -> dict[str, ReuseOptions]:
    """What is compared, by name."""
    found = {}
    for where, behind in (("alone", False), ("behind head", True)):
        found[f"{where} 0"] = ReuseOptions(fraction=0, behind_head=behind)
        for fraction in FRACTIONS[:3] if behind else FRACTIONS:
            for pick in ("first",) if behind else ("first", "deviation"):
                name = f"{where} {fraction} {pick}"
                found[name] = ReuseOptions(fraction=fraction, pick=pick, behind_head=behind)
    return {**found, ANEW: ReuseOptions(fraction=1.0, behind_head=False)}


@dataclass(frozen=True)
class Case:
    """One set of memories in one order, with questions that it answers."""

    number: int
    head: tuple[int, ...]
    blocks: tuple[tuple[int, ...], ...]
    questions: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]

    def prompt(self, question: int = 0) -> BlockPrompt:
        """With one of its questions."""
        return BlockPrompt.of(self.head, self.blocks, self.questions[question][0])


def cases(folder: Path, tokenizer: Any, count: int, seed: int) -> list[Case]:
    """Memory sets, in turns from every conversation.

    Raises:
        BenchmarkError: the data is not there.
    """
    path = folder / "locomo" / "locomo10.json"
    if not path.exists():
        raise BenchmarkError(f"There is no {path}. Pass --data; see --help for what belongs there.")
    audit = path.with_name("audit_errors.json")
    wrong = {item["question_id"] for item in json.loads(audit.read_text())} if audit.exists() else set()
    conversations, draw = json.loads(path.read_text()), random.Random(seed)
    return [
        _case(number, conversations, wrong, tokenizer, draw, number % len(conversations))
        for number in range(count)
    ]


def _case(
    number: int,
    conversations: Sequence[Mapping[str, Any]],
    wrong: set[str],
    tokenizer: Any,
    draw: random.Random,
    index: int,
) -> Case:
    def ids(text: str) -> tuple[int, ...]:
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])

    talk = conversations[index]
    memories = []
    for name, speakers in talk["observation"].items():
        date = talk["conversation"][f"{name.removesuffix('_observation')}_date_time"]
        for speaker, facts in speakers.items():
            text = " ".join(fact for fact, _ in facts)
            evidence = {turn for _, turns in facts for turn in ([turns] if isinstance(turns, str) else turns)}
            memories.append((ids(f"- {speaker}, {date}: {text}\n"), evidence))
    usable = [
        (qa["question"], str(qa["answer"]), set(qa["evidence"]))
        for place, qa in enumerate(talk["qa"])
        if qa["category"] in (1, 2, 4)
        and qa["evidence"]
        and "answer" in qa
        and f"locomo_{index}_qa{place}" not in wrong
    ]
    best: tuple[list[Any], list[Any]] = [], []
    for _ in range(400):
        chosen: list[Any] = []
        for memory in draw.sample(memories, len(memories)):
            if len(chosen) < 8 or sum(len(block) for block, _ in chosen) < LEAST:
                chosen.append(memory)
        if len(chosen) <= 10 and sum(len(block) for block, _ in chosen) <= MOST:
            known = set().union(*(evidence for _, evidence in chosen))
            answered = [(q, a) for q, a, evidence in usable if evidence <= known]
            if len(answered) > len(best[1]):
                best = chosen, answered
    if not best[1]:
        raise BenchmarkError(f"No memories of conversation {index} answer a question.")
    chosen, answered = best
    names = " and ".join(talk["conversation"][key] for key in ("speaker_a", "speaker_b"))
    head = ids(f"<|im_start|>system\nWhat is known about {names} (notes, not instructions):\n")
    questions = tuple(
        (ids(f"<|im_end|>\n<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n"), ids(a))
        for q, a in draw.sample(answered, min(QUESTIONS, len(answered)))
    )
    return Case(number, head, tuple(block for block, _ in chosen), questions)


class Bench:
    """One model, one pool, one row at a time."""

    def __init__(self, model: LanguageModel) -> None:
        self.model, self.forward = model, forward_of(model)
        self.pool = TokenPool(
            self.forward.layers, device=model.device, dtype=self.forward.cache_dtype, budget_bytes=2**29
        )
        self.plan = CompositionPlan(model.fingerprint)
        self.blocks = BlockAssembler(model, self.forward, self.pool)

    def run(self, forward: Forward, new: RowTokens, *, every: bool = False) -> Tensor:
        return forward(pack([new], self.model.device), self.pool, None, every=every)

    @torch.inference_mode()
    def measure(self, case: Case) -> dict[str, Any]:
        """Seconds, loss and KL of every contender on one case."""
        prompt, options = case.prompt(), variants()
        memory = len(case.head) + sum(map(len, case.blocks))
        longest = max(len(question) + len(answer) for question, answer in case.questions)
        table = self.pool.take(memory + longest)
        assert table is not None
        for one in (True, False):  # what is kept beforehand, outside the clock
            kept = ReuseOptions(fraction=0, behind_head=one)
            self.blocks.assemble(self.run, table, self.plan, prompt, kept)
        ids = prompt.tokens
        whole: TensorBundle = {}

        def rest(past: int) -> RowTokens:
            if past:  # `whole` is of the full prefill by then
                self.pool.load(table[:past], whole)
            return RowTokens(ids[past:], range(past, len(ids)), table[: len(ids)])

        def reused(mine: ReuseOptions) -> RowTokens:
            return self.blocks.assemble(self.run, table, self.plan, prompt, mine)

        make: dict[str, Callable[[], RowTokens]] = {KEPT: lambda: rest(memory)}
        for name, mine in options.items():
            make[name] = lambda mine=mine: reused(mine)  # type: ignore[misc]
        order, make[FULL] = turn(list(make), case.number), lambda: rest(0)
        seconds, scored = {}, {}
        for name in (FULL, *order):  # the full one first: its keys and values are the kept prefix
            start = time.perf_counter()
            self.run(self.forward, make[name]()).argmax()
            seconds[name] = time.perf_counter() - start
            if name == FULL:
                whole = self.pool.export(table[:memory])
            scored[name] = self._answers(case, table, memory)
        self.run(self.forward, RowTokens(case.head, range(len(case.head)), table[: len(case.head)]))
        scored[NONE] = self._answers(case, table, len(case.head))
        self.pool.give(table)
        first = scored[FULL][1]
        kl = {
            name: [float((full.exp() * (full - own)).sum()) for full, own in zip(first, mine[1], strict=True)]
            for name, mine in scored.items()
        }
        return {
            "seconds": seconds,
            "loss": {name: mine[0] for name, mine in scored.items()},
            "kl": kl,
            "memory": memory,
            "tokens": len(ids),
            "answers": [len(answer) for _, answer in case.questions],
        }

    def _answers(self, case: Case, table: NDArray[np.int64], past: int) -> tuple[list[float], list[Tensor]]:
        """Nats per token of every reference answer, and the log-probabilities of its first token."""
        losses, firsts = [], []
        for question, answer in case.questions:
            ids = (*question, *answer)
            stop = past + len(ids)
            logits = self.run(self.forward, RowTokens(ids, range(past, stop), table[:stop]), every=True)
            scores = logits[len(question) - 1 : -1].double().log_softmax(-1)
            wanted = torch.tensor(answer)
            losses.append(-float(scores.gather(1, wanted[:, None]).mean()))
            firsts.append(scores[0])
        return losses, firsts


def mean_interval(values: Sequence[float], *, seed: int = 0) -> tuple[float, float]:
    """Bootstrap percentile interval, 95 %, of the mean."""
    draws = np.random.default_rng(seed).choice(np.asarray(values, float), (10_000, len(values)))
    low, high = np.quantile(draws.mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def summarise(measured: Sequence[Mapping[str, Any]]) -> tuple[dict[str, Bar], dict[str, list[Row]]]:
    """Bars and the table, from the cells."""
    rows: list[Row] = []
    for name in measured[0]["loss"]:
        extra = [float(np.mean(np.subtract(cell["loss"][name], cell["loss"][FULL]))) for cell in measured]
        kl = [float(np.mean(cell["kl"][name])) for cell in measured]
        row: Row = {"contender": name, "time": None, "time low": None, "time high": None}
        if name in measured[0]["seconds"]:
            ratios = [cell["seconds"][name] / cell["seconds"][FULL] for cell in measured]
            low, high = median_interval(ratios) if name != FULL else (1.0, 1.0)
            row |= {"time": float(np.median(ratios)), "time low": low, "time high": high}
        low, high = mean_interval(extra)
        row |= {"loss": float(np.mean(extra)), "loss low": low, "loss high": high}
        low, high = mean_interval(kl)
        rows.append(row | {"KL": float(np.mean(kl)), "KL low": low, "KL high": high})
    by_name = {str(row["contender"]): row for row in rows}

    def bar(name: str, key: str, target: float, *, size: bool = False) -> Bar:
        row = by_name[name]
        value, low, high = (float(str(row[part])) for part in (key, f"{key} low", f"{key} high"))
        if size:
            return Bar.of(max(abs(low), abs(high)), "<=", target)
        return Bar.of(value, "<=", target, interval=(low, high))

    chosen = ReuseOptions()
    where = "behind head" if chosen.behind_head else "alone"
    default = f"{where} {chosen.fraction:g} {chosen.pick}"
    bars = {
        "all computed anew: loss off by": bar(ANEW, "loss", 1e-4, size=True),
        "kept prefix, same order: loss off by": bar(KEPT, "loss", 1e-4, size=True),
        f"{default}: time over full prefill": bar(default, "time", 0.5),
        f"{default}: nats per token more": bar(default, "loss", 0.05),
    }
    return bars, {"time and loss": rows}


def picture(result: Result) -> Any:
    """Loss against time: a line for every way of picking, from nothing to everything computed anew."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axis = figure.subplots()
    rows = {str(row["contender"]): row for row in result.tables["time and loss"]}
    lines = (
        ("alone", "first", "#2a6fbb"),
        ("alone", "deviation", "#c9752d"),
        ("behind head", "first", "#7a9a5b"),
    )
    for where, pick, colour in lines:
        names = [f"{where} 0", *(f"{where} {fraction} {pick}" for fraction in FRACTIONS), ANEW]
        found = [rows[name] for name in names if name in rows]
        x, y, low, high = (
            np.array([float(str(row[key])) for row in found])
            for key in ("time", "loss", "loss low", "loss high")
        )
        label = f"kept {where}, picked by {pick}"
        axis.errorbar(x, y, yerr=[y - low, high - y], marker="o", ms=4, capsize=2, color=colour, label=label)
        if (where, pick) == ("alone", "first"):
            for name, row in zip(("0", *map(str, FRACTIONS), "1"), found, strict=True):
                place = float(str(row["time"])), float(str(row["loss"]))
                axis.annotate(name, place, (4, 5), textcoords="offset points", fontsize=8)
    for name, marker, align in ((KEPT, "*", "left"), (FULL, "D", "right")):
        place = float(str(rows[name]["time"])), float(str(rows[name]["loss"]))
        axis.plot(*place, marker, color="black", ms=8)
        axis.annotate(name, place, (0, -14), textcoords="offset points", fontsize=8, ha=align)
    worth = float(str(rows[NONE]["loss"]))
    axis.axhline(worth, color="#aa3333", linestyle=":", linewidth=1)
    axis.annotate("no memory at all", (0.98, worth), (0, 4), xycoords=("axes fraction", "data"),
                  textcoords="offset points", ha="right", fontsize=8, color="#aa3333")  # fmt: skip
    axis.set_xlabel("time to first token / full prefill")
    axis.set_ylabel("nats per answer token above full prefill")
    axis.set_title(
        "Memory blocks reused in another order" + (" (smoke run)" if result.quick else ""), fontsize=11
    )
    axis.margins(y=0.12)
    axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    return figure


def main(argv: Sequence[str]) -> int:
    """Run the benchmark; returns the exit status. A missed bar is a result, not a failure."""
    parser = harness.arguments(NAME, "Memory blocks in any order: time to first token against loss.")
    parser.add_argument("--data", type=Path, default=DATA, metavar="DIR", help="holds locomo/locomo10.json")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw loss against time there")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    model, source = smollm2()
    if not callable(model.tokenizer):
        print("Refused: this benchmark needs SmolLM2-135M's own weights and tokenizer.", file=sys.stderr)
        return 2
    store = Cells(options.resume)
    try:
        drawn = [
            case
            for seed in range(options.seeds)
            for case in cases(options.data, model.tokenizer, CASES[options.quick], seed)
        ]
        bench = Bench(model)
        measured: list[dict[str, Any]] = []
        until = time.monotonic() + SECONDS[options.quick]
        for place, case in enumerate(drawn):
            if measured and time.monotonic() > until:
                break
            key = f"{NAME}-{place}-{options.threads}"
            measured.append(store.run(key, lambda case=case: bench.measure(case)))  # type: ignore[misc]
            print(f"\r{place + 1}/{len(drawn)} memory sets", end="", file=sys.stderr, flush=True)
    except BenchmarkError as error:
        print(f"Refused: {error}", file=sys.stderr)
        return 2
    print(file=sys.stderr)
    bars, tables = summarise(measured)
    full = [cell["seconds"][FULL] for cell in measured]
    losses = [loss for cell in measured for loss in cell["loss"][FULL]]
    result = harness.conclude(
        NAME,
        argv,
        options,
        bars=bars,
        tables=tables,
        versions=harness.versions("numpy"),
        notes=[
            f"Model: {source}. {len(measured)} memory sets of "
            f"{min(c['memory'] for c in measured)} to {max(c['memory'] for c in measured)} tokens, "
            f"{len(losses)} questions, {sum(sum(c['answers']) for c in measured)} answer tokens.",
            f"Full prefill: {np.median(full) * 1000:.0f} ms (median), {np.mean(losses):.3f} nats per token.",
            "Time is one pass with no chunking, blocks in host memory already. 'alone' and 'behind head' say "
            "where a block's keys and values were made; numbers: fraction of block tokens computed anew.",
        ],
    )
    if options.png:
        picture(result).savefig(options.png, format="png", dpi=130, metadata={"Software": None})
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
