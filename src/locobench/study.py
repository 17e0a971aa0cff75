"""A study's description, study.json: the problem that all its trials share, and the spaces that they come from."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from locobench import description, proposals, spaces
from locobench.choices import TierName
from locobench.errors import BenchError
from locobench.methods import METHODS
from locobench.proposals import Point
from locobench.provenance import commit, today
from locobench.runfile import prepare_folder, write_atomically
from locobench.settings import PROTOCOL, Settings, at_least, at_most, default_threads, machine, use_device, versions
from locobench.spaces import Space

TIERS: dict[TierName, dict[str, Any]] = {
    "smoke": {"data": "curves", "epochs": 2, "trials": 2, "train_size": 2000, "batch_size": 200},
    "short": {"data": "mnist", "epochs": 10, "trials": 12},
    "paper": {"data": "mnist", "epochs": 100, "trials": 30},
}
_DEFAULTS = {
    "data": None,
    "model": "standard",
    "activation": "tanh",
    "epochs": None,
    "batch_size": 1000,
    "train_size": None,
    "device": "cpu",
    "threads": None,
    "trials": None,
    "seed": 0,
}
_SOON = 60.0  # seconds within which another process is done with what it holds only briefly


@dataclass(frozen=True)
class Phase:
    """Trials that come from one space.

    Attributes:
        start: The first of them.
        whole: The space.
        new: The part of it that the first round covers; all of it at first, what was added after a widening.
    """

    start: int
    whole: Space
    new: Space


@dataclass(frozen=True)
class Study:
    """What study.json says.

    Attributes:
        folder: Of the study.
        content: Of the file.
    """

    folder: Path
    content: Mapping[str, Any]

    @property
    def trials(self) -> int:
        """Per method and phase."""
        count: int = self.content["trials"]
        return count

    def settings(self, method: str, point: Point, seed: int | None = None) -> Settings:
        """Of a run of this study's problem at some point of a method's space."""
        content = self.content
        return Settings(
            method=method,
            lr=point["lr"],
            data=content["data"],
            model=content["model"],
            activation=content["activation"],
            epochs=content["epochs"],
            schedule_epochs=content["epochs"],
            batch_size=content["batch_size"],
            train_size=content["train_size"],
            seed=content["seed"] if seed is None else seed,
            device=content["device"],
            threads=content["threads"],
            params={name: value for name, value in point.items() if name != "lr"},
        )

    def phases(self, method: str) -> list[Phase]:
        """Of that method: one, and one more for each time that its space was widened."""
        first = spaces.from_data(self.content["spaces"][method], f"{self.folder / 'study.json'}, {method}")
        found = [Phase(0, first, first)]
        for number, entry in enumerate(self.content["widened"].get(method, []), start=1):
            whole, new = (spaces.from_data(entry[key], f"study.json, {method}") for key in ("space", "new"))
            found.append(Phase(number * self.trials, whole, new))
        return found

    def total(self, method: str) -> int:
        """How many trials that method has in the end."""
        return self.trials * len(self.phases(method))

    def with_methods(self, methods: list[str]) -> "Study":
        """The study with spaces for these methods too, written down."""
        added = {name: None for name in methods if name not in self.content["spaces"]}
        if not added:
            return self
        with brief_lock(self.folder, "study"):
            content = dict(load(self.folder).content)
            for name in added:
                found = spaces.as_data(spaces.space(name, content["data"]))
                content["spaces"] = {name: found, **content["spaces"]}
            return _save(self.folder, content)

    def widen(self, method: str, point: Point, phases: int) -> "Study":
        """The study with a method's space widened around a point on its edge, unless another process has done so."""
        with brief_lock(self.folder, "study"):
            now = load(self.folder)
            if len(now.phases(method)) != phases:
                return now
            whole, new = (spaces.as_data(part) for part in spaces.widened(now.phases(method)[-1].whole, point))
            widenings = [*now.content["widened"].get(method, []), {"space": whole, "new": new}]
            return _save(self.folder, {**now.content, "widened": {**now.content["widened"], method: widenings}})


def open_study(
    folder: Path,
    wanted: Mapping[str, Any],
    tier: TierName | None,
    workers: int = 1,
    check: Callable[[Study], object] | None = None,
) -> Study:
    """The study in a folder, or a new one there.

    Args:
        folder: Of the study.
        wanted: What was asked for; None for what was not. A study that exists must have been made with the same.
        tier: Presets for what was not asked for.
        workers: Processes that will share the machine.
        check: May refuse a new study, before it is written down.
    """
    given = {key: value for key, value in wanted.items() if value is not None}
    presets = {} if tier is None else TIERS[tier]
    new = None
    if not (folder / "study.json").exists():
        new = _planned(folder, {**_DEFAULTS, **TIERS[tier or "short"], **given}, workers)
    made = not folder.exists()
    prepare_folder(folder)
    if new is not None and check is not None:
        try:
            check(new)  # may download, so not for a folder that cannot be written to
        except BenchError:
            if made:
                with suppress(OSError):  # another process may have put something there
                    folder.rmdir()
            raise
    (folder / ".locks").mkdir(exist_ok=True)
    with brief_lock(folder, "study"):
        if new is not None and not (folder / "study.json").exists():
            circumstances = _circumstances(new.content["device"])
            return _save(folder, {**new.content, **circumstances, "date": today(), "spaces": {}, "widened": {}})
        study = load(folder)
        _refuse_differences(study, {**presets, **given})
        use_device(study.content["device"], study.content["threads"])
        return _note_circumstances(study)


def _planned(folder: Path, content: dict[str, Any], workers: int) -> Study:
    """A new study, whose numbers are sound; it is not written down yet."""
    if (folder / "study.db").exists():
        raise BenchError(f"{folder} has a study.db and no study.json; restore that, or choose another --out")
    if content["threads"] is None:
        content["threads"] = max(1, default_threads() // workers)
    at_least(1, trials=content["trials"])
    at_most(description.MOST_TRIALS, trials=content["trials"])
    study = Study(folder, content | {"sampler": proposals.SAMPLER, "pruner": proposals.PRUNER, "protocol": PROTOCOL})
    study.settings("sgd", {"lr": 1.0})  # checks its numbers
    use_device(content["device"], content["threads"])
    return study


def load(folder: Path) -> Study:
    """The study that is in a folder already."""
    if folder.exists() and not folder.is_dir():
        raise BenchError(f"{folder} is not a folder; name that of a study")
    path = folder / "study.json"
    try:
        content = description.read(path)
    except FileNotFoundError:
        raise BenchError(f"{folder} holds no study (study.json); `locobench tune --out {folder}` begins one") from None
    if content["protocol"] != PROTOCOL:
        raise BenchError(
            f"{path} is of protocol {content['protocol']}, this is {PROTOCOL}: their results do not mix; "
            "choose another folder"
        )
    return Study(folder, content)


def methods_of(folder: Path) -> list[str]:
    """The methods of the study in a folder, the most wanted first; none where there is no study."""
    if not (folder / "study.json").exists():
        return []
    names = list(reversed(load(folder).content["spaces"]))
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise BenchError(
            f"{folder / 'study.json'} has spaces of {', '.join(unknown)}, which are no methods here; name those to "
            "go on with by --methods"
        )
    return names


@contextmanager
def brief_lock(folder: Path, name: str) -> Iterator[None]:
    """Wait for one's turn; the lock ends with the process."""
    try:
        with FileLock(folder / ".locks" / f"{name}.lock", timeout=_SOON):
            yield
    except Timeout:
        raise BenchError(f"{folder}: another process has been busy with {name} for {_SOON:.0f} s; try again") from None


def _circumstances(device: str) -> dict[str, Any]:
    """What may change while a study is under way."""
    return {"versions": versions(), "machine": machine(device), "commit": commit()}


def _note_circumstances(study: Study) -> Study:
    """The study with those of now among its `continued`, if nobody has worked on it under them yet."""
    now = _circumstances(study.content["device"])
    known = [study.content, *study.content.get("continued", [])]
    if any(all(one.get(key) == value for key, value in now.items()) for one in known):
        return study
    continued = [*study.content.get("continued", []), {"date": today(), **now}]
    return _save(study.folder, {**study.content, "continued": continued})


def _save(folder: Path, content: dict[str, Any]) -> Study:
    text = json.dumps(content, indent=1, allow_nan=False) + "\n"
    write_atomically(folder / "study.json", lambda file: file.write_text(text, encoding="utf-8"))
    return Study(folder, content)


def _refuse_differences(study: Study, wanted: Mapping[str, Any]) -> None:
    known = {**wanted, "sampler": proposals.SAMPLER, "pruner": proposals.PRUNER}
    differing = [
        f"{key} was {study.content[key]!r}, is {value!r}" for key, value in known.items() if study.content[key] != value
    ]
    if differing:
        raise BenchError(f"{study.folder} holds another study ({'; '.join(differing)}); choose another --out")
