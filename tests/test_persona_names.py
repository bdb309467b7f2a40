"""Names of personas: what they mean, and that nothing else gets through."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk.adapter_composition import Adjustment
from persona_sdk.errors import InvalidInputError
from persona_sdk.persona_names import NotANameError, PersonaName

IDS = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._@+\-]{0,12}", fullmatch=True)


def quoted(text: str) -> str:
    return text.replace("@", "%40").replace("+", "%2B")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("alice", PersonaName(persona="alice")),
        ("alice+cooks", PersonaName(persona="alice", groups=("cooks",))),
        ("a+b+c", PersonaName(persona="a", groups=("b", "c"))),
        ("alice@weight=0.5", PersonaName(persona="alice", adjust=Adjustment(weight=0.5))),
        (
            "alice@cooks/tone=-1,facts/x=2",
            PersonaName(persona="alice", adjust=Adjustment(weights={"cooks/tone": -1.0, "facts/x": 2.0})),
        ),
        (
            "alice+cooks@concise=0.7,detailed=0.3#0123456789abcdef",
            PersonaName(
                persona="alice",
                groups=("cooks",),
                adjust=Adjustment(preference={"concise": 0.7, "detailed": 0.3}),
                version="0123456789abcdef",
            ),
        ),
        ("a%40example.com", PersonaName(persona="a@example.com")),
        ("a%2Bb", PersonaName(persona="a+b")),
    ],
)
def test_what_names_mean(name, expected):
    assert PersonaName.parse(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *(
            "",
            " ",
            "..",
            "../alice",
            "/etc/passwd",
            "alice/../bob",
            "a\\b",
            "alice\0",
            "alice\n",
            "~",
            ".hidden",
        ),
        *(
            "%2e%2e%2fetc",
            "%2Fetc",
            "%",
            "a%zz",
            "%ff",
            "alice%00",
            "älice",
            "alice bob",
            "x" * 2000,
            "x" * 129,
        ),
        *("+", "alice+", "+cooks", "alice++cooks", "alice+cooks+cooks", "alice+alice"),
        *("@", "alice@", "alice@weight", "alice@weight=", "alice@weight=1,", "alice@=1", "alice@weight=nan"),
        *(
            "alice@weight=1e3",
            "alice@weight=inf",
            "alice@weight=1,weight=1",
            "alice@weight==1",
            "alice@a=1@b=2",
        ),
        *("alice@../x=1", "alice@a/b/../c=1", "alice@a b=1", "alice@weight=+1", "alice@weight=١"),
        *("alice#", "alice#xyz", "alice#0123456789ABCDEF", "alice#0123456789abcdef0", "#0123456789abcdef"),
        *("alice#0123456789abcdef@weight=1", "HuggingFaceTB/SmolLM2-135M-Instruct", "s3://bucket/lora"),
    ],
)
def test_what_is_no_name(name):
    with pytest.raises(NotANameError):
        PersonaName.parse(name)


def test_a_strength_out_of_range_is_said():
    with pytest.raises(InvalidInputError, match=r"'weight' is 50\.0") as caught:
        PersonaName.parse("alice@weight=50")
    assert not isinstance(caught.value, NotANameError)


def test_the_order_of_settings_makes_no_difference():
    assert PersonaName.parse("a@x=1,y=2,weight=3") == PersonaName.parse("a@weight=3,y=2,x=1")


@given(persona=IDS, groups=st.lists(IDS, max_size=3, unique=True), weight=st.integers(-10, 10))
def test_every_id_has_a_name(persona, groups, weight):
    ids = [persona, *(group for group in groups if group != persona)]
    found = PersonaName.parse(f"{'+'.join(map(quoted, ids))}@weight={weight}")
    assert (found.persona, *(found.groups or ())) == tuple(ids)
    assert found.adjust.weight == weight


@given(st.text(max_size=40))
def test_any_text_parses_or_is_refused_by_name(text):
    try:
        found = PersonaName.parse(text)
    except InvalidInputError:
        return
    assert "/" not in found.persona
    assert not found.persona.startswith(".")
