"""Data of several preference dimensions: from what a user passes to token ids.

    SFT      {dimension: rows}      rows as for any adapter (`persona_sdk.adapters.training_data`)
    DPO      {dimension: pairs}     {"prompt": ..., "chosen": ..., "rejected": ...}, TRL's names; or
             [pair, ...]            {"prompt": ..., "response_0": ..., "response_1": ..., "better": {...}}
                                    with 0 or 1 by dimension
    reward   ["prompt", ...]        with one function a dimension: (prompt, reply) -> number

An *item* holds one example of every dimension, so the dimensions are balanced whatever their sizes: there are
as many items as the largest has examples, and smaller ones are gone through again, in another order.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from persona_sdk.adapters.training_data import Row, encode_rows
from persona_sdk.errors import InvalidInputError

logger = logging.getLogger("persona_sdk.adapters.preference_data")

Reward: TypeAlias = Callable[[str, str], float]
Objective: TypeAlias = Literal["sft", "dpo", "reward"]

_FORM = {
    "sft": "Expected {dimension: [(prompt, reply), ...]}.",
    "dpo": 'Expected {dimension: [{"prompt": ..., "chosen": ..., "rejected": ...}, ...]}, or a list of '
    '{"prompt": ..., "response_0": ..., "response_1": ..., "better": {dimension: 0 or 1}}.',
}


@dataclass(frozen=True)
class Example:
    """One example of one dimension.

    Args:
        rows: those whose likelihood counts: one for SFT, chosen and rejected for DPO.
        reference: the base model's log-likelihood of each, for DPO.
    """

    rows: tuple[Row, ...]
    reference: tuple[float, ...] = ()


def encode_examples(
    tokenizer: Any, data: Any, dimensions: Sequence[str], objective: Objective, max_length: int
) -> dict[str, list[Example]]:
    """Examples by dimension, in the order of `dimensions`.

    Raises:
        InvalidInputError: a dimension without data, a name that is no dimension, or an unusable row.
    """
    given = _labelled(data, dimensions) if objective == "dpo" else data
    if not isinstance(given, Mapping):
        raise InvalidInputError(f"The data is a {type(data).__name__}.", hint=_FORM[objective])
    strangers = sorted(set(map(str, given)) - set(dimensions))
    absent = [name for name in dimensions if not given.get(name)]
    if strangers or absent:
        said = f"has {strangers[0]!r}, which is no dimension" if strangers else f"lacks {absent[0]!r}"
        raise InvalidInputError(
            f"The data {said}.", hint=f"{_FORM[objective]} Dimensions: {', '.join(dimensions)}."
        )
    encode = _pairs if objective == "dpo" else _single
    found = {}
    for name in dimensions:
        try:
            found[name] = encode(tokenizer, given[name], max_length)
        except InvalidInputError as error:
            raise InvalidInputError(f"Dimension {name!r}: {error.message}", hint=error.hint) from error
    return found


def items(examples: Mapping[str, Sequence[Example]], seed: int) -> list[tuple[Example, ...]]:
    """One example of every dimension each; see the module."""
    draw, longest = np.random.default_rng(seed), max(map(len, examples.values()))
    columns = []
    for found in examples.values():
        rounds = [draw.permutation(len(found)) for _ in range(-(-longest // len(found)))]
        columns.append([found[place] for place in np.concatenate(rounds)[:longest]])
    return list(zip(*columns, strict=True))


def _single(tokenizer: Any, rows: Any, max_length: int) -> list[Example]:
    return [Example((row,)) for row in encode_rows(tokenizer, rows, max_length)]


def _pairs(tokenizer: Any, pairs: Any, max_length: int) -> list[Example]:
    if isinstance(pairs, str | bytes | Mapping) or not isinstance(pairs, Iterable):
        raise InvalidInputError(f"its data is a {type(pairs).__name__}.", hint=_FORM["dpo"])
    found = []
    for index, pair in enumerate(pairs):
        if not isinstance(pair, Mapping) or not set(pair) >= {"prompt", "chosen", "rejected"}:
            raise InvalidInputError(f"pair {index} is {pair!r:.80}.", hint=_FORM["dpo"])
        replies = [{"prompt": pair["prompt"], "completion": pair[side]} for side in ("chosen", "rejected")]
        found.append(Example(tuple(encode_rows(tokenizer, replies, max_length))))
    return found


def _labelled(data: Any, dimensions: Sequence[str]) -> Any:
    """Pairs that carry a label for some dimensions, as pairs by dimension; other data as it is."""
    if not isinstance(data, Sequence) or isinstance(data, str | bytes):
        return data
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in dimensions}
    unknown: Counter[str] = Counter()
    for index, pair in enumerate(data):
        better = pair.get("better") if isinstance(pair, Mapping) else None
        if not isinstance(better, Mapping) or not {"prompt", "response_0", "response_1"} <= set(pair):
            raise InvalidInputError(f"Pair {index} is {pair!r:.80}.", hint=_FORM["dpo"])
        for name, winner in better.items():
            if name not in found:
                unknown[name] += 1  # a data set may label more than this adapter is about
                continue
            if type(winner) is not int or winner not in (0, 1):
                raise InvalidInputError(f"Pair {index} has {name}={winner!r}.", hint="Expected 0 or 1.")
            chosen, rejected = pair[f"response_{winner}"], pair[f"response_{1 - winner}"]
            found[name].append({"prompt": pair["prompt"], "chosen": chosen, "rejected": rejected})
    if unknown:
        logger.warning("Labels of no dimension were passed over: %s.", dict(unknown))
    return found
