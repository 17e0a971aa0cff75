"""Matrix products: how many multiply-adds a step does in them, and how fast the machine does such products alone."""

from collections import Counter
from collections.abc import Callable
from math import inf
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from locobench.stepping import synchronize, take_step
from torchloco import LocoProp

KINDS = ("forward", "weight gradient", "input gradient")
Product = tuple[str, int, int, int]  # kind, rows, d_in, d_out
_TIMED = 3  # per sample and product
_ON_GPU = 10  # products between two looks at the clock, to hide what starting one costs


def products(model: nn.Module, rows: int) -> Counter[Product]:
    """The matrix products of a forward and backward pass, with their number. The first layer has no input gradient."""
    linears = [module for module in model.modules() if isinstance(module, nn.Linear)]
    return Counter(
        (kind, rows, linear.in_features, linear.out_features)
        for number, linear in enumerate(linears)
        for kind in KINDS
        if number or kind != "input gradient"
    )


def multiply_adds(model: nn.Module, optimizer: Optimizer, batch: Tensor, steps: int = 1) -> int | None:
    """Multiply-adds of a step in matrix products, a mean over `steps` of them; None where that is not known.

    Of LocoProp it is its own count, added to those of the forward and backward pass. Other optimizers take that many
    steps here, and their products are counted. None is for those that factor or invert matrices, which is work but no
    product, and for those with products in another precision than the model's, which may be cheaper.
    """
    if isinstance(optimizer, LocoProp):
        counts = [layer.multiply_adds for layer in optimizer.layers]
        known = [count for count in counts if count is not None]
        passes = sum(count * _size(product) for product, count in products(model, len(batch)).items())
        return passes + sum(known) if len(known) == len(counts) else None
    other_work = _OtherWork(next(model.parameters()).dtype)
    with FlopCounterMode(display=False) as counter, other_work:
        for _ in range(steps):
            take_step(model, optimizer, batch)
            if other_work.seen:
                return None
    return round(int(counter.get_total_flops()) / 2 / steps)


class Peak:
    """The fastest that the machine did the products of a model's forward and backward pass, each alone.

    Args:
        model: The model, where and of which dtype the products are done.
        rows: Of the batch.
    """

    def __init__(self, model: nn.Module, rows: int) -> None:
        self._parameter = next(model.parameters()).detach()
        self._counts = products(model, rows)
        self._seconds = dict.fromkeys(self._counts, inf)

    def sample(self) -> None:
        """Time every product a few times and keep its best time of this and all earlier samples."""
        for product in self._counts:
            run = _runner(product, self._parameter)
            self._seconds[product] = min(self._seconds[product], _best_time(run, self._parameter.device))

    @property
    def rate(self) -> float:
        """Multiply-adds per second over the products of a step, each at its best."""
        return self.multiply_adds / sum(count * self._seconds[product] for product, count in self._counts.items())

    @property
    def multiply_adds(self) -> int:
        """Of a forward and backward pass."""
        return sum(count * _size(product) for product, count in self._counts.items())

    def as_row(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            "dtype": str(self._parameter.dtype).removeprefix("torch."),
            "gflops": 2e-9 * self.rate,
            "products": [
                {
                    **dict(zip(("kind", "rows", "d_in", "d_out"), product, strict=True)),
                    "count": self._counts[product],
                    "seconds": seconds,
                    "gflops": 2e-9 * _size(product) / seconds,
                }
                for product, seconds in self._seconds.items()
            ],
        }


class _OtherWork(TorchDispatchMode):
    """Notices factorizations, inverses, triangular systems, and products in another dtype."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.dtype = dtype
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        result = func(*args, **(kwargs or {}))
        if name in ("mm", "addmm", "bmm", "baddbmm"):
            self.seen = self.seen or result.dtype != self.dtype
        elif name.startswith(("linalg_", "_linalg_", "cholesky", "triangular_solve", "geqrf", "ormqr")):
            self.seen = self.seen or not name.endswith("_norm")
        return result


def _size(product: Product) -> int:
    _, rows, d_in, d_out = product
    return rows * d_in * d_out


def _runner(product: Product, like: Tensor) -> Callable[[], object]:
    """The product as autograd does it, on random numbers, into memory that is there already."""
    kind, rows, d_in, d_out = product
    x, g, w = (
        torch.randn(shape, dtype=like.dtype, device=like.device)
        for shape in ((rows, d_in), (rows, d_out)) + ((d_out, d_in),)
    )
    left, right, out = {"forward": (x, w.t(), g), "weight gradient": (g.t(), x, w), "input gradient": (g, w, x)}[kind]
    return lambda: torch.mm(left, right, out=out)


def _best_time(run: Callable[[], object], device: torch.device) -> float:
    repeats = _ON_GPU if device.type == "cuda" else 1
    best = inf
    run()
    for _ in range(_TIMED):
        synchronize(device)
        start = perf_counter()
        for _ in range(repeats):
            run()
        synchronize(device)
        best = min(best, (perf_counter() - start) / repeats)
    return best
