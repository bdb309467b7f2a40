"""Studies of `benchmarks.panacea`: examples by dimension, to train on and held out, split by prompt.

    made_styles     rule-made styles, SFT                                               panacea_styles.py
    made_pairs      rule-made pairs with opposed labels, DPO                            panacea_styles.py
    brief_verbose   the shorter and the longer real response to a prompt                HelpSteer2, Hummer
    harmless        chosen ("harmless") and rejected ("compliant") replies              HH harmless-base
    labelled        depth, specificity, conciseness; or dimensions of HelpSteer2        either of the two

"brief" and "verbose" go by length: in HelpSteer2 the longer response wins 91 % of the human verbosity
labels (SOURCE.md there), and pairs whose lengths differ by less than half are left out. The pairs with such
labels are too few at lengths that a study on a CPU can train on.

Texts that are too long are left out, never cut: a cut reply would teach not to end. One pair of a prompt is
kept. Several of the sets may not be passed on, so nothing of them is stored here; without its folder a study
is None.
"""

import gzip
import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from benchmarks import panacea_styles
from persona_sdk.adapters.preference_data import by_label

Example: TypeAlias = dict[str, str]  # prompt and completion, or prompt, chosen and rejected
Examples: TypeAlias = Mapping[str, Sequence[Example]]
Objective: TypeAlias = Literal["sft", "dpo"]
Tokens: TypeAlias = Callable[[str], int]

HUMMER = ("depth", "specificity", "conciseness")
_TURNS = ("<extra_id_1>", "\n\nHuman:")  # marks of replies that need more than one turn


@dataclass(frozen=True)
class Limits:
    """Tokens of a prompt and of a reply, without chat template and end token; longer ones are left out."""

    prompt: int = 60
    reply: int = 64


@dataclass(frozen=True)
class Study:
    """What all methods are trained on and compared by.

    Args:
        name: for tables.
        objective: what an example is.
        train: examples by dimension.
        held_out: examples by dimension on other prompts.
    """

    name: str
    objective: Objective
    train: Examples
    held_out: Examples

    def __post_init__(self) -> None:
        both = set(prompts(self.train)) & set(prompts(self.held_out))
        if both:
            raise ValueError(f"{len(both)} prompts are on both sides of {self.name}: {min(both)!r:.60}.")

    @property
    def dimensions(self) -> tuple[str, ...]:
        """Names, in order."""
        return tuple(self.train)


def prompts(examples: Examples) -> list[str]:
    """Every prompt once, in order: the unit that the bootstrap draws."""
    return list(dict.fromkeys(example["prompt"] for rows in examples.values() for example in rows))


def by_dimension(pairs: Sequence[Mapping[str, Any]], dimensions: Sequence[str]) -> dict[str, list[Example]]:
    """Labelled pairs as chosen and rejected of every dimension that labels them."""
    found: dict[str, list[Example]] = {name: [] for name in dimensions}
    for pair in pairs:
        for name, example in by_label(pair):
            if name in found:
                found[name].append(example)
    return found


def conflicting(examples: Examples) -> list[str]:
    """Prompts on which two dimensions prefer opposite responses."""
    winners: dict[str, set[str]] = {}
    for rows in examples.values():
        for example in rows:
            winners.setdefault(example["prompt"], set()).add(example["chosen"])
    return [prompt for prompt, chosen in winners.items() if len(chosen) > 1]


def as_sft(examples: Examples) -> dict[str, list[Example]]:
    """The chosen responses alone."""
    return {
        name: [{"prompt": example["prompt"], "completion": example["chosen"]} for example in rows]
        for name, rows in examples.items()
    }


def made_styles(styles: Sequence[str], *, train: int = 200, held_out: int = 60, seed: int = 0) -> Study:
    """SFT on rule-made styles."""
    seen, kept = panacea_styles.questions(train=train, held_out=held_out, seed=seed)
    rows = [panacea_styles.styled(asked, styles, seed) for asked in (seen, kept)]
    return Study(f"made: {', '.join(styles)}", "sft", *rows)


def made_pairs(*, agreeing: float = 0.0, train: int = 200, held_out: int = 60, seed: int = 0) -> Study:
    """DPO on rule-made pairs that brief and formal label in opposite ways, but for `agreeing` of them."""
    seen, kept = panacea_styles.questions(train=train, held_out=held_out, seed=seed)
    names = panacea_styles.BRIEF_AND_FORMAL
    rows = [
        by_dimension(panacea_styles.opposed_pairs(asked, agreeing=agreeing, seed=seed), names)
        for asked in (seen, kept)
    ]
    return Study(f"made: {' against '.join(names)}", "dpo", *rows)


def brief_verbose(
    data: Path,
    tokens: Tokens,
    objective: Objective,
    *,
    limits: Limits = Limits(),  # frozen
    held_out: int = 60,
    seed: int = 0,
) -> Study | None:
    """The shorter against the longer real response to a prompt: two dimensions that always conflict."""
    pairs = [*_helpsteer(data), *_hummer(data, HUMMER)]
    found = []
    for pair in _short_enough(pairs, tokens, limits):
        lengths = [tokens(pair["response_0"]), tokens(pair["response_1"])]
        if max(lengths) >= 1.5 * min(lengths):
            brief = int(lengths[1] < lengths[0])
            found.append({**pair, "better": {"brief": brief, "verbose": 1 - brief}})
    return _study("real: brief against verbose", objective, found, ("brief", "verbose"), held_out, seed)


def harmless(
    data: Path,
    tokens: Tokens,
    objective: Objective,
    *,
    limits: Limits = Limits(),
    held_out: int = 60,
    seed: int = 0,
) -> Study | None:
    """Single-turn harmless-base pairs: what was chosen as harmless, and what was rejected."""
    found = _short_enough(_harmless(data), tokens, limits)
    return _study(
        "real: harmless against compliant", objective, found, ("harmless", "compliant"), held_out, seed
    )


def labelled(
    data: Path,
    tokens: Tokens,
    objective: Objective,
    *,
    source: Literal["hummer", "helpsteer2"] = "hummer",
    dimensions: Sequence[str] = HUMMER,
    limits: Limits = Limits(reply=96),
    held_out: int = 90,
    seed: int = 0,
) -> Study | None:
    """Pairs as labelled; most carry one label, so the dimensions are mostly different pairs."""
    pairs = _hummer(data, dimensions) if source == "hummer" else _helpsteer(data)
    found = [
        pair
        for pair in _short_enough(pairs, tokens, limits)
        if not pair["better"].keys().isdisjoint(dimensions)
    ]
    return _study(f"real: {', '.join(dimensions)}", objective, found, dimensions, held_out, seed)


def _study(
    name: str,
    objective: Objective,
    pairs: Sequence[Mapping[str, Any]],
    dimensions: Sequence[str],
    held_out: int,
    seed: int,
) -> Study | None:
    if not pairs:
        return None
    order = sorted({pair["prompt"] for pair in pairs})
    random.Random(seed).shuffle(order)
    kept = set(order[:held_out])
    sides = [
        by_dimension([pair for pair in pairs if (pair["prompt"] in kept) is side], dimensions)
        for side in (False, True)
    ]
    if objective == "sft":
        sides = [as_sft(side) for side in sides]
    return Study(name, objective, *sides)


def _short_enough(pairs: Sequence[dict[str, Any]], tokens: Tokens, limits: Limits) -> list[dict[str, Any]]:
    """The first usable pair of every prompt; further labels of the very same pair are added to it."""
    found: dict[str, dict[str, Any]] = {}
    for pair in pairs:
        prompt, replies = pair["prompt"], (pair["response_0"], pair["response_1"])
        if prompt in found:
            first = found[prompt]
            before = (first["response_0"], first["response_1"])
            if sorted(before) == sorted(replies):
                turned = int(before != replies)
                labels = {name: winner ^ turned for name, winner in pair["better"].items()}
                found[prompt] = {**first, "better": {**labels, **first["better"]}}
            continue
        usable = all(text.strip() for text in (prompt, *replies)) and replies[0] != replies[1]
        if not usable or any(mark in text for mark in _TURNS for text in (prompt, *replies)):
            continue
        if tokens(prompt) <= limits.prompt and max(map(tokens, replies)) <= limits.reply:
            found[prompt] = pair
    return list(found.values())


def _helpsteer(data: Path) -> list[dict[str, Any]]:
    return list(_lines(data / "helpsteer2_dims" / "pairs.jsonl.gz"))


def _hummer(data: Path, dimensions: Sequence[str]) -> list[dict[str, Any]]:
    return [
        {
            **{key: row[key] for key in ("prompt", "response_0", "response_1")},
            "better": {name: row["better_response_id"]},
        }
        for name in dimensions
        for row in _lines(data / "hummer_dims" / f"{name}_test.jsonl.gz")
    ]


def _harmless(data: Path) -> list[dict[str, Any]]:
    found = []
    for row in _lines(data / "hh_rlhf_harmless_base_test" / "test.jsonl.gz"):
        (before, chosen), (other, rejected) = (
            row[side].rsplit("\n\nAssistant:", 1) for side in ("chosen", "rejected")
        )
        if before == other:
            prompt = before.removeprefix("\n\nHuman:").strip()  # a further "Human:" makes it too many turns
            sides = {"response_0": chosen.strip(), "response_1": rejected.strip()}
            found.append({"prompt": prompt, **sides, "better": {"harmless": 0, "compliant": 1}})
    return found


def _lines(file: Path) -> Iterator[Any]:
    if file.exists():
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            yield from map(json.loads, stream)
