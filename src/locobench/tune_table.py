"""What a search has found so far, for the terminal: the table of the best, and what its edges say."""

from collections import Counter
from collections.abc import Sequence

from optuna.trial import FrozenTrial, TrialState
from rich.box import SIMPLE_HEAD
from rich.table import Table

from locobench import ledger as ledgers
from locobench import spaces
from locobench.ledger import Ledger
from locobench.methods import Method, family, find
from locobench.methods.method import written
from locobench.proposals import Point
from locobench.study import Study

_WORDS = {
    TrialState.PRUNED: "ended early",
    TrialState.FAIL: "diverged",
    TrialState.RUNNING: "under way",
}


def table(study: Study, ledger: Ledger, methods: Sequence[Method], absent: Sequence[Method]) -> Table:
    """The best of each method so far, best first."""
    content = study.content
    title = (
        f"{content['data'].upper()}, {content['model']} {content['activation']} autoencoder, {content['epochs']} epochs"
    )
    made = Table(title=title, box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for heading in ("method", "best settings", "train", "test", "trials", ""):
        made.add_column(heading, justify="right" if heading in ("train", "test", "trials") else "left")
    trials = {method.name: ledger.trials(method.name) for method in methods}
    ranked = sorted(methods, key=lambda method: _value(ledgers.best(trials[method.name])))
    for method in ranked:
        made.add_row(
            *_cells(study, method, trials[method.name]), style="bold" if family(method.name) == "LocoProp" else None
        )
    for method in absent:
        made.add_row(method.label, "–", "–", "–", "–", f"not installed: {method.missing}")
    return made


def sentence(method: str, trial: FrozenTrial, trials: Sequence[FrozenTrial]) -> str:
    """How a trial ended, as a line of a log."""
    settings = written(ledgers.point(trial))
    loss = trial.user_attrs.get("train_loss")
    how = _WORDS.get(trial.state, "finished")
    found = "" if loss is None else f", train loss {loss:.2f}"
    best = ledgers.best(list(trials))
    record = f"; best so far {best.value:.2f}" if best is not None else ""
    return f"{find(method).label}: trial {trial.number} ({settings}) {how}{found}{record}"


def warnings(study: Study, ledger: Ledger, methods: Sequence[Method]) -> list[str]:
    """For each method that is through: whether its best settings are on the edge of its space, and what to do."""
    found = []
    for method in methods:
        trials = ledger.trials(method.name)
        if sum(trial.state.is_finished() for trial in trials) < study.total(method.name):
            continue
        best = ledgers.best(trials)
        phases = study.phases(method.name)
        if best is None:
            found.append(
                f"{method.label}: no trial was finished; lower its lr in spaces.toml, and choose another --out"
            )
            continue
        space = phases[-1].whole
        found += [
            _warning(method, space, name, side, ledgers.point(best), len(phases))
            for name, side in spaces.edges(space, ledgers.point(best)).items()
        ]
    return found


def _warning(method: Method, space: spaces.Space, name: str, side: spaces.Side, point: Point, widenings: int) -> str:
    wider = space[name].widened(side)
    return (
        f"{method.label}: the best {name}, {point[name]:g}, is on the {side} edge of {space[name]}; the same command "
        f"with --widen {widenings} adds as many trials with {name} = {wider} (which is what spaces.toml would say for "
        f"[{method.name}])"
    )


def _cells(study: Study, method: Method, trials: list[FrozenTrial]) -> list[str]:
    best = ledgers.best(trials)
    ended = sum(trial.state.is_finished() for trial in trials)
    states = Counter(trial.state for trial in trials)
    status = ", ".join(f"{states[state]} {word}" for state, word in _WORDS.items() if states[state])
    count = f"{ended}/{study.total(method.name)}"
    if best is None:
        return [method.label, "–", "–", "–", count, status]
    losses = [f"{best.user_attrs[key]:.2f}" for key in ("train_loss", "test_loss")]
    return [method.label, written(ledgers.point(best)), *losses, count, status]


def _value(best: FrozenTrial | None) -> float:
    return float("inf") if best is None or best.value is None else best.value
