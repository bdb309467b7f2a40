"""Where recalled passages stand in a prompt: right, or not said; the same tokens wherever they stand."""

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.passage_spans import passage_spans
from persona_sdk.prompting import encode, note, parse_messages, with_passages

from .test_prompting import STRICT, lines

TEA, DOGS, TRAIN = "Alice likes tea.", "Bob walks two dogs every morning.", "She reads on the train!"


def spans(tokenizer, passages, *, first=0, said="Hi", system=""):
    own = [{"role": "system", "content": system}] if system.strip() else []
    turns = with_passages(parse_messages([*own, {"role": "user", "content": said}]), passages)
    prompt = encode(tokenizer, turns)
    return prompt, passage_spans(tokenizer, turns, passages, prompt, first=first)


@pytest.fixture(scope="module")
def joining(tiny):
    """A tokenizer that makes one token of a full stop and the line break after it, as many new ones do."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    words = Regex(r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+| ?\p{L}+|\p{N}|\s+")
    bpe = Tokenizer(models.BPE())
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"), bytes_of])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator([f"{TEA}\n{DOGS}\n{TRAIN}\n" * 5], trainer)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe)
    tokenizer.chat_template = tiny.tokenizer.chat_template
    assert len(tokenizer(".\n")["input_ids"]) == 1
    return tokenizer


@pytest.mark.parametrize("which", ["tiny", "joining"])
def test_a_passage_is_the_same_tokens_wherever_it_stands(tiny, joining, which):
    tokenizer = tiny.tokenizer if which == "tiny" else joining
    found = {}
    for order in ((TEA, DOGS, TRAIN), (TRAIN, TEA, DOGS), (DOGS, TRAIN, TEA), (TEA,)):
        prompt, where = spans(tokenizer, order)
        assert len(where) == len(order)
        for passage, (start, stop) in zip(order, where, strict=True):
            # All of the line but its last token.
            text = tokenizer.decode(prompt[start:stop])
            assert note(passage).startswith(text)
            assert len(note(passage)) - len(text) <= 8
            found.setdefault(passage, set()).add(prompt[start:stop])
    assert all(len(tokens) == 1 for tokens in found.values())


@pytest.mark.parametrize("template", ["its own", "strict", None])
@given(
    system=st.just("") | lines,
    pinned=st.lists(lines, max_size=2),
    recalled=st.lists(lines, max_size=3),
    said=lines,
)
def test_spans_are_parts_of_their_lines_in_order(tiny, template, system, pinned, recalled, said):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    tokenizer.chat_template = {"its own": tokenizer.chat_template, "strict": STRICT, None: None}[template]
    passages = [*pinned, *recalled]
    prompt, where = spans(tokenizer, passages, first=len(pinned), said=said, system=system)
    assert len(where) == len(recalled)  # this tokenizer loses nothing
    last = 0
    for passage, (start, stop) in zip(recalled, where, strict=True):
        assert last <= start < stop < len(prompt)
        text = tokenizer.decode(prompt[start:stop]).rstrip("\ufffd")  # cut within a character
        assert note(passage).startswith(text) or "<|" in passage  # control tokens are broken up
        last = stop


def test_nothing_is_said_where_it_cannot_be_told(tiny):
    tokenizer = copy.deepcopy(tiny.tokenizer)
    assert len(spans(tokenizer, [TEA])[1]) == 1
    assert spans(tokenizer, [])[1] == ()
    assert spans(tokenizer, [TEA], first=1)[1] == ()
    turns = with_passages(parse_messages("Hi"), [TEA])
    prompt = encode(tokenizer, turns)
    assert passage_spans(tokenizer, turns, [TEA], (*prompt, 5)) == ()
    assert passage_spans(tokenizer, turns, [DOGS], prompt) == ()

    class Slow:
        is_fast = False

    assert passage_spans(Slow(), turns, [TEA], prompt) == ()
    tokenizer.chat_template = tokenizer.chat_template.replace("m['content']", "m['content'] | upper")
    assert spans(tokenizer, [TEA])[1] == ()
