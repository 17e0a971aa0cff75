"""What the numbers say in sentences: the headline, and what to mind about the search."""

from collections import Counter
from collections.abc import Sequence
from math import hypot, inf

from locobench import spaces
from locobench.methods import Family, family, label
from locobench.methods.method import written
from locobench.report.means import Mean
from locobench.report.results import Results
from locobench.report.summary import Line, Summary
from locobench.trials import best_trial


def headline(results: Results, summary: Summary) -> list[str]:
    """What the data says, in sentences."""
    shown = [line for line in summary.lines if line.train]
    if not shown:
        return ["No run has a loss to show: all of them diverged."]
    ours, rival = summary.best("LocoProp"), summary.best_first_order
    first = ours or shown[0]
    if first.train is None:
        return []
    data, epochs = results.config["data"].upper(), _epochs(first)
    sentence = f"After {epochs} on {data}, {first.label} is at a train loss of {first.train.text}"
    if rival and rival is not first and rival.train:
        named = _best_of(shown, "first-order", "first-order method")
        sentence += f", {_compared(first.train, rival.train)} {named}, {rival.label}, at "
        sentence += rival.train.text
        if len(rival.curve.epochs) != len(first.curve.epochs):
            sentence += f" after {_epochs(rival)}"
    sentences = [f"{sentence}."]
    second = summary.best("second-order and matrix")
    if second and second is not first and second.train:
        named = _best_of(shown, "second-order and matrix", "second-order or matrix method")
        sentences.append(
            f"It is {_compared(first.train, second.train)} {named}, {second.label}, at {second.train.text}."
        )
    sentences += _times(first, summary)
    if any(line.status != shown[0].status for line in shown):
        sentences.append("Not all runs are of the same length or finished.")
    tried = Counter(trial.method for trial in results.trials)
    if any(count > tried[method] for method, count in results.planned.items()):
        sentences.append("The search is not finished.")
    if max(line.seeds for line in shown) == 1:
        sentences.append("One seed each: how far results scatter is not known.")
    return sentences


def _best_of(shown: Sequence[Line], kind: Family, named: str) -> str:
    """Among how many the best is."""
    count = sum(family(line.method) == kind for line in shown)
    if count == 1:
        return f"the only {named} that ran"
    return f"the better of two {named}s" if count == 2 else f"the best of {count} {named}s"


def _epochs(line: Line) -> str:
    count = len(line.curve.epochs)
    return "one epoch" if count == 1 else f"{count} epochs"


def _compared(own: Mean, other: Mean) -> str:
    """A difference counts from one standard deviation of the difference of two runs, as far as that is known."""
    gap = other.value - own.value
    known = own.spread is not None or other.spread is not None
    if known and abs(gap) <= hypot(own.spread or 0.0, other.spread or 0.0):
        return "within the spread of seeds of"
    return "below" if gap > 0 else "above"


def _times(first: Line, summary: Summary) -> list[str]:
    """How long it takes to the losses of Adam and of the best first-order method, and who is there before it."""
    goals = {"adam": {line.method: line.to_adam for line in summary.lines}}
    if summary.best_first_order is not None:
        goals[summary.best_first_order.method] = {line.method: line.to_first_order for line in summary.lines}
    reached, missed = [], []
    for method, ratios in goals.items():
        line, ratio = summary.line(method), ratios[first.method]
        if line is None or line is first or line.train is None or ratio is None:
            continue
        if ratio == inf:
            missed.append(f"{line.label}'s")
            continue
        known = {other: its for other, its in ratios.items() if its is not None and its < ratio}
        earliest = min(known, key=known.__getitem__, default=None)
        before = "" if earliest is None else f" ({label(earliest)} in {known[earliest]:.2f})"
        reached.append(f"{line.label}'s final loss in {ratio:.2f} × {line.label}'s time{before}")
    by = "By the prices of steps" if summary.priced else "By the runs' own seconds"
    sentences = [f"{by} it reaches {' and '.join(reached)}."] if reached else []
    if missed:
        sentences.append(f"It does not get down to {' or '.join(missed)} final loss within its run.")
    return sentences


def search_caveats(results: Results) -> list[tuple[str, str]]:
    """What is not as it should be in the end, or not alike for all: numbers of trials, and runs of earlier bests."""
    tried = Counter(trial.method for trial in results.trials)
    counts = {method: tried[method] for method in results.planned}
    found = []
    lacking = [m for m, count in counts.items() if count < results.planned[m]]
    if lacking:
        each = ", ".join(f"{label(m)} {counts[m]} of {results.planned[m]}" for m in lacking)
        found.append(("search", f"the search is not finished, its best settings may still change: {each} trials"))
    elif len(set(counts.values())) > 1:
        groups: dict[int, list[str]] = {}
        for method, count in counts.items():
            groups.setdefault(count, []).append(label(method))
        most = max(groups.values(), key=len)
        named = {
            count: "the others" if own is most and len(own) > 2 else ", ".join(own) for count, own in groups.items()
        }
        each = "; ".join(f"{count}: {named[count]}" for count in sorted(groups, reverse=True))
        found.append(("trials", f"the methods have not had equal numbers of trials: {each}"))
    edges = [text for method in counts if method not in lacking for text in _edges(results, method)]
    if edges:
        found.append(("edges", f"the best settings lie on the edge of what was searched: {'; '.join(edges)}"))
    if results.outdated:
        names = ", ".join(label(method) for method in results.outdated)
        found.append(("outdated", f"the search has found better settings since these runs on fresh seeds: {names}"))
    return found


def _edges(results: Results, method: str) -> list[str]:
    """The best settings that are on the edge of the space that they come from."""
    best = best_trial(results.trials, method)
    if best is None:
        return []
    widenings = results.info["widened"].get(method, [])
    space = spaces.from_data(widenings[-1]["space"] if widenings else results.info["spaces"][method], method)
    point = {"lr": best.lr, **best.params}
    if point.keys() != space.keys() or any(point[name] not in space[name] for name in space):  # a file from elsewhere
        return []
    return [
        f"{label(method)} {written({name: point[name]})} of {space[name].bounds}" for name in spaces.edges(space, point)
    ]
