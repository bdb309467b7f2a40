"""Which tokens of a prompt are which recalled passages: what an engine needs to reuse their keys and values.

    text     ...notes):\n- pinned\n- first recalled\n- second recalled<|im_end|>...
    tokens               | head  |[- first recall] ed \n [- second recall] ed | ...

A tokenizer may join characters across the border of a line: a full stop and the line break, often. So a
block is the tokens that begin inside the line, without the last of them; these are the same tokens
wherever the line stands. Nothing rests on a span being right but the time it saves: any part of a prompt
may be a block.
"""

from collections.abc import Sequence
from typing import Any, TypeAlias

from persona_sdk.prompting import Message, control_tokens, defuse, note, rendered

Span: TypeAlias = tuple[int, int]


def passage_spans(
    tokenizer: Any,
    turns: Sequence[Message],
    passages: Sequence[str],
    prompt: Sequence[int],
    *,
    first: int = 0,
) -> tuple[Span, ...]:
    """``(start, stop)`` of the passages from number `first` on, in tokens of the prompt.

    Empty if that cannot be told for sure: a tokenizer that does not say where tokens come from, or says so
    of other tokens than the prompt's; a chat template that changes the text.

    Args:
        tokenizer: of the base model.
        turns: the conversation, passages included.
        passages: all of them, in order.
        prompt: what `encode` gave for these turns.
        first: those before are none of interest: they always stand at the same place.
    """
    if len(passages) <= first or not getattr(tokenizer, "is_fast", False):
        return ()
    text = rendered(tokenizer, turns)
    templated = bool(getattr(tokenizer, "chat_template", None))
    coded = tokenizer(text, add_special_tokens=not templated, return_offsets_mapping=True)
    control = control_tokens(tokenizer)
    lines = [defuse(note(passage), control) for passage in passages]
    at = text.find("\n".join(lines))
    if at < 0 or tuple(coded["input_ids"]) != tuple(prompt):
        return ()
    offsets, spans = coded["offset_mapping"], []
    for number, line in enumerate(lines):
        stop = at + len(line)
        inside = [i for i, (begin, end) in enumerate(offsets) if at <= begin < min(end, stop)]
        if number >= first and len(inside) > 1:
            spans.append((inside[0], inside[-1]))
        at = stop + 1
    borders = [border for span in spans for border in span]
    return tuple(spans) if borders == sorted(borders) else ()
