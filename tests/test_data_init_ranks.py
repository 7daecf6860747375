"""Data-dependent initialisation over the batches of two ranks, unequal ones, and what each rank ends with."""

import copy
from datetime import timedelta

import pytest
import torch
from torch import distributed as dist
from torch import multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

import weightnorm as wn
from feedforward import conv_net, mean_only_net, mlp


def nets():
    """Return nets with the batch of each rank: of other sizes, or none at all."""
    torch.manual_seed(0)
    xs = [2 * torch.randn(n, 3, 9, 9).double() + 1 for n in (5, 2)]
    mlp_xs = [torch.randn(n, 7).double() for n in (0, 40)]
    return {
        "mean-only batch norm": (mean_only_net().double(), xs),
        "mlp, an empty batch": (mlp().double(), mlp_xs),
        "several batches": (mlp().double(), [[mlp_xs[1][:7], mlp_xs[1][7:9]], [mlp_xs[1][9:]]]),
        "several batches, mean-only batch norm": (mean_only_net().double(), [[xs[0][:2], xs[0][2:]], [xs[1]]]),
    }


def on_rank(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/rendezvous", timedelta(seconds=60), 2, rank)
    states = {}
    for name, (net, batches) in nets().items():
        wn.data_init(DistributedDataParallel(net), batches[rank])
        states[name] = net.state_dict()
    alone = mlp().double()
    alone.load_state_dict(nets()["several batches"][0].state_dict())
    states["alone"] = wn.data_init(alone, torch.randn(9 + rank, 7).double(), sync=False) and alone.state_dict()
    states["errors"] = errors(rank)
    torch.save(states, folder / f"{rank}.pt")
    dist.destroy_process_group()


def errors(rank):
    """Return what each rank is told where one of them is wrong: all of them, for none may wait for the others."""
    bad, messages = torch.ones(4, 3), []
    if rank:
        bad[2, 1] = float("nan")
    torch.manual_seed(0)
    net = conv_net()
    other = copy.deepcopy(net)
    if rank:
        nn.init.ones_(other[1].weight)
    for model, batch in ((nn.Linear(3, 2), bad), (nn.Linear(3, 2), torch.ones(0, 3)), (other, torch.ones(2, 3, 9, 9))):
        before = copy.deepcopy(model.state_dict())
        try:
            wn.data_init(model, batch)
        except ValueError as error:
            messages.append(str(error))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    return messages


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """Run both ranks once, and return what each ended with."""
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(on_rank, (folder,), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in (0, 1)]


@pytest.mark.parametrize("name", nets())
def test_ranks_end_with_the_same_bits_and_with_those_of_one_process_on_all_batches(ranks, name):
    net, batches = nets()[name]
    several = any(isinstance(own, list) for own in batches)
    wn.data_init(net, [batch for own in batches for batch in own] if several else torch.cat(batches))
    for key, tensor in net.state_dict().items():
        mine, theirs = (states[name][key] for states in ranks)
        assert torch.equal(mine, theirs)
        torch.testing.assert_close(mine, tensor, rtol=1e-12, atol=1e-12)


def test_without_sync_each_rank_has_its_own(ranks):
    mine, theirs = (states["alone"]["0.weight"] for states in ranks)
    assert not torch.equal(mine, theirs)


def test_all_ranks_are_told_what_is_wrong_on_one(ranks):
    for states in ranks:
        nan, empty, apart = states["errors"]
        assert "puts out NaN, infinity" in nan
        assert "puts out nothing" in empty
        assert "ranks hold different weights" in apart
