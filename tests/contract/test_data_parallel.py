"""Under DistributedDataParallel the ranks arrive at the weights of one process with the whole batch; or none steps."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from torchloco import LocoProp

sys.path.insert(0, str(Path(__file__).parent.parent))
import data_parallel
from data_parallel import CASES, DEALT

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()),
    reason="this torch has no distributed package with gloo",
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What each rank has at the end of each case."""
    folder = tmp_path_factory.mktemp("ranks")
    script = str(data_parallel.__file__)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "error", script, str(rank), str(folder)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(data_parallel.WORLD)
    ]
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * len(processes), "\n".join(said)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(data_parallel.WORLD)]


def are_same(one, other) -> bool:
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(are_same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize("name", [*CASES, *DEALT])
def test_all_ranks_have_the_same_weights_and_state(ranks, name):
    first, *others = (rank[name] for rank in ranks)
    assert all(are_same(first, other) for other in others)


@pytest.mark.parametrize("name", CASES)
def test_they_are_those_of_one_process_with_all_rows(ranks, name):
    began = data_parallel.built(CASES[name]).state_dict()
    alone = data_parallel.train_alone(CASES[name])
    for key, value in ranks[0][name]["model"].items():
        assert_close(value, alone[key], rtol=1e-8, atol=1e-9)
    assert any((value - began[key]).abs().max() > 1e-3 for key, value in alone.items())


@pytest.mark.parametrize("name", DEALT)
def test_with_part_of_the_rows_they_learn(ranks, name):
    case = DEALT[name]
    losses = []
    for weights in (None, ranks[0][name]["model"]):
        model = data_parallel.built(case)
        if weights is not None:
            model.load_state_dict(weights)
        of_ranks = [data_parallel.batches(case, rank)[-1][0] for rank in range(data_parallel.WORLD)]
        with torch.no_grad():
            losses.append(sum(float(data_parallel.loss(model, batch, case)) for batch in of_ranks))
    assert losses[1] < losses[0]


def test_where_one_rank_refuses_none_steps(ranks):
    first, second = (rank["refusals"] for rank in ranks)
    for name, why in [
        ("input overwritten on one rank", "the input of layer 'inside' was overwritten"),
        ("layer unused on one rank", "no captured rows: middle"),
    ]:
        assert first[name] == "another rank refused this step, and says why; nothing was updated on any"
        assert why in second[name]
    assert second["an outer rule fails on one rank"] == "out of memory"
    assert first["an outer rule fails on one rank"].startswith("another rank refused this step")
    for rank in (first, second):
        assert (
            "the ranks would not solve the same problems (rank 0: layer 'middle', 2 parameter(s), tanh, lr 1e-05, "
            "activation_lr 10.0, local_steps 10, inputs in 1 group(s), float64; rank 1: layer 'middle', 2 "
            "parameter(s), sigmoid, "
        ) in rank["another transfer function on one rank"]
        assert "activation_lr 11.0" in rank["another activation_lr on one rank"]
        assert rank["a call beside the wrapper on one rank"] == "stepped"
        assert "wrap the whole model in one DistributedDataParallel" in rank["part of the model wrapped"]
        assert "its gradient does not belong to the captured rows" in rank["gradients not averaged"]
        assert rank["no backward"] == rank["fine again"] == "stepped"
        assert rank["joined"].startswith("DistributedDataParallel.join() is not supported")
        assert rank["sharded weights"].startswith("DTensor is not supported")


def test_a_rank_may_go_on_alone(ranks):
    assert [rank["alone"] for rank in ranks] == ["stepped", "stepped"]


def test_other_ways_of_spreading_a_model_are_refused():
    with pytest.raises(ValueError, match="DataParallel is not supported"):
        LocoProp(nn.DataParallel(nn.Linear(2, 2)))
