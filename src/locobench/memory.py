"""What an optimizer holds between steps, and what a step needs at its peak."""

import os
from collections.abc import Callable, Iterator
from functools import cache
from threading import Thread

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler prints when it starts and when it stops


def state_bytes(optimizer: Optimizer) -> int:
    """Bytes of the tensors in an optimizer's state, each storage once; parameters and gradients are not counted.

    State may be nested, and lie in objects: their attributes are looked at, except those of modules.
    """
    params = [p for group in optimizer.param_groups for p in group["params"]]
    known = {_place(tensor) for p in params for tensor in (p, p.grad) if tensor is not None}
    storages = {
        _place(tensor): tensor.untyped_storage().nbytes() for tensor in _tensors(list(optimizer.state.values()), set())
    }
    return sum(size for place, size in storages.items() if place not in known)


def peak_bytes(work: Callable[[], object], device: torch.device) -> int | None:
    """The most memory that torch had allocated at any time of `work`, above what it had before.

    Counted are the allocations of torch's own allocator: what libraries take for themselves is not seen.

    Args:
        work: What is done.
        device: Where it allocates. None is returned where torch does not tell.
    """
    if device.type == "cuda":
        return _peak_on_cuda(work, device)
    return _peak_on_cpu(work) if device.type == "cpu" else None


def _peak_on_cpu(work: Callable[[], object]) -> int:
    """By the profiler, in a thread of its own: memory that a thread keeps for its next step is counted each time.

    The profiler sees this one thread, so that layers are solved one after the other, whatever their `parallel` says.
    """
    _start_profiler()
    peaks: list[int] = []
    errors: list[BaseException] = []

    def run() -> None:
        torch.set_num_threads(1)  # this and the next are a thread's own
        torch.set_flush_denormal(True)
        try:
            peaks.append(_profiled_peak(work))
        except BaseException as error:  # raised where it can be handled
            errors.append(error)

    thread = Thread(target=run)
    threads = torch.get_num_threads()
    thread.start()
    thread.join()
    torch.set_num_threads(threads)  # the thread's number is what new threads would begin with
    if errors:
        raise errors[0]
    return peaks[0]


@cache
def _start_profiler() -> None:
    """The first profile of a process must be in its main thread."""
    with profile(activities=[ProfilerActivity.CPU]):
        pass


def _profiled_peak(work: Callable[[], object]) -> int:
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    results = recorded.profiler.kineto_results
    events = sorted((event for event in results.events() if event.name() == "[memory]"), key=lambda e: e.start_ns())
    held = peak = 0
    for event in events:
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def _peak_on_cuda(work: Callable[[], object], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _place(tensor: Tensor) -> tuple[torch.device, int]:
    return tensor.device, tensor.untyped_storage().data_ptr()


def _tensors(value: object, seen: set[int]) -> Iterator[Tensor]:
    """The tensors in a value, through containers and the attributes of objects."""
    if isinstance(value, Tensor):
        yield value
        return
    if id(value) in seen or isinstance(value, (nn.Module, type)):
        return
    seen.add(id(value))
    inside: object
    if isinstance(value, dict):
        inside = list(value.values())
    elif isinstance(value, (list, tuple, set)):
        inside = value
    elif isinstance(value, Optimizer):  # an optimizer inside an optimizer; its groups hold parameters
        inside = list(value.state.values())
    else:
        inside = list(getattr(value, "__dict__", {}).values())
    for item in inside if isinstance(inside, (list, tuple, set)) else ():
        yield from _tensors(item, seen)
