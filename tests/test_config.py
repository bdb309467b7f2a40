"""Options are closed and typed; ids are validated; errors carry code, hint and retryable."""

import inspect

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk import errors
from persona_sdk.config import GenerationOptions, validate_id
from persona_sdk.errors import InvalidInputError


@pytest.mark.parametrize(
    "options",
    [
        {"max_tokens": 5},
        {"max_new_tokens": 0},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"stop_strings": ("",)},
    ],
)
def test_bad_options_name_the_option(options):
    with pytest.raises(InvalidInputError, match=next(iter(options))) as caught:
        GenerationOptions.parse(options)
    assert "max_new_tokens" in caught.value.hint


def test_options_are_frozen_and_hashable():
    options = GenerationOptions()
    assert hash(options) == hash(GenerationOptions.parse({}))
    with pytest.raises(ValueError, match="frozen"):
        options.top_k = 3


@pytest.mark.parametrize("good", ["a", "alice", "Bob-7", "team.nurses", "a@b.c", "x" * 128, "0"])
def test_good_ids(good):
    assert validate_id(good) == good


@pytest.mark.parametrize(
    "bad",
    [
        "",
        " ",
        "a b",
        "a/b",
        "a\\b",
        "..",
        ".",
        "../x",
        "a\0b",
        "a\n",
        "\ta",
        "x" * 129,
        "-a",
        "é",
        "a:b",
        "%2e",
    ],
)
def test_bad_ids(bad):
    with pytest.raises(InvalidInputError) as caught:
        validate_id(bad)
    assert caught.value.code == "invalid_input"
    assert "128" in caught.value.hint
    assert len(caught.value.message) < 200


@given(st.text(max_size=200))
def test_an_accepted_id_is_a_safe_name(text):
    try:
        value = validate_id(text)
    except InvalidInputError:
        return
    assert value == text
    assert not set(value) & set('/\\\0 \n\t:*?"<>|')
    assert value not in (".", "..")


def test_every_error_has_its_own_code_and_says_whether_to_retry():
    classes = [
        c for _, c in inspect.getmembers(errors, inspect.isclass) if issubclass(c, errors.PersonaError)
    ]
    codes = [c.code for c in classes]
    assert len(classes) > 10
    assert len(set(codes)) == len(codes)
    assert all(isinstance(c.retryable, bool) and c.__doc__ for c in classes)
    error = errors.StoreFullError("Disk full.", hint="Free some space.", bytes_needed=5)
    assert (str(error), error.retryable, error.context) == (
        "Disk full. Free some space.",
        True,
        {"bytes_needed": 5},
    )
