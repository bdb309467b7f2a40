"""``persona pareto`` through typer's runner, on the tiny model: numbers, files, and what is refused."""

import gzip
import hashlib
import io
import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

from persona_sdk import LoRA, PersonaModel, cli_pareto
from persona_sdk.adapters import Panacea, fronts
from persona_sdk.adapters.pareto import evaluate
from persona_sdk.adapters.preferences import grid
from persona_sdk.errors import (
    AdapterError,
    IncompatibleAdapterError,
    InvalidInputError,
    NotFoundError,
)
from persona_sdk.preference_files import read
from persona_sdk.testing import HashEmbedder, tiny_language_model

from .test_cli import run

NAMES = ("concise", "detailed", "formal", "warm", "expert", "plain", "odd", "terse", "merry", "calm")
PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny) -> str:
    folder = tmp_path_factory.mktemp("model")
    tiny.module.save_pretrained(folder)
    tiny.tokenizer.save_pretrained(folder)
    return str(folder)


def adapter(model, m: int, **options) -> Panacea:
    options = {"dimensions": NAMES[:m], "rank": 2, "alpha": 4.0, **options}
    return Panacea.random(model, options, std=0.3)


def replies(m: int) -> list[dict[str, str]]:
    return [
        {"dimension": name, "prompt": f"Are you {name}?", "completion": f"{name} it is."}
        for name in NAMES[:m]
    ]


def pairs(m: int) -> list[dict[str, str]]:
    return [{"dimension": name, "prompt": "Hm?", "chosen": name, "rejected": "No."} for name in NAMES[:m]]


def labelled(m: int) -> list[dict[str, object]]:
    better = {name: place % 2 for place, name in enumerate(NAMES[: m + 1])}  # also one nobody asks for
    return [{"prompt": "Hm?", "response_0": "Yes.", "response_1": "No, no.", "better": better, "id": 7}]


def file_of(folder, rows) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sha256(path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


@pytest.mark.parametrize("m", [2, 3, 5, 10])
def test_the_json_is_what_evaluate_and_score_say(tmp_path, tiny, saved, m):
    folder, made, path = tmp_path / "adapter", adapter(tiny, m), file_of(tmp_path, replies(m))
    made.save_pretrained(folder)
    out, picture = tmp_path / "front.json", tmp_path / "front.png"
    fewer = ("--divisions", "1") if m == 10 else ()
    common = ("--data", path, "--model", saved, *fewer)
    shown = run("pareto", str(folder), *common, "--json", str(out), "--plot", str(picture))

    found = json.loads(out.read_text())
    data = {row.pop("dimension"): [row] for row in replies(m)}
    expected = evaluate(tiny, made, data, grid(m, 1 if fewer else None))
    front = fronts.Front(NAMES[:m], expected.preferences, expected.values)
    base = expected.base.double()
    assert found["names"] == list(NAMES[:m])
    assert found["preferences"] == front.preferences.tolist()
    assert found["values"] == front.values.tolist()
    assert found["base"] == base.tolist()
    assert found["reference"] == (2 * base).tolist()  # log-likelihoods, here below -1
    assert found["reference_rule"] == "base - max(|base|, 1)"
    assert found["scores"] == json.loads(json.dumps(fronts.score(front, 2 * base).as_dict()))
    assert fronts.Front.from_dict(found).values.equal(front.values)
    assert (found["digest"], found["model"]["fingerprint"]) == (made.digest, tiny.fingerprint)
    assert found["objective"] == "sft"
    assert found["data"] == {"sha256": sha256(path), "rows": m}
    assert {"persona-sdk", "torch", "moocore"} <= set(found["versions"])
    assert picture.read_bytes().startswith(PNG)
    for name, value in zip(NAMES, found["values"][0], strict=False):
        assert name in shown
        assert f"{value:.4g}" in shown
    assert "hypervolume" in shown
    assert "base - max(|base|, 1)" in shown


@pytest.mark.parametrize("rows", [pairs, labelled])
def test_pairs_of_both_forms_also_compressed(tmp_path, tiny, saved, rows):
    made = adapter(tiny, 3, objective="dpo")
    made.save_pretrained(tmp_path / "adapter")
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress("\n\n".join(map(json.dumps, rows(3))).encode()))
    out = tmp_path / "front.json"
    run("pareto", str(tmp_path / "adapter"), "--data", str(path), "--model", saved, "--json", str(out))
    found = json.loads(out.read_text())
    data = rows(3) if rows is labelled else {row.pop("dimension"): [row] for row in rows(3)}
    assert found["values"] == evaluate(tiny, made, data).values.double().tolist()
    assert found["base"] == pytest.approx([-0.6931472] * 3)
    assert found["data"]["sha256"] == sha256(path)


def test_adapters_of_a_store_are_compared_on_one_grid_and_reference(tmp_path, tiny, saved):
    first, second = adapter(tiny, 2), adapter(tiny, 2, seed=1)
    with PersonaModel.from_pretrained(tiny, store=tmp_path / "store", embedder=HashEmbedder()) as model:
        model.adapters.add("nurses/tone", first)
        model.adapters.add("tone", second)
    out, picture = tmp_path / "front.json", tmp_path / "front.png"
    picture.write_bytes(b"an older picture")
    data = ("--data", file_of(tmp_path, replies(2)), "--model", saved, "--store", str(tmp_path / "store"))
    options = ("--points", "6", "--json", str(out), "--plot", str(picture))
    shown = run("pareto", "nurses/tone", *data, *options, "--compare", "tone")
    found = json.loads(out.read_text())
    (other,) = found["compared"]
    assert (found["adapter"], other["adapter"]) == ("nurses/tone", "tone")
    assert (found["digest"], other["digest"]) == (first.digest, second.digest)
    assert len(found["preferences"]) == len(other["values"]) == 6
    assert found["values"] != other["values"]
    assert found["scores"]["reference"] == other["scores"]["reference"] == found["reference"]
    assert "nurses/tone" in shown
    assert picture.read_bytes().startswith(PNG)
    assert {path.name for path in tmp_path.iterdir()} == {"store", "rows.jsonl", "front.json", "front.png"}


def test_a_reference_that_points_do_not_exceed_is_warned_of(tmp_path, tiny, saved):
    adapter(tiny, 2).save_pretrained(tmp_path / "adapter")
    common = ("pareto", str(tmp_path / "adapter"), "--data", file_of(tmp_path, replies(2)), "--model", saved)
    out = tmp_path / "front.json"
    shown = run(*common, "--reference", "detailed=0, concise=-1e3", "--json", str(out))
    found = json.loads(out.read_text())
    assert found["reference"] == [-1000.0, 0.0]
    assert found["reference_rule"] == "given"
    assert found["scores"]["hypervolume"] == 0
    assert "11 of 11 points do not exceed the reference" in shown
    assert "measuring" not in shown  # the bar is for terminals
    assert "do not exceed" not in run(*common, "--reference", "detailed=-1e3,concise=-1e3")
    for text in ("concise=1", "concise=1,detailed=nan", "concise=1,concise=1", "warm=1,concise=1", "concise"):
        with pytest.raises(InvalidInputError, match="reference"):
            run(*common, "--reference", text)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b"{", "is no JSON"),
        (b"\xff", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"[]", "is a list"),
        (b'{"dimension": "concise", "prompt": "Hm?"}', "completion: Field required"),
        (b'{"dimension": "concise", "prompt": "Hm?", "completion": " "}', "completion"),
        (b'{"dimension": "concise", "prompt": 5, "completion": "Yes."}', "prompt"),
        (b'{"dimension": "warm", "prompt": "Hm?", "completion": "Yes."}', "'warm' is no dimension"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, said):
    path = tmp_path / "rows.jsonl"
    good = [json.dumps(row).encode() for row in replies(2)]
    path.write_bytes(b"\n".join([*good, b"", line]))
    with pytest.raises(InvalidInputError, match=r"rows\.jsonl, line 4") as error:
        read(path, NAMES[:2], "sft")
    assert said in str(error.value)


@pytest.mark.parametrize("winner", [True, 2, "1", None, 0.5])
def test_a_winner_is_0_or_1(tmp_path, winner):
    row = {**labelled(1)[0], "better": {"concise": winner}}
    with pytest.raises(InvalidInputError, match=r"line 1: better\.concise"):
        read(tmp_path / file_of(tmp_path, [row]), NAMES[:1], "dpo")


def test_a_separator_inside_of_a_text_is_no_new_line(tmp_path):
    text = "One\u2028two\x85three."
    path = tmp_path / "rows.jsonl"
    row = {"dimension": "concise", "prompt": "Hm?", "completion": text}
    path.write_text(json.dumps(row, ensure_ascii=False), "utf-8")
    assert read(path, NAMES[:1], "sft").data == {"concise": [{"prompt": "Hm?", "completion": text}]}


def test_files_that_are_absent_damaged_or_incomplete(tmp_path):
    with pytest.raises(NotFoundError, match="no file"):
        read(tmp_path / "typo.jsonl", NAMES[:2], "sft")
    with pytest.raises(InvalidInputError, match="cannot be read"):
        read(tmp_path, NAMES[:2], "sft")
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes(gzip.compress(b"{}" * 99)[:-9])
    with pytest.raises(InvalidInputError, match="damaged"):
        read(cut, NAMES[:2], "sft")
    with pytest.raises(InvalidInputError, match="no row for formal"):
        read(tmp_path / file_of(tmp_path, replies(2)), NAMES[:3], "sft")


def test_a_terminal_sees_how_far_it_is(tmp_path, tiny, saved, monkeypatch):
    adapter(tiny, 2).save_pretrained(tmp_path / "adapter")
    terminal = Console(file=io.StringIO(), force_terminal=True, width=100)
    monkeypatch.setattr(cli_pareto, "errors", terminal)
    run("pareto", str(tmp_path / "adapter"), "--data", file_of(tmp_path, replies(2)), "--model", saved)
    assert "measuring" in terminal.file.getvalue()
    assert "11/11" in terminal.file.getvalue()


def test_what_has_no_front_here_is_refused(tmp_path, tiny, saved):
    def pareto(name: str, *more: str):
        data = ("--data", file_of(tmp_path, replies(2)), "--model", saved, "--store", str(tmp_path / "store"))
        return run("pareto", str(tmp_path / name) if "/" not in name else name, *data, *more)

    LoRA.random(tiny, {"rank": 2}).save_pretrained(tmp_path / "lora")
    adapter(tiny_language_model(seed=1), 2).save_pretrained(tmp_path / "foreign")
    adapter(tiny, 2, objective="reward").save_pretrained(tmp_path / "rewarded")
    adapter(tiny, 2).save_pretrained(tmp_path / "good")
    adapter(tiny, 2, max_length=64).save_pretrained(tmp_path / "shorter")
    with pytest.raises(IncompatibleAdapterError, match="not 'panacea'"):
        pareto("lora")
    with pytest.raises(IncompatibleAdapterError, match="made for base model"):
        pareto("foreign")
    with pytest.raises(InvalidInputError, match="rewards"):
        pareto("rewarded")
    with pytest.raises(InvalidInputError, match="max_length=512"):
        pareto("good", "--compare", str(tmp_path / "shorter"))
    with pytest.raises(NotFoundError, match=r"is no folder\. There is no store"):
        pareto("nurses/tone")
    with PersonaModel.from_pretrained(tiny, store=tmp_path / "store", embedder=HashEmbedder()) as model:
        model.adapters.add("nurses/voice", LoRA.random(tiny, {"rank": 2}))
    with pytest.raises(NotFoundError, match=r"is no folder\. There is no adapter"):
        pareto("nurses/tone")
    with pytest.raises(IncompatibleAdapterError, match="'lora', which has no preference"):
        pareto("nurses/voice")


def test_grids_that_would_not_end_are_refused(tmp_path, tiny, saved):
    adapter(tiny, 10).save_pretrained(tmp_path / "adapter")
    common = ("pareto", str(tmp_path / "adapter"), "--data", file_of(tmp_path, replies(10)), "--model", saved)
    with pytest.raises(InvalidInputError, match="92,378 points"):
        run(*common, "--divisions", "10")
    with pytest.raises(InvalidInputError, match="at most 9 points"):
        run(*common, "--points", "9")
    with pytest.raises(InvalidInputError, match="Both"):
        run(*common, "--points", "10", "--divisions", "1")


@pytest.mark.parametrize("option", ["--json", "--plot"])
@pytest.mark.parametrize("target", ["nowhere/front", "folder", "rows.jsonl/front"])
def test_a_target_that_cannot_be_written_is_known_before_the_model_is_loaded(tmp_path, option, target):
    (tmp_path / "folder").mkdir()
    before = file_of(tmp_path, replies(2))
    with pytest.raises(InvalidInputError, match="cannot be written"):
        run("pareto", "x", "--data", before, "--model", "no-such-model", option, str(tmp_path / target))
    assert {path.name for path in tmp_path.rglob("*")} == {"folder", "rows.jsonl"}


def test_one_file_cannot_be_both(tmp_path):
    both = ("--json", str(tmp_path / "x"), "--plot", str(tmp_path / "x"))
    with pytest.raises(InvalidInputError, match="a file of its own"):
        run("pareto", "x", "--data", "rows.jsonl", *both)


@pytest.mark.skipif(sys.platform == "win32", reason="needs a limit on the size of files")
def test_a_full_disk_leaves_both_files_as_they_were(tmp_path, tiny, saved):
    """The limit lies between the sizes of the two files: the first is written when the second fails."""
    adapter(tiny, 2).save_pretrained(tmp_path / "adapter")
    out, picture = tmp_path / "front.json", tmp_path / "front.png"
    out.write_text("old")
    picture.write_bytes(b"old")
    arguments = [
        "pareto",
        str(tmp_path / "adapter"),
        "--data",
        file_of(tmp_path, replies(2)),
        "--model",
        saved,
    ]
    done = subprocess.run(
        [sys.executable, "-m", "persona_sdk.cli", *arguments, "--json", str(out), "--plot", str(picture)],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "numba"), "MPLCONFIGDIR": str(tmp_path)},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)),
    )
    assert done.returncode == 1, done.stderr
    assert "adapter_error" in done.stderr
    assert "could not be written" in done.stderr.replace("\n", " ")
    assert "Traceback" not in done.stderr
    assert (out.read_text(), picture.read_bytes()) == ("old", b"old")
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".tmp"]


def test_a_model_without_the_packages_says_so_before_it_measures(tmp_path, tiny, saved, monkeypatch):
    adapter(tiny, 2).save_pretrained(tmp_path / "adapter")
    common = ("pareto", str(tmp_path / "adapter"), "--data", file_of(tmp_path, replies(2)), "--model", saved)

    def measured(*_, **__):
        pytest.fail("measured before what follows was known to work")

    monkeypatch.setattr("persona_sdk.pareto_report.evaluate", measured)
    for package, more in (("moocore", ()), ("matplotlib.figure", ("--plot", str(tmp_path / "front.png")))):
        with monkeypatch.context() as patched:
            patched.setitem(sys.modules, package, None)
            with pytest.raises(AdapterError, match=package.partition(".")[0]):
                run(*common, *more)
