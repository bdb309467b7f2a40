"""The report is generated from results alone, and a miss is as visible as a hit."""

import json

import pytest
from pydantic import ValidationError

from benchmarks import harness, report
from benchmarks.harness import Bar, Result


@pytest.fixture
def result() -> Result:
    point = {"model": "tiny", "step": "decode 32x1", "distinct": 32}
    ratio = {"low": 1.2, "high": 1.6, "of minima": 1.4, "iterations": 31}
    return Result(
        name="compose",
        command="python -m benchmarks.compose --json compose.json",
        commit="f" * 40,
        machine={"cpu": "some", "cores": 2, "threads": 1},
        versions={"python": "3.11"},
        bars={
            "cheap": Bar.of(1.4, "<=", 1.6, interval=(1.2, 1.6)),
            "faster": Bar.of(2.4, ">=", 3.0, interval=(2.1, 2.9)),
        },
        tables={
            "ratios": [
                {**point, "pair": f"{name} / base", "ratio": 1.4, **ratio} for name in ("ours", "peft")
            ],
            "floors": [{**point, "flops": 1.1, "bytes": 2.2, "roofline": 1.2}],
            "empty": [],
        },
        notes=["A note | with a bar."],
    )


def test_a_miss_is_shown_as_a_miss_beside_the_hits(result):
    text = report.markdown([result])
    assert "2 bars, 1 hit, 1 missed." in text
    assert "| compose | `cheap` | 1.40 | 1.20 to 1.60 | <= 1.60 | **hit** |" in text
    assert "| compose | `faster` | 2.40 | 2.10 to 2.90 | >= 3.00 | **MISS** |" in text
    summary = text.index("`faster`"), text.index("## compose")
    assert summary[0] < summary[1]  # in the overview, not only further down


def test_tables_and_notes_are_all_there(result):
    text = report.markdown([result])
    assert "### ratios" in text
    assert "| tiny | decode 32x1 | 32 | ours / base | 1.40 | 1.20 | 1.60 | 1.40 | 31 |" in text
    assert "- A note | with a bar." in text
    assert "### empty" not in text
    assert "smoke run" not in text


def test_a_smoke_run_is_called_one(result):
    quick = result.model_copy(update={"command": "python -m benchmarks.compose --quick"})
    assert "smoke run" in report.markdown([quick])


def test_generation_writes_report_and_plot_and_repeats_itself(tmp_path, result):
    results, docs = tmp_path / "results", tmp_path / "docs"
    harness.write(result, results / "compose.json")
    harness.write(result.model_copy(update={"name": "prefix_reuse"}), results / "prefix_reuse.json")
    assert report.main(["--results", str(results), "--docs", str(docs)]) == 0
    first = (docs / "results.md").read_bytes(), (docs / "img" / "compose.png").read_bytes()
    text = first[0].decode()
    assert "![compose](img/compose.png)" in text
    assert "## prefix_reuse" in text
    assert "img/prefix_reuse.png" not in text  # it has no plot
    assert first[1].startswith(b"\x89PNG")
    report.generate(results, docs)
    assert ((docs / "results.md").read_bytes(), (docs / "img" / "compose.png").read_bytes()) == first


def test_a_result_that_lies_stops_the_report(tmp_path, result):
    path = tmp_path / "results" / "compose.json"
    harness.write(result, path)
    data = json.loads(path.read_text())
    data["bars"]["faster"]["ok"] = True
    path.write_text(json.dumps(data))
    with pytest.raises(ValidationError):
        report.generate(path.parent, tmp_path / "docs")


def test_no_results_is_said(tmp_path):
    (tmp_path / "results").mkdir()
    assert (
        "No benchmark has been run in full yet."
        in report.generate(tmp_path / "results", tmp_path).read_text()
    )
