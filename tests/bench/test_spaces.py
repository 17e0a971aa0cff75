"""The search spaces hold every method's defaults, and grow where they should."""

import pytest

from locobench import proposals, spaces
from locobench.choices import DATA_NAMES, STUDY_METHODS
from locobench.errors import BenchError
from locobench.methods import METHODS, Method
from locobench.spaces import Range


@pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
def test_a_default_lies_inside_its_space(method: Method):
    for data in DATA_NAMES:
        space = spaces.space(method.name, data)
        default = {"lr": method.rate(data), **method.params}
        assert list(space)[0] == "lr"
        assert set(space) == set(default)
        assert all(default[name] in space[name] for name in space)
        assert not spaces.edges({"lr": space["lr"]}, default)
        assert len(space) <= 3
        method.check(method.lr, method.params)


def test_the_study_is_of_known_methods():
    assert set(STUDY_METHODS) <= set(METHODS)
    assert len(set(STUDY_METHODS)) == len(STUDY_METHODS)


def test_a_section_of_a_data_set_replaces_single_ranges():
    text = "[a]\nlr = [1, 2]\nx = [3, 4]\n[a.mnist]\nlr = [5, 6]\n"
    assert spaces.space("a", "mnist", text) == {"lr": Range(5, 6), "x": Range(3, 4)}
    assert spaces.space("a", "usps", text) == {"lr": Range(1, 2), "x": Range(3, 4)}


def test_positions_are_even_on_the_scale():
    assert Range(1e-4, 1e-2).value(0.5) == pytest.approx(1e-3)
    decay = Range(0.9, 0.999, "complement")
    assert decay.value(0.5) == pytest.approx(0.99)
    assert decay.value(1.0) == 0.999
    assert decay.position(0.99) == pytest.approx(0.5)
    assert Range(0.0, 0.99, "complement").value(0.0) == 0


def test_edges_and_what_lies_beyond():
    space = {"lr": Range(1e-4, 1e-2), "momentum": Range(0.0, 0.99, "complement")}
    assert spaces.edges(space, {"lr": 1e-3, "momentum": 0.5}) == {}
    assert spaces.edges(space, {"lr": 9.9e-3, "momentum": 0.0}) == {"lr": "upper"}, "nothing is below a momentum of 0"
    whole, new = spaces.widened(space, {"lr": 1.1e-4, "momentum": 0.9899})
    assert whole["lr"] == Range(1e-5, 1e-2)
    assert new["lr"] == Range(1e-5, 1e-4)
    assert whole["momentum"] == Range(0.0, 0.999, "complement")
    assert new["momentum"].low == 0.99


@pytest.mark.parametrize(
    ("method", "good"),
    [
        ("adam", {"lr": 3e-4, "beta1": 0.9, "beta2": 0.999}),
        ("adam", {"lr": 1e-3, "beta1": 0.9, "beta2": 0.99}),
        ("rmsprop-tf", {"lr": 3e-4, "decay": 0.9, "momentum": 0.9}),
        ("locoprop-m", {"lr": 4e-5, "momentum": 0.999, "activation_lr": 10}),
        ("locoprop-spectral", {"lr": 0.03, "momentum": 0.95, "damping": 0.1}),
        ("locoprop-spectral", {"lr": 0.1, "momentum": 0.95, "damping": 0.1}),
    ],
)
def test_settings_that_are_known_to_be_good_are_well_inside(method: str, good: dict[str, float]):
    space = spaces.space(method, "mnist")
    assert space.keys() == good.keys()
    assert not spaces.edges(space, good)


def test_sobol_points_cover_the_space():
    space = {"lr": Range(1e-4, 1e-2), "x": Range(1, 100)}
    points = proposals.sobol_points(space, 8, "seed")
    for name, one in space.items():
        assert {int(8 * one.position(point[name])) for point in points} == set(range(8))
    assert points == proposals.sobol_points(space, 8, "seed")
    assert points != proposals.sobol_points(space, 8, "another")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a", "spaces.toml is no TOML"),
        ("[a]\nx = [1, 2]", "no range of lr for a; add"),
        ("[a]\nlr = 3", r"\[a\]: lr must be \[low, high\]"),
        ("[a]\nlr = [2, 1]", "a log range needs 0 < low < high, got 2.0 and 1.0"),
        ("[a]\nlr = [0, 1]", "got 0.0 and 1.0"),
        ("[a]\nlr = [1, 2]\nx = { range = [0.5, 1], scale = 'complement' }", "needs 0 <= low < high < 1"),
        ("[a]\nlr = { range = [0.5, 1], scale = 'cubic' }", "unknown scale 'cubic'; there are: log, complement"),
    ],
)
def test_a_space_that_makes_no_sense(text: str, message: str):
    with pytest.raises(BenchError, match=message):
        spaces.space("a", "mnist", text)
