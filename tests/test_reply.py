"""Streams of text: nothing is shown that later tokens could change."""

from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.reply import TextDecoder


def pieces(decoder: TextDecoder, tokens: list[int]) -> list[str]:
    shown = [""]
    for n in range(1, len(tokens) + 1):
        settled = decoder.settled(tokens[:n])
        assert settled.startswith(shown[-1])
        shown.append(settled)
    return shown


@given(st.text(alphabet="aé€😀\n x", max_size=20))
def test_characters_of_several_tokens_are_never_shown_in_part(tiny, text):
    tokens = tiny.tokenizer(text)["input_ids"]
    decoder = TextDecoder(tiny.tokenizer)
    assert all("\ufffd" not in piece for piece in pieces(decoder, tokens))
    assert decoder.text(tokens) == text


@given(st.text(alphabet="abEND.", max_size=20))
def test_a_stop_string_and_its_beginning_are_never_shown(tiny, text):
    tokens = tiny.tokenizer(text)["input_ids"]
    decoder = TextDecoder(tiny.tokenizer, ("END", "b."))
    final = decoder.text(tokens)
    assert "END" not in final
    assert "b." not in final
    assert decoder.stopped(tokens) == ("END" in text or "b." in text)
    for piece in pieces(decoder, tokens):
        assert final.startswith(piece)
