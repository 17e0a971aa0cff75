"""README's block of results: written from the files alone, found again, and nothing else in the file is touched."""

import json
from pathlib import Path

import pytest
from commands import refused
from reports import change_rows, shown

from locobench.commands import report as command
from locobench.report import readme as readme_block
from locobench.report.results import load
from locobench.report.summary import summarize

RESULTS = Path(__file__).parent.parent.parent / "results"


MARKED = "# title\n\n<!-- results:begin -->\nold\n<!-- results:end -->\n\nthe rest\n"


def test_the_block_of_the_readme(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    readme = tmp_path / "README.md"
    assert "cannot read README.md" in refused("report", "study", "--readme")
    readme.write_text("no marks")
    assert "should hold one <!-- results:begin -->" in refused("report", "study", "--readme")
    readme.write_text(MARKED)
    assert "names no folder yet" in refused("report", "--readme")
    assert "out of date" in refused("report", "study", "--readme", "--check")
    assert "written: README.md" in shown("report", "study", "--readme")
    text = readme.read_text()
    ours = summarize(load(study)).line("locoprop-m")
    assert text.startswith("# title\n\n<!-- results:begin -->\n")
    assert text.endswith("<!-- results:end -->\n\nthe rest\n")
    assert f"| LocoProp-M | {ours.train.text} |" in text
    assert "](study/report/train-epochs.png)" in text
    assert "`locobench report study --readme`" in text
    assert "up to date" in shown("report", "--readme", "--check")
    assert not readme_block.rewrite(readme, [Path("study")]), "nothing to change"
    assert readme.read_text() == text
    change_rows(study / "best" / "1" / "locoprop-m.jsonl", lambda rows: [*rows[:-1], {**rows[-1], "train_loss": 1.25}])
    assert "out of date" in refused("report", "--readme", "--check")


def test_a_readme_keeps_its_ends_of_lines(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_bytes(f"# x\r\n{readme_block.BEGIN}\r\n{readme_block.END}\r\n".encode())
    shown("report", study, "--readme")
    text = Path("README.md").read_bytes()
    assert text.count(b"\r\n") == text.count(b"\n") > 10
    assert "up to date" in shown("report", "--readme", "--check")
    assert "README.md" not in shown("report", "--readme"), "nothing to write"


def test_this_projects_readme_is_up_to_date(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(RESULTS.parent)
    assert command.README.exists()
    shown("report", "--readme", "--check")


def test_a_readme_that_cannot_be_written_is_refused_before_the_report(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    assert "cannot read README.md" in refused("report", study, "--readme")
    Path("README.md").write_text(f"{readme_block.BEGIN}\n`locobench report 'a b --readme`\n{readme_block.END}\n")
    assert "cannot be read (No closing quotation): 'a b" in refused("report", "--readme")
    for words in (
        "a --speed",
        "a --speed b c",
        "--speed b",
        "a --speed=b",
        "a --fast",
        "a --speed --readme",
        "a --speed b --speed",
    ):
        Path("README.md").write_text(f"{readme_block.BEGIN}\n`locobench report {words} --readme`\n{readme_block.END}\n")
        assert f"should name folders, and after them --speed before each file of prices: {words}" in refused(
            "report", "--readme"
        )
    odd = study.rename(tmp_path / "a`b")
    assert "a name with a backtick in it cannot stand in Markdown" in refused("report", odd, "--readme")
    assert not (odd / "report").exists()


def test_names_that_would_end_or_hide_the_block(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    text = f"{readme_block.BEGIN}\r\n{readme_block.END}\r\n".encode()
    Path("README.md").write_bytes(text)
    odd = study.rename(tmp_path / "a <!-- results:end -->")
    assert "the block would not be found again with these names in it" in refused("report", odd.name, "--readme")
    assert Path("README.md").read_bytes() == text
    assert not (odd / "report").exists()
    odd.rename(tmp_path / "-x")
    shown("report", "./-x", "--readme")
    assert "`locobench report ./-x --readme`" in Path("README.md").read_text()
    assert "up to date" in shown("report", "--readme", "--check")
    assert Path("README.md").read_bytes().count(b"\r\n") == Path("README.md").read_bytes().count(b"\n")


def test_prices_of_a_second_machine_have_a_column(study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    Path("README.md").write_text(MARKED)
    first = json.loads((study / "speed.json").read_text())
    rows = [{**row, "time_ratio": 9 * row["time_ratio"], "time_spread": 0.25} for row in first["prices"]]
    machine = {"cpu": "Z80", "instructions": "LDIR"}
    other = {**first, "machine": machine, "prices": [row for row in rows if row["method"] != "sgd"]}
    (study / "other.json").write_text(json.dumps(other))
    files = ["--speed", "study/speed.json", "--speed", "study/other.json"]
    assert "should be of different machines" in refused("report", "study", *files[:2], *files[:2], "--readme")
    shown("report", "study", *files, "--readme")
    text = Path("README.md").read_text()
    heads, ours, sgd, adam = (
        [cell.strip() for cell in next(line for line in text.splitlines() if line.startswith(start)).split("|")]
        for start in ("| method |", "| LocoProp-M |", "| SGD |", "| Adam |")
    )
    where = next(head for head in heads if head.startswith("step ÷ Adam on Z80 (LDIR)"))
    price = next(row["time_ratio"] for row in rows if row["method"] == "locoprop-m")
    assert ours[heads.index(where)] == f"{price:.2f} ± 0.25"
    assert ours[heads.index("step ÷ Adam")] == f"{price / 9:.2f}"
    assert sgd[heads.index(where)] == "–"
    assert adam[heads.index(where)] == "1.00", "not what noise makes of it"
    assert "up to date" in shown("report", "--readme", "--check")
    Path("README.md").write_text(text.replace("speed study/other.json", "speed study/speed.json"))
    assert "should be of different machines" in refused("report", "--readme", "--check")
