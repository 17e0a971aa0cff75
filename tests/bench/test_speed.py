"""The yardstick itself."""

import json
import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import run
from rich.console import Console
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from locobench import cost_plot, methods, prices, problems, speed
from locobench.errors import BenchError
from locobench.libraries import Library
from locobench.memory import peak_bytes, state_bytes
from locobench.methods import METHODS, find
from locobench.prices import Price, read_prices
from locobench.products import Peak, multiply_adds
from locobench.stepping import take_step

CPU = torch.device("cpu")
NOWHERE = Library("no_such_module", "pip install no-such-module")


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """An autoencoder of 16 pixels with few units."""
    monkeypatch.setattr(problems, "_ENCODER", ([12], [8], [3]))
    monkeypatch.setattr(speed, "PIXELS", 16)
    monkeypatch.setenv("COLUMNS", "200")


def measure(chosen: list[methods.Method], rounds: int = 2) -> prices.Section:
    *_, section = speed.measure(chosen, widths=[1], depths=[1], batch_sizes=[20], rounds=rounds, threads=1)
    return section


def test_state_bytes_counts_every_storage_once_and_looks_inside():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([weight], 0.1)
    shared = torch.zeros(100)
    optimizer.state[weight] = {"a": shared, "b": shared[:50], "c": {"d": [torch.zeros(3, dtype=torch.float64)]}, "e": 7}
    assert state_bytes(optimizer) == 400 + 24


def test_state_bytes_looks_into_objects_and_leaves_parameters_out():
    weight = nn.Parameter(torch.zeros(10))
    weight.grad = torch.zeros(10)
    optimizer = torch.optim.SGD([weight], 0.1)
    inside = SimpleNamespace(statistics=[torch.zeros(5, 5)], parameter=weight, gradient=weight.grad)
    inside.itself = inside
    optimizer.state[weight] = {"object": inside, "module": nn.Linear(9, 9)}
    assert state_bytes(optimizer) == 100


def test_shampoos_preconditioners_are_counted():
    model = nn.Linear(40, 30, bias=False)
    optimizer = find("shampoo").build(model, 1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(2, 40)).sum().backward()
        optimizer.step()
    # for each side statistics and preconditioner; a momentum, and that and the average of the RMSProp it is grafted to
    assert state_bytes(optimizer) == 4 * (2 * (40 * 40 + 30 * 30) + 3 * 40 * 30)


def test_the_ratio_is_taken_round_by_round():
    price = Price(find("sgd"), seconds=[1.0, 2.0, 30.0], adam_seconds=[1.0, 1.0, 10.0])
    assert price.time_ratio == 2.0
    assert price.step == 2.0


def test_a_round_is_a_whole_period(small: None):
    calls = []

    class Counting(torch.optim.SGD):
        def step(self, closure: object = None) -> None:
            calls.append(torch.tensor(0))

    method = replace(
        find("sgd"), name="counting", period=3, build=lambda model, lr: Counting(list(model.parameters()), lr)
    )
    (price,) = measure([method], rounds=2).prices
    assert len(price.seconds) == len(price.adam_seconds) == 2
    # memory 3, warm-up 3, counting of products 3, two rounds of 6: two whole periods have at least four steps
    assert len(calls) == 21


def test_peak_of_known_allocations():
    def work() -> None:
        first = torch.empty(1 << 20, dtype=torch.uint8)
        del first
        second = torch.empty(2 << 20, dtype=torch.uint8)
        third = torch.empty(1 << 19, dtype=torch.uint8)
        del second, third
        torch.empty(1 << 20, dtype=torch.uint8)

    assert peak_bytes(work, CPU) == (2 << 20) + (1 << 19)
    assert peak_bytes(lambda: None, CPU) == 0
    assert peak_bytes(work, torch.device("meta")) is None


@pytest.mark.parametrize(("momentum", "held"), [(0.0, 1), (0.9, 2)])
def test_peak_of_training_with_sgd(momentum: float, held: int):
    """A gradient and a momentum, each of the size of the weight; the activations are small beside them."""
    model = nn.Linear(512, 512, bias=False)
    weight, batch = 4 * 512 * 512, torch.rand(2, 512)

    def train() -> None:
        optimizer = torch.optim.SGD(model.parameters(), 1e-3, momentum=momentum)
        for _ in range(3):
            take_step(model, optimizer, batch)

    assert peak_bytes(train, CPU) == pytest.approx(held * weight, rel=0.03)


def test_peak_of_training_with_adam():
    """Gradient, two averages, and in the step a root and its quotient."""
    model = nn.Linear(512, 512, bias=False)

    def train() -> None:
        optimizer = torch.optim.Adam(model.parameters(), foreach=False)
        for _ in range(3):
            take_step(model, optimizer, torch.rand(2, 512))

    assert peak_bytes(train, CPU) == pytest.approx(5 * 4 * 512 * 512, rel=0.03)


def test_memory_that_a_thread_keeps_counts_every_time(small: None):
    batch = torch.rand(20, 16)
    first, second = (
        speed.peak_of_training(find("rmsprop-tf"), lambda: problems.build("standard", "tanh", 16, 0), batch)
        for _ in range(2)
    )
    assert first == second


def test_an_error_in_the_measured_work_is_raised():
    def work() -> None:
        raise RuntimeError("refused")

    with pytest.raises(RuntimeError, match="refused"):
        peak_bytes(work, CPU)


def test_products_are_counted(small: None):
    model, batch = problems.build("standard", "tanh", 16, seed=0), torch.rand(20, 16)
    shapes = [(16, 12), (12, 8), (8, 3), (3, 8), (8, 12), (12, 16)]
    passes = 20 * (3 * sum(a * b for a, b in shapes) - 16 * 12)
    assert Peak(model, 20).multiply_adds == passes
    assert multiply_adds(model, find("adam").build(model, 1e-3), batch, steps=2) == passes


@pytest.mark.parametrize("name", ["locoprop-m", "locoprop-s", "locoprop-m-fast", "locoprop-s-cg", "backprop"])
def test_locoprops_own_count_is_what_it_does(name: str):
    model, batch = problems.Autoencoder(100, [120, 60, 20], "tanh"), torch.rand(500, 100)
    optimizer = find(name).build(model, 1e-5)
    take_step(model, optimizer, batch)
    with FlopCounterMode(display=False) as counter:
        take_step(model, optimizer, batch)
    assert multiply_adds(model, optimizer, batch) == pytest.approx(counter.get_total_flops() / 2, rel=0.02)


@pytest.mark.parametrize("name", ["soap", "kfac", "muon"])
def test_nothing_is_said_of_products_where_there_is_other_work(name: str, small: None):
    """Factorizations, and Muon's products in bfloat16."""
    if METHODS[name].missing:
        pytest.skip("not installed")
    model, batch = problems.build("standard", "tanh", 16, seed=0), torch.rand(20, 16)
    assert multiply_adds(model, find(name).build(model, 1e-3), batch) is None


def test_the_earlier_package_trains_the_same_weights(small: None):
    if methods.PRICED["locoprop-pypi"].missing:
        pytest.skip("not installed")
    model, batch = problems.build("standard", "tanh", 16, seed=0), torch.rand(200, 16)
    optimizer = find("locoprop-pypi", methods.PRICED).build(model, 0.0)
    first = take_step(model, optimizer, batch)
    assert first.item() == pytest.approx(
        problems.loss(problems.build("standard", "tanh", 16, seed=0)(batch), batch).item()
    )
    for _ in range(30):
        last = take_step(model, optimizer, batch)
    assert last < first
    # mean square and momentum, and a counter of steps per parameter
    assert state_bytes(optimizer) == sum(8 * p.numel() + 4 for p in model.parameters())


def test_peak_rate_only_improves():
    peak = Peak(problems.Autoencoder(16, [12], "tanh"), 20)
    peak.sample()
    first = peak.rate
    peak.sample()
    assert peak.rate >= first > 0
    row = peak.as_row()
    assert row["gflops"] == pytest.approx(2e-9 * peak.rate)
    assert [(p["kind"], p["d_in"], p["d_out"]) for p in row["products"][:2]] == [
        ("forward", 16, 12),
        ("weight gradient", 16, 12),
    ]


def test_a_missing_library_gets_a_row_and_the_others_their_prices(small: None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(METHODS, "soap", replace(METHODS["soap"], library=NOWHERE))
    section = measure([METHODS["soap"], find("sgd")])
    assert section.prices[0].as_row() == {"method": "soap", "trouble": "not installed: pip install no-such-module"}
    assert section.prices[1].trouble is None
    assert section.prices[1].time_ratio > 0


def test_a_method_that_fails_does_not_stop_the_others(small: None):
    def broken(model: nn.Module, lr: float) -> torch.optim.Optimizer:
        raise RuntimeError("not enough memory\nat all")

    section = measure([replace(find("sgd"), build=broken), find("sgd")])
    assert section.prices[0].trouble == "failed: not enough memory"
    assert section.prices[1].trouble is None


def test_sections_file_table_and_plot(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(methods.PRICED, "soap", replace(METHODS["soap"], library=NOWHERE))
    out = tmp_path / "speed.json"
    sizes = ["--width", "1,2", "--depth", "1,3", "--batch-size", 20]
    chosen = ["--methods", "sgd,locoprop-m,soap", "--rounds", 1, "--threads", 1]
    result = run("speed", *sizes, *chosen, "--out", out)
    assert result.exit_code == 0, result.output
    for width in (1, 2):
        for depth in (1, 3):
            assert f"width ×{width}, depth ×{depth}, batch 20" in result.stdout
    assert result.stdout.count("SOAP: not installed: pip install no-such-module") == 4
    assert f"written: {out.with_suffix('.png')}" in result.stdout
    markdown = out.with_suffix(".md").read_text()
    assert markdown.count("| SOAP: not installed: pip install no-such-module |") == 4
    assert markdown.count("\n| LocoProp-M | ") == 4
    assert {line.count("|") for line in markdown.splitlines()} == {0, 10}
    content = json.loads(out.read_text())
    assert [(peak["width"], peak["depth"], peak["batch_size"]) for peak in content["peaks"]] == [
        (1, 1, 20),
        (1, 3, 20),
        (2, 1, 20),
        (2, 3, 20),
    ]
    assert len(content["peaks"][1]["products"]) > len(content["peaks"][0]["products"])
    assert len(content["prices"]) == 12
    sgd = content["prices"][0]
    assert sgd["gflops"] == pytest.approx(2e-9 * sgd["multiply_adds"] / sgd["step_seconds"])
    assert 0 < sgd["peak_ratio"] < 1
    assert read_prices(out) == {row["method"]: row["time_ratio"] for row in content["prices"][:2]}
    lines = cost_plot.series(content["prices"], "width")
    assert lines["sgd"] == {1: sgd["time_ratio"], 2: content["prices"][6]["time_ratio"]}

    drawn = run("figure", "speed", out, "--out", tmp_path / "again.png")
    assert drawn.exit_code == 0, drawn.output
    assert (tmp_path / "again.png").read_bytes() == out.with_suffix(".png").read_bytes()


def test_only_what_varies_can_be_drawn(tmp_path: Path):
    row = {"method": "sgd", "time_ratio": 1.0, "width": 1, "depth": 1, "batch_size": 20}
    with pytest.raises(BenchError, match="one size only"):
        cost_plot.save({"prices": [row]}, tmp_path / "x.png")
    assert cost_plot.varying({"prices": [row, {**row, "batch_size": 40}]}) == ["batch_size"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed", "--width", "1,x"], "--width must be comma-separated whole numbers, such as 1,2,4; got '1,x'"),
        (["speed", "--depth", "0"], "--depth must be at least 1, got 0"),
        (["speed", "--batch-size", ""], "--batch-size must be comma-separated whole numbers"),
        (["speed", "--methods", "locoprop-pipy"], "did you mean 'locoprop-pypi'?"),
        (["compare", "--methods", "locoprop-pypi"], "unknown method 'locoprop-pypi'"),
        (["speed", "--out", "speed.png"], "--out must name the JSON, got speed.png"),
        (["figure", "speed"], "figure speed needs the FILE"),
        (["figure", "local-losses", "speed.json"], "the other figures take none"),
        (["figure", "speed", "nowhere.json"], "cannot be read"),
    ],
)
def test_what_cannot_be_done_is_said(arguments: list[str], message: str):
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr


def test_sizes_beyond_all_memory(tmp_path: Path):
    result = run("speed", "--batch-size", str(10**12), "--out", str(tmp_path / "speed.json"))
    assert result.exit_code == 2, result.output
    assert "width ×1, depth ×1, batch 1000000000000: torch refused Adam's own steps" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change",
    [
        *({"method": ["a"]}, {"time_ratio": -1}, {"time_ratio": "nan"}, {"time_ratio": True}, {"time_ratio": 10**400}),
        *({"width": "x"}, {"width": 0}, {"width": 10**400}),
        *({"bytes_ratio": "x"}, {"bytes_ratio": {}}, {"bytes_ratio": math.nan}, {"bytes_ratio": -1}),
    ],
    ids=str,
)
def test_damaged_prices_are_named(tmp_path: Path, change: dict[str, Any]):
    row = {"method": "adam", "time_ratio": 1.0, "width": 1, "depth": 1, "batch_size": 1}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"prices": [row, {**row, "width": 2, **change}]}))
    with pytest.raises(BenchError, match=r"is no file of `locobench speed`"):
        prices.read(path)


def test_prices_with_and_without_sizes_do_not_mix(tmp_path: Path):
    row = {"method": "adam", "time_ratio": 1.0}
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"prices": [{**row, "width": 1, "depth": 1, "batch_size": 1}, row]}))
    with pytest.raises(BenchError, match="some prices have batch_size, depth, width and some have not"):
        prices.read(path)


@pytest.mark.parametrize(
    ("option", "value"), [("--threads", 10**12), ("--threads", 0), ("--width", 10**20), ("--depth", 10**20)]
)
def test_sizes_that_nothing_has(tmp_path: Path, option: str, value: int):
    result = run("speed", option, value, "--out", tmp_path / "speed.json")
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith(f"locobench: {option} must be at ")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("out", "said"),
    [
        ("adam.jsonl", "--out must name the JSON"),
        ("README", "--out must name the JSON"),
        ("README.json", "would replace"),
        ("photo.json", "would replace"),
        ("study.json", "study.json is no file of `locobench speed`"),
    ],
)
def test_files_of_others_are_not_replaced(tmp_path: Path, out: str, said: str):
    (tmp_path / "README.md").write_text("mine")
    (tmp_path / "photo.png").write_text("mine")
    (tmp_path / "study.json").write_text("{}")
    (tmp_path / "adam.jsonl").write_text("{}")
    before = {path: path.read_text() for path in tmp_path.iterdir()}
    result = run("speed", "--out", tmp_path / out)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert before == {path: path.read_text() for path in tmp_path.iterdir()}


def test_a_measurement_that_fails_leaves_the_one_before(small: None, tmp_path: Path):
    out = tmp_path / "speed.json"
    options = ("--methods", "sgd", "--rounds", 1, "--threads", 1, "--out", out)
    assert run("speed", *options, "--batch-size", "10,20").exit_code == 0
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert run("speed", *options, "--batch-size", f"10,{10**12}").exit_code == 2
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.pop("speed.unfinished.json")
    assert after == before


def test_an_interruption_costs_one_method(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    measure_method = speed._measure_method

    def interrupted(price: prices.Price, *rest: object) -> None:
        if price.method.name == "momentum":
            raise KeyboardInterrupt
        measure_method(price, *rest)

    monkeypatch.setattr(speed, "_measure_method", interrupted)
    out = tmp_path / "speed.json"
    assert run("speed", "--methods", "sgd,nesterov,momentum", "--rounds", 1, "--threads", 1, "--out", out).exit_code
    kept = prices.read(tmp_path / "speed.unfinished.json")
    assert [row["method"] for row in kept["prices"]] == ["sgd", "nesterov"]
    assert kept["peaks"][0]["gflops"] > 0


def test_a_price_with_only_some_of_the_sizes_is_named(tmp_path: Path):
    path = tmp_path / "prices.json"
    path.write_text(json.dumps({"prices": [{"method": "adam", "time_ratio": 1.0, "width": 1}]}))
    with pytest.raises(BenchError, match="adam has only some of batch_size, depth, width"):
        prices.read(path)


def test_the_table_fits_eighty_columns():
    names = ("locoprop-m-normalized", "schedule-free", "locoprop-s-exact")
    listed = [
        prices.Price(METHODS[name], [0.9514], [0.1], 22_700_000, 22_700_000, 100_000_000, 48_000_000, 10**9)
        for name in names
    ]
    section = prices.Section(1, 1, 1000, listed, {"gflops": 1198.0})
    with (console := Console(width=80)).capture() as drawn:
        console.print(prices.table([section], "steps"))
    text = drawn.get()
    assert "…" not in text
    assert all(f"\n{METHODS[name].label} " in text for name in names)
    assert text.count("2.08") == len(names), "the last column is there"
