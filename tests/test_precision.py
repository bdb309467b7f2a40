"""Which precision "fastest" is: what was measured, once, and anew when the kept file is damaged."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from persona_sdk import PersonaModel, doctor, precision
from persona_sdk.devices import pick_dtype
from persona_sdk.errors import InvalidInputError
from persona_sdk.models import LanguageModel
from persona_sdk.precision import PhaseSeconds, PrecisionTimes
from persona_sdk.testing import tiny_language_model

from .support import FAST, lora

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SLOWER = PrecisionTimes(PhaseSeconds(1.0, 1.0), PhaseSeconds(2.0, 2.0))
FASTER = PrecisionTimes(PhaseSeconds(2.0, 4.0), PhaseSeconds(1.0, 1.0))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PERSONA_CACHE", str(tmp_path / "cache"))
    precision._times.cache_clear()
    yield tmp_path / "cache" / "precision"
    precision._times.cache_clear()


def measuring(monkeypatch, found):
    """Let the machine be measured as `found`; the list grows by one with every measurement."""
    calls = []
    monkeypatch.setattr(precision, "measured", lambda: calls.append(found) or found)
    return calls


@pytest.mark.parametrize(("found", "expected"), [(SLOWER, torch.float32), (FASTER, torch.bfloat16)])
def test_the_choice_is_what_was_measured_and_is_measured_once(monkeypatch, cache, found, expected):
    calls = measuring(monkeypatch, found)
    assert [pick_dtype("fastest", CPU) for _ in range(3)] == [expected] * 3
    precision._times.cache_clear()  # another process
    assert pick_dtype("fastest", CPU) == expected
    assert len(calls) == 1
    assert len(list(cache.iterdir())) == 1


times = st.floats(1e-6, 1e3)


@given(times, times, times, times)
def test_both_phases_count_by_their_ratio_and_bfloat16_must_be_worth_it(a, b, c, d):
    found = PrecisionTimes(PhaseSeconds(a, b), PhaseSeconds(c, d))
    assert found.speed_up**2 == pytest.approx((a / c) * (b / d))
    assert (found.fastest == torch.bfloat16) == (found.speed_up >= 1.1)
    assert PrecisionTimes.from_data(json.loads(json.dumps(found.to_data()))) == found


def test_equal_times_leave_the_exact_one():
    same = PhaseSeconds(1.0, 1.0)
    assert PrecisionTimes(same, same).fastest == torch.float32


def test_other_devices_and_names_need_no_measurement(monkeypatch):
    calls = measuring(monkeypatch, FASTER)
    assert pick_dtype("auto", CPU) == torch.float32
    assert pick_dtype("auto", CUDA) == pick_dtype("fastest", CUDA) == torch.bfloat16
    assert pick_dtype("float16", CPU) == torch.float16
    assert not calls


@pytest.mark.parametrize("name", ["", "int8", "float8_e4m3fn", "slowest", "nn", "Fastest"])
def test_what_is_no_precision_is_refused_with_the_names_that_are(name):
    with pytest.raises(InvalidInputError, match="is no precision") as caught:
        pick_dtype(name, CPU)
    assert "'fastest'" in caught.value.hint


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: b"\xff\xfe{",
        lambda data: b"[]",
        lambda data: json.dumps(data).encode()[:-9],
        lambda data: json.dumps({**data, "machine": {**data["machine"], "torch": "0"}}).encode(),
        lambda data: json.dumps({**data, "float32": {"step": 1.0}}).encode(),
        lambda data: json.dumps({**data, "float32": {"step": 1.0, "prompt": 0.0}}).encode(),
        lambda data: json.dumps({**data, "float32": {"step": 1.0, "prompt": "1"}}).encode(),
        lambda data: json.dumps({**data, "bfloat16": {"step": float("inf"), "prompt": 1.0}}).encode(),
        lambda data: json.dumps({**data, "bfloat16": None}).encode(),
    ],
)
def test_a_damaged_or_foreign_file_is_measured_anew(monkeypatch, cache, damage):
    measuring(monkeypatch, FASTER)
    assert pick_dtype("fastest", CPU) == torch.bfloat16
    (file,) = cache.iterdir()
    file.write_bytes(damage(json.loads(file.read_text())))
    precision._times.cache_clear()
    calls = measuring(monkeypatch, SLOWER)
    assert pick_dtype("fastest", CPU) == torch.float32
    precision._times.cache_clear()
    assert pick_dtype("fastest", CPU) == torch.float32
    assert len(calls) == 1


def test_without_a_place_to_write_it_is_measured_once_a_process(monkeypatch, cache):
    cache.parent.write_text("a file where the folder should be")
    calls = measuring(monkeypatch, FASTER)
    assert pick_dtype("fastest", CPU) == pick_dtype("fastest", CPU) == torch.bfloat16
    assert len(calls) == 1


def test_this_machine_can_be_measured():
    found = precision.measured()
    assert PrecisionTimes.from_data(found.to_data()) == found
    assert found.fastest in (torch.float32, torch.bfloat16)


def test_the_doctor_tells_what_was_measured_and_measures_nothing(monkeypatch):
    calls = measuring(monkeypatch, FASTER)
    assert "times as fast" not in doctor._device().detail
    assert not calls
    pick_dtype("fastest", CPU)
    if not torch.cuda.is_available():
        assert "bfloat16 2.8 times as fast" in doctor._device().detail


@pytest.mark.parametrize(("found", "name"), [(SLOWER, "float32"), (FASTER, "bfloat16")])
def test_a_model_loads_in_the_fastest_precision_with_the_same_fingerprint(monkeypatch, tmp_path, found, name):
    measuring(monkeypatch, found)
    tiny = tiny_language_model()
    for part in (tiny.module, tiny.tokenizer):
        part.save_pretrained(tmp_path / "model")
    loaded = LanguageModel.from_pretrained(str(tmp_path / "model"), device="cpu", dtype="fastest")
    assert loaded.precision == name
    assert loaded.fingerprint == tiny.fingerprint
    with PersonaModel.from_pretrained(loaded, store=tmp_path / "store") as model:
        ada = model.persona("ada")
        reply = ada.chat("Hello", max_new_tokens=2)
        assert reply.precision == name
        assert ("precision", name) in ada.explain(reply).rows()


@pytest.mark.parametrize("asked", [{"dtype": "fastest"}, {"dtype": "float32"}, {"device": "cpu"}])
def test_a_model_that_is_loaded_already_is_not_asked_to_be_otherwise(tmp_path, asked):
    with pytest.raises(InvalidInputError, match="is loaded already, as float32 on cpu"):
        PersonaModel.from_pretrained(tiny_language_model(), store=tmp_path / "store", **asked)
    assert not (tmp_path / "store").exists()


def test_a_reply_says_in_which_precision_its_adapters_were_read(tmp_path, tiny, hash_embedder):
    options = {"store": tmp_path, "embedder": hash_embedder}
    said = {}
    for asked in ("auto", "bfloat16"):
        engine = {"branch_precision": asked}
        with PersonaModel.from_pretrained(tiny, **options, engine=engine) as model:
            alice = model.persona("alice")
            if not alice.attachments():
                alice.add_adapter("tone", lora(model, 1))
                alice.attach("alice/tone")
            reply = alice.chat("Hi", **FAST)
            said[reply.branch_precision] = dict(alice.explain(reply).rows())["precision"]
    assert said == {"float32": "float32", "bfloat16": "float32, adapters in bfloat16"}
