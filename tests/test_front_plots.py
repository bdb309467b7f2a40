"""Pictures of fronts: what can be checked without eyes. Axes, labels, colours' scale, equal bytes."""

import subprocess
import sys

import pytest
import torch
from matplotlib.colors import to_hex

from persona_sdk.adapters.fronts import Front
from persona_sdk.errors import AdapterError, InvalidInputError
from persona_sdk.front_plots import plot, png

NAMES = (
    "helpful",
    "harmless",
    "concise",
    "formal",
    "pleasant",
    "expert",
    "creative",
    "humorous",
    "terse",
    "odd",
)


def front(m: int, sharpness: float = 0.5, names=NAMES) -> Front:
    """Vertices, middles of edges and the centre; values between 0 and 1."""
    vertices = torch.eye(m, dtype=torch.float64)
    first, second = torch.triu_indices(m, m, 1)
    middles = (vertices[first] + vertices[second]) / 2
    preferences = torch.cat([vertices, middles, torch.full((1, m), 1 / m, dtype=torch.float64)])
    return Front(tuple(names[:m]), preferences, preferences**sharpness)


def texts(axis) -> list[str]:
    return [text.get_text() for text in axis.texts]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


class TestTwoDimensions:
    def test_axes_carry_the_names_and_the_legend_the_methods(self):
        figure = plot({"ours": front(2), "soups": front(2, 1.0)}, (-0.1, -0.1), "Two")
        axis, bar = figure.axes
        assert (axis.get_xlabel(), axis.get_ylabel()) == (
            "helpful (higher is better)",
            "harmless (higher is better)",
        )
        assert bar.get_ylabel() == "weight of helpful in λ"
        assert legend(figure) == ["ours", "soups", "non-dominated envelope", "reference point"]
        assert figure.get_suptitle() == "Two"

    def test_a_curve_follows_the_weight_and_its_points_are_coloured_by_it(self):
        made = front(2)  # rows (1, 0), (0, 1) and twice (.5, .5)
        (axis, _) = plot({"ours": made}).axes
        assert axis.lines[0].get_xydata().tolist() == made.values[[1, 2, 3, 0]].tolist()
        assert axis.collections[0].get_array().tolist() == [0, 0.5, 0.5, 1]
        assert axis.collections[0].get_clim() == (0, 1)

    def test_the_envelope_is_the_border_of_what_all_methods_dominate(self):
        preferences = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        fronts = {
            "a": Front(("x", "y"), preferences, torch.tensor([[3.0, 1.0], [1.0, 3.0]])),
            "b": Front(("x", "y"), preferences, torch.tensor([[2.0, 2.0], [1.0, 1.0]])),
        }
        (axis, _) = plot(fronts).axes
        steps = axis.lines[2]
        assert steps.get_xydata().tolist() == [[1, 3], [2, 2], [3, 1]]
        assert steps.get_drawstyle() == "steps-pre"  # down first, then right: never above what was reached

    def test_a_reference_far_away_is_told_and_does_not_squeeze_the_curve(self):
        near, far = (plot({"ours": front(2)}, (value, value)).axes[0] for value in (-0.5, -500.0))
        assert near.get_xlim()[0] < -0.5
        assert texts(near) == []
        assert far.get_xlim()[0] > -0.5
        assert texts(far) == ["the reference point (−500.00, −500.00) is outside"]

    def test_a_front_that_collapsed_says_so(self):
        flat = Front(NAMES[:2], front(2).preferences, torch.full((4, 2), 0.5))
        assert legend(plot({"ours": front(2), "flat": flat}))[:2] == ["ours", "flat\n(one point for 4 λ)"]

    def test_up_to_fifty_methods_differ_in_colour_or_marker(self):
        (axis, _) = plot({f"m{i}": front(2) for i in range(49)}).axes
        looks = [(to_hex(line.get_color()), line.get_marker()) for line in axis.lines[:49]]
        assert len(set(looks)) == 49


class TestThreeDimensions:
    def test_a_triangle_for_every_method_and_objective_with_values_at_the_corners(self):
        figure = plot({"ours": front(3), "soups": front(3, 1.0)}, (-1, -1, -2))
        triangles, bars = figure.axes[:6], figure.axes[6:]
        assert [axis.get_title() for axis in triangles[:3]] == [
            "ours\nhelpful",
            "ours\nharmless",
            "ours\nconcise",
        ]
        assert texts(triangles[4]) == ["helpful\n0.00", "harmless\n1.00", "concise\n0.00"]
        assert [bar.get_xlabel() for bar in bars] == [
            "helpful\n(higher is better, reference −1.00)",
            "harmless\n(higher is better, reference −1.00)",
            "concise\n(higher is better, reference −2.00)",
        ]

    def test_methods_share_the_colour_scale_of_an_objective(self):
        low = Front(NAMES[:3], front(3).preferences, front(3).values - 4)
        figure = plot({"ours": front(3), "low": low})
        limits = {shade.get_clim() for axis in figure.axes[:6] for shade in axis.collections}
        assert limits == {(-4.0, 1.0)}

    def test_the_heat_map_holds_the_values_at_their_places(self):
        made = front(3, 0.3)
        shade = plot({"ours": made}).axes[1].collections[0]
        assert shade.get_array().tolist() == made.values[:, 1].tolist()
        assert shade._triangulation.x.tolist()[:3] == [0.0, 1.0, 0.5]

    @pytest.mark.parametrize("rows", [[0], [0, 1], [0, 1, 3], [3, 3, 3]])
    def test_preferences_that_span_no_triangle_are_drawn_as_points(self, rows):
        made = front(3)
        (axis, *_) = plot({"ours": Front(made.names, made.preferences[rows], made.values[rows])}).axes
        (dots,) = axis.collections
        assert len(dots.get_offsets()) == len(rows)

    def test_long_names_are_broken_and_cut(self):
        made = front(3, names=("follows the instructions of the user", "b", "c"))
        (axis, *_) = plot({"ours": made}).axes
        assert texts(axis)[0] == "follows the\ninstructions…\n1.00"

    def test_a_corner_that_was_not_measured_has_no_value(self):
        made = front(3)
        (axis, *_) = plot({"ours": Front(made.names, made.preferences[1:], made.values[1:])}).axes
        assert texts(axis) == ["helpful", "harmless\n0.000", "concise\n0.000"]


class TestMoreDimensions:
    @pytest.mark.parametrize("m", [4, 5, 10])
    def test_a_table_of_vertices_and_centre_by_objective(self, m):
        made = front(m)
        (axis, bar) = plot({"ours": made}).axes
        assert [label.get_text() for label in axis.get_xticklabels()] == list(NAMES[:m])
        assert [label.get_text() for label in axis.get_yticklabels()] == [
            *(f"only {name}" for name in NAMES[:m]),
            "centre",
        ]
        shown = [*made.values[:m].flatten().tolist(), *made.values[-1].tolist()]
        assert texts(axis) == [f"{value:.2f}" for value in shown]
        assert [label.get_text() for label in bar.get_yticklabels()] == ["lowest", "highest"]

    def test_what_stands_for_a_vertex_that_was_not_measured_is_named(self):
        made = front(4)
        (axis, _) = plot(
            {"ours": Front(made.names, made.preferences[1:-1], made.values[1:-1])}, [-1] * 4
        ).axes
        assert axis.get_yticklabels()[0].get_text() == "helpful 0.50"
        assert axis.get_yticklabels()[4].get_text() == "nearest the centre"
        assert axis.get_xticklabels()[3].get_text() == "formal (−1.00)"

    def test_colours_are_relative_to_the_column_over_all_methods(self):
        wide = front(4).values * torch.tensor([1.0, 10.0, 100.0, 1000.0]) - 7
        figure = plot(
            {"one": Front(NAMES[:4], front(4).preferences, wide), "two": front(4), "three": front(4)}
        )
        assert len(figure.axes) == 4  # three tables in a grid of two by two, and the bar
        image = figure.axes[0].images[0].get_array()
        assert image.min() == 0
        assert [float(image[i, i]) for i in range(1, 4)] == pytest.approx([1.0] * 3)
        assert float(image[0, 0]) == pytest.approx(1 / 8)  # -6 on a scale from -7 to 1


@pytest.mark.parametrize("m", [2, 3, 4, 10])
class TestEveryNumberOfDimensions:
    def test_equal_fronts_give_equal_bytes_and_other_fronts_others(self, m):
        fronts = {"ours": front(m), "soups": front(m, 1.0)}
        first, second = (png(plot(fronts, [-1.0] * m, "Fronts")) for _ in range(2))
        assert first == second
        assert first.startswith(b"\x89PNG")
        assert b"Software" not in first
        assert png(plot(fronts | {"soups": front(m, 0.9)}, [-1.0] * m, "Fronts")) != first

    def test_a_front_of_one_value_is_drawn(self, m):
        made = front(m)
        flat = Front(made.names, made.preferences, torch.full_like(made.values, 2.0))
        assert png(plot({"flat": flat}, [2.0] * m))
        assert png(plot({"one": Front(made.names, made.preferences[:1], made.values[:1])}))

    def test_names_with_signs_of_markup_are_drawn_as_they_are(self, m):
        names = tuple(f"_${i}^2_$" for i in range(m))
        figure = plot({"_a $b$": front(m, names=names)}, title="$\\frac")
        assert png(figure)
        assert figure.get_suptitle() == "\\$\\frac"


@pytest.mark.parametrize(
    "fronts", [{}, {"a": front(2), "b": front(3)}, {"a": front(2), "b": front(2, names="yx")}]
)
def test_fronts_that_do_not_belong_together_are_refused(fronts):
    with pytest.raises(InvalidInputError, match="over the same dimensions"):
        plot(fronts)


@pytest.mark.parametrize("reference", [(0.0,), (0.0, 0.0, 0.0), (0.0, float("nan"))])
def test_a_reference_that_does_not_fit_is_refused(reference):
    with pytest.raises(InvalidInputError, match="one finite number for every objective"):
        plot({"ours": front(2)}, reference)


def test_without_matplotlib_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(AdapterError, match=r"matplotlib\. pip install 'persona-sdk\[pareto\]'"):
        plot({"ours": front(2)})


def test_drawing_leaves_pyplot_alone():
    program = """
import sys, torch
from persona_sdk.adapters.fronts import Front
from persona_sdk.front_plots import plot, png
png(plot({"ours": Front(("a", "b", "c"), torch.eye(3), torch.eye(3))}))
assert "matplotlib.figure" in sys.modules
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True)
