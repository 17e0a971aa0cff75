"""The price of a step: every method timed next to Adam, in turns, in one process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import product
from math import ceil
from statistics import fmean
from time import perf_counter

import torch
from torch import Tensor

from locobench import problems
from locobench.errors import BenchError
from locobench.memory import peak_bytes, state_bytes
from locobench.methods import Method, find
from locobench.prices import Price, Section
from locobench.products import Peak, multiply_adds
from locobench.settings import use_device
from locobench.stepping import close, synchronize, take_step

WARM_UP_STEPS = 2
_ROUND = 4  # steps at least, an even number, so that each of the two is first as often as second
PIXELS = 784


class _Contestant:
    """A model of its own with its optimizer, past its first steps."""

    def __init__(self, method: Method, make: Callable[[], problems.Autoencoder], batch: Tensor) -> None:
        self.model = make()
        self.optimizer = method.build(self.model, method.lr)
        self.batch = batch
        for _ in range(max(WARM_UP_STEPS, method.period)):
            take_step(self.model, self.optimizer, batch)

    def time_step(self) -> float:
        synchronize(self.batch.device)
        start = perf_counter()
        take_step(self.model, self.optimizer, self.batch)
        synchronize(self.batch.device)
        return perf_counter() - start


def measure(
    methods: list[Method],
    *,
    model: str = "standard",
    activation: str = "tanh",
    widths: list[int],
    depths: list[int],
    batch_sizes: list[int],
    rounds: int = 7,
    device: str = "cpu",
    threads: int,
    on_round: Callable[[Section, Method], None] = lambda section, method: None,
) -> Iterator[Section]:
    """Time steps (zero_grad, forward, backward, step) on the autoencoder with random images of 784 pixels.

    Each step comes right after or before one of Adam's: what else the machine does slows both down, and the ratio
    stays. A round is four steps, or as many more as a method takes to repeat its work. Methods that miss their library
    or fail get no numbers.

    Args:
        methods: To be timed; Adam is always the yardstick.
        model: Name of the autoencoder.
        activation: Of its hidden layers.
        widths: By which its hidden widths are multiplied.
        depths: By which the number of its 500 layers is multiplied.
        batch_sizes: Images per step. There is a section for each combination of the three.
        rounds: Per method.
        device: To run on.
        threads: That torch uses on the CPU.
        on_round: Called after every round.

    Yields:
        The section that is being measured, after each of its methods.

    Raises:
        BenchError: The batch, the model or Adam's steps need more memory than there is.
    """
    place = use_device(device, threads)
    for width, depth, batch_size in product(widths, depths, batch_sizes):
        section = Section(width, depth, batch_size)
        with _within_memory(section):
            batch = torch.rand(batch_size, PIXELS, generator=torch.Generator().manual_seed(0)).to(place)

        def make(width: int = width, depth: int = depth) -> problems.Autoencoder:
            return problems.build(model, activation, PIXELS, seed=0, width=width, depth=depth).to(place)

        yield from _measure_section(section, methods, make, batch, rounds, on_round)


@contextmanager
def _within_memory(section: Section) -> Iterator[None]:
    """What is needed before any method can be timed: where torch refuses it, no price can be had."""
    try:
        yield
    except RuntimeError as error:
        first = str(error).strip().splitlines()[0]
        raise BenchError(f"{section.title}: torch refused Adam's own steps ({first}); choose smaller sizes") from error


def _measure_section(
    section: Section,
    methods: list[Method],
    make: Callable[[], problems.Autoencoder],
    batch: Tensor,
    rounds: int,
    on_round: Callable[[Section, Method], None],
) -> Iterator[Section]:
    with _within_memory(section):
        adam = _Contestant(find("adam"), make, batch)
        adam_state, adam_peak = state_bytes(adam.optimizer), peak_of_training(find("adam"), make, batch)
    peak = Peak(adam.model, len(batch))
    for method in methods:
        peak.sample()
        price = Price(method, adam_state_bytes=adam_state, adam_peak_bytes=adam_peak)
        section.prices.append(price)
        if method.missing is not None:
            price.trouble = f"not installed: {method.missing}"
        else:
            try:
                _measure_method(price, adam, make, rounds, partial(on_round, section, method))
            except (RuntimeError, ValueError, ArithmeticError) as error:  # a refused step, or not enough memory
                price.trouble = f"failed: {str(error).strip().splitlines()[0]}"
        if method is methods[-1]:
            peak.sample()
        section.peak = peak.as_row()
        yield section


def _measure_method(
    price: Price,
    adam: _Contestant,
    make: Callable[[], problems.Autoencoder],
    rounds: int,
    on_round: Callable[[], None],
) -> None:
    method, batch = price.method, adam.batch
    price.peak_bytes = peak_of_training(method, make, batch)
    contestant = _Contestant(method, make, batch)
    price.multiply_adds = multiply_adds(contestant.model, contestant.optimizer, batch, method.period)
    count = method.period * 2 * ceil(_ROUND / (2 * method.period))
    for _ in range(rounds):
        adam_seconds, seconds = zip(*(_pair(adam, contestant, number) for number in range(count)), strict=True)
        price.adam_seconds.append(fmean(adam_seconds))
        price.seconds.append(fmean(seconds))
        on_round()
    price.state_bytes = state_bytes(contestant.optimizer)
    close(contestant.optimizer)


def _pair(adam: _Contestant, contestant: _Contestant, number: int) -> tuple[float, float]:
    """Seconds of a step of Adam and of one of the contestant, who begin in turns: the second may find a warm cache."""
    if number % 2:
        seconds = contestant.time_step()
        return adam.time_step(), seconds
    return adam.time_step(), contestant.time_step()


def peak_of_training(method: Method, make: Callable[[], problems.Autoencoder], batch: Tensor) -> int | None:
    """The most memory that a method's first steps hold at a time, its state included, besides model and batch."""
    model = make()

    def train() -> None:
        optimizer = method.build(model, method.lr)
        for _ in range(max(WARM_UP_STEPS, method.period)):
            take_step(model, optimizer, batch)
        close(optimizer)

    return peak_bytes(train, batch.device)
