"""Training rows: from what a user passes to token ids with labels.

Three kinds of rows, which may be mixed:

    ("question", "answer")                  or {"prompt": ..., "completion": ...}
    [{"role": ..., "content": ...}, ...]    or {"messages": [...]}
    "raw text"                              or {"text": ...}

The loss is taken on replies only (every assistant turn of a chat, each after its own history), or on all
tokens of a raw text. Prompts are encoded by `persona_sdk.prompting`, as they will be when the adapter is
used; a reply ends with the tokenizer's end token. A row that is too long loses the start of its prompt
first, then its own end; how many rows that happened to is logged.
"""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from torch import Tensor

from persona_sdk.errors import InvalidInputError
from persona_sdk.prompting import Message, control_tokens, defuse, encode, parse_messages

logger = logging.getLogger("persona_sdk.adapters.training")

IGNORED = -100  # the label transformers leaves out of the loss

Row: TypeAlias = dict[str, list[int]]

_EXPECTED = (
    'Expected ("prompt", "reply") pairs, texts, or chats: lists of {"role": ..., "content": ...} with at '
    "least one assistant turn."
)


def encode_rows(tokenizer: Any, data: Any, max_length: int) -> list[Row]:
    """Token ids and labels of every row; a chat gives one row per assistant turn.

    Raises:
        InvalidInputError: no rows, or one that cannot be used; names its index.
    """
    if isinstance(data, str | bytes | Mapping) or not isinstance(data, Iterable):
        raise InvalidInputError(f"The training data is a {type(data).__name__}.", hint=_EXPECTED)
    rows: list[Row] = []
    cut = 0
    for index, given in enumerate(data):
        try:
            for ids, first in _encode(tokenizer, given):
                cut += len(ids) > max_length
                rows.append(_labelled(ids, first, max_length))
        except InvalidInputError as error:
            raise InvalidInputError(f"Training row {index}: {error.message}", hint=error.hint) from error
    if not rows:
        raise InvalidInputError("There is nothing to train on.", hint=_EXPECTED)
    if cut:
        logger.warning("%d of %d training rows were cut to %d tokens.", cut, len(rows), max_length)
    return rows


def collate(rows: Sequence[Row], pad_id: int) -> dict[str, Tensor]:
    """One batch, padded on the right to its longest row."""
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(name: str, filler: int) -> Tensor:
        return torch.tensor([row[name] + [filler] * (longest - len(row[name])) for row in rows])

    mask = [[1] * len(row["input_ids"]) + [0] * (longest - len(row["input_ids"])) for row in rows]
    return {
        "input_ids": padded("input_ids", pad_id),
        "labels": padded("labels", IGNORED),
        "attention_mask": torch.tensor(mask),
    }


def pad_token(tokenizer: Any) -> int:
    """An id to pad with; which one does not matter, since padding is masked."""
    return next((int(t) for t in (tokenizer.pad_token_id, tokenizer.eos_token_id) if t is not None), 0)


def _encode(tokenizer: Any, given: Any) -> Iterator[tuple[list[int], int]]:
    """Token ids of each row that `given` makes, with the position of the first token to learn."""
    end = [] if tokenizer.eos_token_id is None else [int(tokenizer.eos_token_id)]
    kind, value = _kind(given)
    if kind == "text":
        yield [*tokenizer(_plain(tokenizer, value, "the text"))["input_ids"], *end], 0
        return
    for history, reply in _turns(value) if kind == "messages" else [(value[0], value[1])]:
        prompt = encode(tokenizer, parse_messages(history))
        answer = tokenizer(_plain(tokenizer, reply, "the reply"), add_special_tokens=False)["input_ids"]
        yield [*prompt, *answer, *end], len(prompt)


def _kind(given: Any) -> tuple[str, Any]:
    if isinstance(given, Mapping):
        forms = {("text",): "text", ("messages",): "messages", ("completion", "prompt"): "pair"}
        kind = forms.get(tuple(sorted(map(str, given))))
        if kind == "pair":
            return kind, (_text(given["prompt"], "the prompt"), given["completion"])
        if kind is not None:
            return kind, given[kind]
        raise InvalidInputError(f"it has the keys {sorted(map(str, given))}.", hint=_EXPECTED)
    if isinstance(given, str):
        return "text", given
    if isinstance(given, Sequence) and not isinstance(given, bytes):
        if len(given) == 2 and all(isinstance(part, str) for part in given):
            return "pair", (_text(given[0], "the prompt"), given[1])
        if given and all(isinstance(part, Mapping | Message) for part in given):
            return "messages", given
    raise InvalidInputError(f"{given!r:.80} is not usable.", hint=_EXPECTED)


def _turns(messages: Any) -> Iterator[tuple[list[Any], str]]:
    """``(history, reply)`` for every assistant turn."""
    if not isinstance(messages, Sequence) or not all(isinstance(m, Mapping | Message) for m in messages):
        raise InvalidInputError(f"{messages!r:.80} is no list of messages.", hint=_EXPECTED)
    turns = [m.model_dump() if isinstance(m, Message) else dict(m) for m in messages]
    replies = [position for position, turn in enumerate(turns) if turn.get("role") == "assistant"]
    if not replies:
        raise InvalidInputError("the chat has no assistant turn.", hint=_EXPECTED)
    for position in replies:
        yield turns[:position], turns[position].get("content", "")


def _plain(tokenizer: Any, value: Any, what: str) -> str:
    """The text with special tokens broken up, as in prompts: no row can end a turn and open another."""
    return defuse(_text(value, what), control_tokens(tokenizer))


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InvalidInputError(f"{what} is a {type(value).__name__}.", hint=_EXPECTED)
    if not value.strip():
        raise InvalidInputError(f"{what} is blank.", hint=_EXPECTED)
    return value


def _labelled(ids: Sequence[int], first: int, max_length: int) -> Row:
    """Cut to `max_length` and mark what to learn; one token of the prompt stays to predict from."""
    start = min(max(len(ids) - max_length, 0), max(first - 1, 0))
    kept = [int(token) for token in ids[start : start + max_length]]
    learn_from = max(first - start, 1)  # nothing predicts the very first token
    if len(kept) <= learn_from:
        raise InvalidInputError("it has a single token, so there is nothing to predict.", hint=_EXPECTED)
    return {"input_ids": kept, "labels": [IGNORED] * learn_from + kept[learn_from:]}
