"""Bars of the panacea benchmark on made cells: what must hit hits, and what must miss misses."""

import json

import numpy as np
import pytest

from benchmarks import harness, report
from benchmarks.harness import Result
from benchmarks.panacea import PARTS, SMOKE
from benchmarks.panacea_measured import Measured
from benchmarks.panacea_report import bars_of, control, summarise
from tests.benchmarks.panacea_cells import PROMPTS, cells, logits

DRAWS = 30
RANK = "least Spearman correlation of λ_i and objective i"
OVER_SOUPS = "hypervolume less that of rewarded soups, lower end"
OVER_ORACLE = "hypervolume over that of the better mixture of experts"
MARGIN = "largest relative error of the mean margin against logit λ"
STILL = "control: widest range of an objective over λ with s at 0, nats"


def bars(objective, **more):
    part = Measured("part", cells(objective, **more), DRAWS)
    return {**bars_of(part, "panacea"), **control(part)}


def moved(by):
    return lambda preferences, front, seed: front + by


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_what_is_near_the_closed_form_reaches_every_bar(objective):
    found = bars(objective, seeds=2)
    assert set(found) == {RANK, OVER_SOUPS, STILL, OVER_ORACLE if objective == "sft" else MARGIN}
    assert [name for name, bar in found.items() if not bar.ok] == []


def test_one_seed_and_dimension_out_of_order_misses():
    def turned(preferences, front, seed):
        return np.stack([front[:, 0], front[::-1, 1]], axis=1) if seed == 1 else front

    found = bars("sft", seeds=2, changes={"panacea": turned})[RANK]
    assert found.value == pytest.approx(-1)
    assert not found.ok


def test_equal_to_the_soups_is_not_above_them():
    (cell,) = cells("sft")
    cell["methods"]["rewarded soups"] = cell["methods"]["panacea"]
    found = bars_of(Measured("part", [cell], DRAWS), "panacea")[OVER_SOUPS]
    assert (found.value, found.ok) == (0, False)


def test_two_methods_without_any_hypervolume_miss():
    below = {name: moved(-20.0) for name in ("panacea", "rewarded soups")}
    found = bars("sft", changes=below)
    assert (found[OVER_SOUPS].value, found[OVER_SOUPS].ok) == (0, False)
    assert (found[OVER_ORACLE].value, found[OVER_ORACLE].ok) == (0, False)


def test_below_the_soups_misses():
    found = bars("sft", changes={"panacea": moved(-1.5)})[OVER_SOUPS]
    assert found.value < 0
    assert found.interval[0] == found.value < found.interval[1]
    assert not found.ok


def test_a_method_that_ignores_lambda_misses_the_oracles_bar():
    def blind(preferences, front, seed):
        return np.full_like(front, -np.log(2))

    found = bars("sft", changes={"panacea": blind})
    assert found[OVER_ORACLE].value == pytest.approx(0.74, abs=0.01)
    assert not found[OVER_ORACLE].ok
    assert not found[RANK].ok


def test_the_reference_is_the_oracles_and_moves_with_no_other_method():
    own = Measured("part", cells("sft"), DRAWS)
    assert np.allclose(own.z, [-7.0, -6.0])
    others = [name for name in own.scores if name != "oracle"]
    changed = Measured("part", cells("sft", changes={name: moved(-0.5) for name in others}), DRAWS)
    assert np.array_equal(own.z, changed.z)
    better = Measured("part", cells("sft", changes={"oracle": moved(0.5)}), DRAWS)
    assert np.allclose(better.z, own.z + 0.5)
    assert Measured("part", cells("dpo"), DRAWS).z.tolist() == [-3.0, -3.0]


@pytest.mark.parametrize(
    ("slope", "ok"), [(1.0, True), (1.24, True), (0.76, True), (1.26, False), (0.74, False)]
)
def test_margins_must_be_within_a_quarter(slope, ok):
    steep = {"panacea": lambda preferences, front, seed: slope * logits(preferences)}
    found = bars("dpo", changes=steep)[MARGIN]
    assert found.value == pytest.approx(abs(slope - 1), abs=1e-4)
    assert found.ok == ok


def test_one_weight_is_enough_to_miss():
    def bent(preferences, front, seed):
        return np.where(np.isclose(preferences[:, 0], 0.6), 0.0, logits(preferences))

    assert bars("dpo", changes={"panacea": bent})[MARGIN].value == pytest.approx(1)


def test_margins_are_means_over_seeds_and_each_seed_is_shown():
    apart = {"panacea": lambda preferences, front, seed: (0.6 + 0.8 * seed) * logits(preferences)}
    found, tables, _ = summarise({"pairs": cells("dpo", seeds=2, changes=apart)}, DRAWS)
    assert found[f"pairs: {MARGIN}"].value == pytest.approx(0, abs=1e-4)
    rows = [r for r in tables["pairs: margins against logit λ, seed by seed"] if r["method"] == "panacea"]
    assert [row["seeds"] for row in rows] == ["mean", "0", "1"]
    assert [row["largest relative error"] for row in rows] == pytest.approx([0, 0.4, 0.4], abs=1e-4)
    assert [row["slope"] for row in rows] == pytest.approx([1, 0.6, 1.4], abs=1e-4)
    (row,) = (r for r in tables["pairs: margins"] if r["method"] == "panacea" and r["weight"] == 0.9)
    assert [row["seed 0"], row["seed 1"]] == pytest.approx([0.6 * row["logit"], 1.4 * row["logit"]], abs=1e-4)
    weights = [r["weight"] for r in tables["pairs: margins"] if r["method"] == "panacea"]
    assert sorted(weights) == [0.1, 0.2, 0.3, 0.4, 0.6, 0.7, 0.8, 0.9]


@pytest.mark.parametrize(("by", "ok"), [(0.0, True), (0.9e-3, True), (2e-3, False)])
def test_the_control_must_stand_still(by, ok):
    drift = {"scale at 0": lambda preferences, front, seed: front + by * preferences}
    assert bars("sft", changes=drift)[STILL].ok == ok


def test_controls_stand_beside_the_share_of_the_oracle():
    _, tables, _ = summarise({"styles": cells("sft")}, DRAWS)
    rows = {row["method"]: row for row in tables["styles: hypervolume over the mixtures of experts"]}
    blind = {name for name, row in rows.items() if row["follows λ"] == "no"}
    assert blind == {"joint", "scale at 0", "panacea, one λ for all"}
    assert all(0.5 < rows[name]["over the oracle"] < 0.76 for name in blind)
    assert rows["panacea"]["over the oracle"] > 0.9
    assert rows["oracle"]["over the oracle"] == 1


def test_an_oracle_that_overfits_does_not_lower_the_bar():
    fine = bars("sft", changes={"panacea": moved(-0.05)})[OVER_ORACLE]
    worse = {"oracle": moved(-0.6), "panacea": moved(-0.05)}
    part = Measured("part", cells("sft", changes=worse), DRAWS)
    assert part.mixture() == "mixture of the experts"
    found = bars_of(part, "panacea")[OVER_ORACLE]
    own = part.against("panacea", "oracle", "ratio").value
    assert found.value == part.against("panacea", "mixture of the experts", "ratio").value < 1 < own
    assert fine.value < 1


def test_one_per_vector_is_compared_at_its_own_preferences():
    _, tables, _ = summarise({"styles": cells("sft")}, DRAWS)
    rows = {str(row["against"]): row for row in tables["styles: hypervolume of panacea against others"]}
    row = rows["one per vector (both at its 3 λ)"]
    # only the centre is above z in both dimensions
    assert row["panacea"] == pytest.approx((3 - np.log(2) - 0.05) ** 2, abs=1e-4)
    assert row["other"] == pytest.approx((3 - np.log(2) - 0.3) ** 2, abs=1e-4)
    assert row["panacea"] < rows["joint"]["panacea"]


def test_a_ratio_to_no_hypervolume_is_left_out():
    _, tables, _ = summarise({"styles": cells("sft", changes={"one per vector": moved(-20.0)})}, DRAWS)
    rows = {str(row["against"]): row for row in tables["styles: hypervolume of panacea against others"]}
    row = rows["one per vector (both at its 3 λ)"]
    assert (row["other"], row["ratio"], row["ratio from"]) == (0, None, None)


def test_the_cost_of_half_the_weight_is_log_2():
    _, tables, _ = summarise({"styles": cells("sft", seeds=2)}, DRAWS)
    rows = [r for r in tables["styles: nats below the vertex at λ = (1/2, 1/2)"] if r["method"] == "panacea"]
    assert [row["dimension"] for row in rows] == ["concise", "formal"]
    for row in rows:
        assert row["below its own vertex"] == pytest.approx(np.log(2), abs=1e-5) == row["closed form"]
        assert row["below the oracle's vertex"] == pytest.approx(np.log(2) + 0.05, abs=1e-5)
    for row in tables["styles: nats below the vertex"]:
        assert row["panacea"] == pytest.approx(row["closed form"], abs=1e-5)
        assert row["closed form"] == pytest.approx(-np.log(row["weight"]), abs=1e-5)


def test_the_spread_is_over_training_seeds():
    worse = {"panacea": lambda preferences, front, seed: front - 0.3 * seed}
    _, tables, _ = summarise({"styles": cells("sft", seeds=3, changes=worse)}, DRAWS)
    rows = {row["method"]: row for row in tables["styles: over training seeds"]}
    assert rows["panacea"]["hypervolume, least"] < rows["panacea"]["hypervolume, largest"] - 1
    assert [rows[name]["trained"] for name in ("panacea", "oracle", "joint")] == [3, 1, 1]
    assert rows["oracle"]["hypervolume, least"] == rows["oracle"]["hypervolume, largest"]
    assert rows["one per vector"]["less soups', least"] is None
    _, single, _ = summarise({"styles": cells("sft")}, DRAWS)
    assert "styles: over training seeds" not in single


def test_what_the_published_settings_miss_is_said():
    _, tables, notes = summarise({"styles": cells("sft", changes={"as published": moved(-0.2)})}, DRAWS)
    rows = {row["bar"]: row for row in tables["styles: the method as published against the same bars"]}
    assert (rows[RANK]["met"], rows[OVER_ORACLE]["met"]) == ("yes", "no")
    assert f"styles: the method as published would miss 1 of 3 bars: {OVER_ORACLE}." in notes
    _, _, notes = summarise({"styles": cells("sft", changes={"as published": moved(0.2)})}, DRAWS)
    assert "styles: the method as published would reach all bars." in notes


def test_runs_on_other_prompts_cannot_be_paired():
    (cell,) = cells("sft")
    scores = cell["methods"]["joint"]["scores"]
    scores["values"] = [rows[:-1] for rows in scores["values"]]
    with pytest.raises(ValueError, match=f"same held-out prompts, not .{PROMPTS - 1}, {PROMPTS}."):
        Measured("part", [cell], DRAWS)


def test_nothing_found_gives_nothing():
    assert summarise({}) == ({}, {}, [])


@pytest.mark.parametrize("name", PARTS)
def test_a_smoke_run_has_what_the_bars_need(name):
    needed = {"panacea", "experts"} | (
        {"oracle"} if PARTS[name].options.get("objective", "sft") == "sft" else set()
    )
    assert needed <= set(SMOKE) & set(PARTS[name].kinds)


def test_a_study_becomes_a_report_with_a_figure(tmp_path):
    three = cells(
        "sft",
        names=("a", "b", "c"),
        vertices=(-5.0, -4.0, -6.0),
        kinds=("panacea", "rewarded soups", "mixture of the experts", "oracle"),
    )
    found, tables, notes = summarise(
        {"styles": cells("sft", seeds=2), "three": three, "pairs": cells("dpo")}, DRAWS
    )
    result = Result(
        name="panacea",
        command="python -m benchmarks.panacea",
        commit="0" * 40,
        machine={},
        versions={},
        bars=found,
        tables=tables,
        notes=notes,
    )
    harness.write(result, tmp_path / "results" / "panacea.json")
    assert json.loads((tmp_path / "results" / "panacea.json").read_text())["name"] == "panacea"
    page = report.generate(tmp_path / "results", tmp_path / "docs").read_text()
    assert "![panacea](img/panacea.png)" in page
    assert (tmp_path / "docs" / "img" / "panacea.png").stat().st_size > 10_000
    for title in tables:
        assert f"### {title}" in page
    assert {row["part"]: row["seeds"] for row in tables["parts"]} == {"styles": 2, "three": 1, "pairs": 1}
