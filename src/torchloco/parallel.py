"""Several layers at a time on a CPU: each in a thread, with its share of torch's own threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from heapq import heapify, heapreplace
from typing import TypeVar

import torch

T = TypeVar("T")
R = TypeVar("R")

_BALANCED = 1.25
"""How much longer than evenly shared work the busiest thread's may be."""


def at_a_time(costs: Sequence[float], threads: int) -> int:
    """How many pieces of work to do at a time: as many as keep all threads busy to the end.

    Args:
        costs: Of each piece, in any unit.
        threads: That there are.

    Returns:
        A divisor of `threads`. It is 1 where one piece is most of the work.
    """
    even = sum(costs) / threads
    for count in range(threads, 1, -1):
        if threads % count == 0 and _longest(costs, count) * count / threads <= _BALANCED * even:
            return count
    return 1


def _longest(costs: Sequence[float], count: int) -> float:
    """The most that one of `count` workers has to do if each takes the largest piece left when it is free."""
    loads = [0.0] * count
    heapify(loads)
    for cost in sorted(costs, reverse=True):
        heapreplace(loads, loads[0] + cost)
    return max(loads)


def each(work: Callable[[T], R], items: Sequence[T], costs: Sequence[float]) -> list[R]:
    """Do the work for each item, several at a time where that keeps all threads busy; results in the items' order.

    Nothing of it goes on when this returns or raises. Under a dispatch mode, which sees its own thread only, one item
    at a time. What is a thread's own must be set by `work`, save inference mode and the handling of subnormals.

    Args:
        work: Of one item.
        items: All.
        costs: What the work for each costs, in any unit.

    Raises:
        BaseException: The first item's, in their order, for which the work raised; items not begun by then are left.
    """
    threads = torch.get_num_threads()
    alone = len(items) < 2 or torch._C._len_torch_dispatch_stack()
    count = 1 if alone else at_a_time(costs, threads)
    if count == 1:
        return [work(item) for item in items]
    inference = torch.is_inference_mode_enabled()

    def in_a_thread(item: T) -> R:
        with torch.inference_mode(inference):
            return work(item)

    try:
        # Threads of one step only: none outlives a fork, a copy or a pickled optimizer.
        with ThreadPoolExecutor(count, "torchloco", lambda: torch.set_num_threads(threads // count)) as pool:
            largest_first = sorted(range(len(items)), key=lambda i: -costs[i])
            futures = {i: pool.submit(in_a_thread, items[i]) for i in largest_first}
            try:
                return [futures[i].result() for i in range(len(items))]
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
    finally:
        torch.set_num_threads(threads)  # the workers' number is what new threads would begin with
