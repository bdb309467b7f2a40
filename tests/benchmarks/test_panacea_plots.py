"""The figure of the panacea benchmark has a panel for what was measured, and shows what its table holds."""

import numpy as np
import pytest

from benchmarks.harness import Result
from benchmarks.panacea_plots import NAMES, STYLES
from benchmarks.panacea_report import summarise
from benchmarks.plots import PLOTS, png
from tests.benchmarks.panacea_cells import DPO, SFT, cells

REAL = ("panacea", "as published", "rewarded soups", "mixture of the experts", "oracle")


@pytest.fixture(scope="module")
def tables():
    real = cells("sft", names=("brief", "verbose"), vertices=(-40.0, -90.0), kinds=REAL)
    return summarise({"styles": cells("sft"), "pairs": cells("dpo"), "real": real}, 5)[1]


def result(tables, command="python -m benchmarks.panacea"):
    return Result(name="panacea", command=command, commit="0" * 40, machine={}, versions={}, tables=tables)


def panels(figure):
    return [axis.get_title() for axis in figure.axes if axis.get_title()]


@pytest.mark.parametrize(
    ("parts", "count"),
    [((), 0), (("pairs",), 1), (("styles",), 2), (("styles", "pairs"), 3), (("real", "styles", "pairs"), 4)],
)
def test_a_panel_for_each_part(tables, parts, count):
    found = {title: rows for title, rows in tables.items() if title.split(":")[0] in parts}
    figure = PLOTS["panacea"](result(found))
    assert len(panels(figure)) == count
    assert all(axis.has_data() == bool(axis.get_title()) for axis in figure.axes)
    assert png(result(found)) == png(result(found))


def test_a_smoke_run_is_called_one(tables):
    assert (
        "smoke run" in PLOTS["panacea"](result(tables, "python -m benchmarks.panacea --quick")).get_suptitle()
    )
    assert "smoke run" not in PLOTS["panacea"](result(tables)).get_suptitle()


def test_a_front_is_the_curve_of_its_table(tables):
    axis = PLOTS["panacea"](result(tables)).axes[0]
    lines = {line.get_label(): line for line in axis.get_lines()}
    for method in SFT:
        mine = [row for row in tables["styles: fronts"] if row["method"] == method]
        expected = sorted((row["λ concise"], row["concise"], row["formal"]) for row in mine)
        assert np.allclose(lines[NAMES.get(method, method)].get_xydata(), [row[1:] for row in expected])


def test_the_reference_point_is_in_view_and_so_is_panacea(tables):
    low = [{**row, "reference": row["reference"] + 2.9} for row in tables["styles: reference point"]]
    for rows in (tables["styles: reference point"], low):
        axis = PLOTS["panacea"](result({**tables, "styles: reference point": rows})).axes[0]
        shown = [
            row for row in tables["styles: fronts"] if row["method"] == "panacea" and 0 < row["λ concise"] < 1
        ]
        for limits, name, row in zip(
            (axis.get_xlim(), axis.get_ylim()), ("concise", "formal"), rows, strict=True
        ):
            assert limits[0] < row["reference"] < limits[1]
            assert all(limits[0] < point[name] < limits[1] for point in shown)


def test_a_method_that_is_out_of_view_is_named(tables):
    rows = [
        {**row, "concise": -90.0} if row["method"] == "one per vector" else row
        for row in tables["styles: fronts"]
    ]
    for shown, missing in ((tables["styles: fronts"], False), (rows, True)):
        axis = PLOTS["panacea"](result({**tables, "styles: fronts": shown})).axes[0]
        named = "outside: one adapter for each λ" in [text.get_text() for text in axis.texts]
        drawn = "one adapter for each λ" in axis.get_legend_handles_labels()[1]
        assert (named, drawn) == (missing, not missing)


def test_margins_stand_against_their_logits(tables):
    figure = PLOTS["panacea"](result(tables))
    axis = figure.axes[panels(figure).index("Opposite labels (DPO): margin of a pair")]
    (line,) = (line for line in axis.get_lines() if line.get_label() == NAMES["panacea"])
    x, y = line.get_xydata().T
    assert len(x) == 8
    assert np.allclose(y, 1.1 * x, atol=1e-3)
    (band,) = (each for each in axis.collections if each.get_label() == "within 25 %")
    x, y = band.get_paths()[0].vertices.T
    slopes = np.abs(y[x != 0] / x[x != 0])
    assert set(slopes.round(6)) == {0.75, 1.25}


def test_methods_differ_in_colour_and_marker():
    drawn = [STYLES[method] for method in STYLES]
    assert len({colour for colour, _, _ in drawn}) == len(drawn)
    assert len({(marker, line) for _, marker, line in drawn}) == len(drawn)
    assert {*SFT, *DPO} == set(STYLES)
