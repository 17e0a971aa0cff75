"""The yardstick itself."""

import torch
from torch import nn

from locobench.methods import find
from locobench.speed import Price, state_bytes


def test_state_bytes_counts_every_storage_once_and_looks_inside():
    weight = nn.Parameter(torch.zeros(10))
    optimizer = torch.optim.SGD([weight], 0.1)
    shared = torch.zeros(100)
    optimizer.state[weight] = {"a": shared, "b": shared[:50], "c": {"d": [torch.zeros(3, dtype=torch.float64)]}, "e": 7}
    assert state_bytes(optimizer) == 400 + 24


def test_the_ratio_is_taken_round_by_round():
    price = Price(find("sgd"), seconds=[1.0, 2.0, 30.0], adam_seconds=[1.0, 1.0, 10.0])
    assert price.time_ratio == 2.0
    assert price.step == 2.0
