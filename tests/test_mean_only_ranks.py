"""Mean-only batch normalization over two processes, against one process on the concatenated batch.

The processes are started once, run every scenario and leave what they found in files; the tests read those.
"""

import contextlib
import copy
import time
from datetime import timedelta
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import weightnorm as wn

RANKS, CHANNELS, DEADLINE = 2, 3, 120.0
BATCHES = {"unequal": (3, 5), "an empty one": (4, 0)}
CLOSE = {"rtol": 1e-12, "atol": 1e-12}


def whole_batch(count=8):
    generator = torch.Generator().manual_seed(count)
    return 2 * torch.randn(count, CHANNELS, 4, 2, dtype=torch.float64, generator=generator) + 3


def part(batch, sizes, rank):
    """Return a process's share of a batch; all of it where there is one process (rank None)."""
    return batch if rank is None else batch.split(sizes)[rank]


def layer_of(**options):
    layer = wn.MeanOnlyBatchNorm(CHANNELS, dtype=torch.float64, **options)
    with torch.no_grad():
        layer.bias.copy_(torch.tensor([0.5, -1.0, 2.0]))
    return layer


def derivatives(sizes, rank):
    """Output, first and second derivatives of a loss that is a sum over examples, so that processes' losses add up."""
    layer, t = layer_of(), part(whole_batch(sum(sizes)), sizes, rank).clone().requires_grad_()
    pull, bias_pull = part(whole_batch(sum(sizes) + 1)[1:], sizes, rank), torch.tensor([1.0, -3.0, 0.5]).double()
    out = layer(t)
    first = torch.autograd.grad(out.pow(3).sum(), (t, layer.bias), create_graph=True)
    second = torch.autograd.grad((first[0] * pull).pow(2).sum() + (first[1] * bias_pull).sum(), (t, layer.bias))
    found = {"output": out, "input": first[0], "bias": first[1], "second, input": second[0], "second, bias": second[1]}
    return {name: tensor.detach() for name, tensor in found.items()} | {"running mean": layer.running_mean}


def trained(rank):
    """The gradients of a small net's parameters for the mean loss over all examples, in DistributedDataParallel."""
    torch.manual_seed(5)
    sizes = BATCHES["unequal"]
    norms = [wn.MeanOnlyBatchNorm(6, dtype=torch.float64) for _ in range(2)]
    convs = [nn.Conv2d(inputs, 6, 1, bias=False, dtype=torch.float64) for inputs in (CHANNELS, 6)]
    net = nn.Sequential(convs[0], norms[0], nn.Tanh(), convs[1], norms[1], nn.Tanh())
    t = part(whole_batch(), sizes, rank)
    model = net if rank is None else DistributedDataParallel(net)
    examples = model(t)
    shares = 1 if rank is None else RANKS  # it averages gradients where those of the losses' sum are wanted
    (shares * examples.square().sum() / sum(sizes)).backward()
    return {name: parameter.grad for name, parameter in net.named_parameters()} | dict(net.named_buffers())


def groups_of_one():
    return [dist.new_group([rank]) for rank in range(RANKS)]


def collectives(rank):
    """The sizes of what goes over the network, forward and backward."""
    seen = {}

    @contextlib.contextmanager
    def watched(name):
        with torch.profiler.profile(record_shapes=True) as profile:
            yield
        seen[name] = [event.input_shapes for event in profile.events() if event.name.startswith("gloo:")]

    layers = {
        "sync": layer_of(),
        "no sync": layer_of(sync=False),
        "eval": layer_of().eval(),
        "eval on the batch": layer_of(track_running_stats=False).eval(),
        "group of one": layer_of(process_group=groups_of_one()[rank]),
    }
    for name, layer in layers.items():
        t = part(whole_batch(), (3, 5), rank).clone().requires_grad_()
        with watched(f"{name}, forward"):
            out = layer(t)
        with watched(f"{name}, backward"):
            out.square().sum().backward()
    return seen


def alone(rank):
    """Outputs of layers that average over their own process only: by choice, in eval mode, or in a group of one."""
    groups = groups_of_one()
    layers = {
        "sync off": layer_of(sync=False),
        "eval": layer_of(track_running_stats=False).eval(),
        "group of one": layer_of(process_group=groups[rank]),
        "group of others": layer_of(process_group=groups[1 - rank]),
    }
    t = part(whole_batch(), (3, 5), rank)
    return {name: layer(t).detach() for name, layer in layers.items()}


def running_means(rank):
    """The running mean after three steps in float32."""
    layer = wn.MeanOnlyBatchNorm(CHANNELS)
    for count in (7, 9, 12):
        layer(part(whole_batch(count), (2, count - 2), rank).float())
    return layer.running_mean


def nothing_at_all(rank):
    """What an empty batch on every process raises, and the count of batches after it."""
    layer = layer_of()
    try:
        layer(torch.ones(0, CHANNELS, dtype=torch.float64))
    except ValueError as error:
        return str(error), int(layer.num_batches_tracked)


def copied(rank):
    """The output of a copy, and whether it asks the group of its original, forward and backward."""
    group = dist.new_group(list(range(RANKS)))
    layer, t = layer_of(process_group=group), part(whole_batch(), (3, 5), rank).clone().requires_grad_()
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        out = copy.deepcopy(layer)(t)
        out.sum().backward()
    return out.detach(), [call.kwargs["group"] is group for call in all_reduce.call_args_list]


def compiled(rank):
    """``derivatives``, the first, of a compiled layer."""
    layer = layer_of()
    t = part(whole_batch(), (3, 5), rank).clone().requires_grad_()
    out = torch.compile(layer, backend="aot_eager")(t)
    out.pow(3).sum().backward()
    return {"output": out.detach(), "input": t.grad, "bias": layer.bias.grad, "running mean": layer.running_mean}


SCENARIOS = {
    **{name: partial(derivatives, sizes) for name, sizes in BATCHES.items()},
    "trained": trained,
    "collectives": collectives,
    "alone": alone,
    "running means": running_means,
    "nothing at all": nothing_at_all,
    "copied": copied,
    "compiled": compiled,
}


def work(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/rendezvous",
        rank=rank,
        world_size=RANKS,
        timeout=timedelta(seconds=DEADLINE / 2),
    )
    found = {name: scenario(rank) for name, scenario in SCENARIOS.items()}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What each process found, by scenario."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = torch.multiprocessing.start_processes(work, (folder,), RANKS, join=False, start_method="spawn")
    until = time.monotonic() + DEADLINE
    try:
        while not processes.join(timeout=1.0):
            if time.monotonic() > until:
                pytest.fail(f"the processes hang: not done after {DEADLINE:g} s")
    finally:
        for process in processes.processes:
            process.kill()
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


def test_the_scenarios_split_a_batch_unevenly():
    assert all(len(set(sizes)) == RANKS for sizes in BATCHES.values())


@pytest.mark.parametrize("name", BATCHES)
def test_outputs_and_derivatives_are_those_of_one_process(found, name):
    expected, of_each = derivatives(BATCHES[name], None), [results[name] for results in found]
    for what in ("output", "input", "second, input"):
        torch.testing.assert_close(torch.cat([results[what] for results in of_each]), expected[what], **CLOSE)
    for what in ("bias", "second, bias"):  # its own examples' alone: DistributedDataParallel does the rest
        torch.testing.assert_close(sum(results[what] for results in of_each), expected[what], **CLOSE)
    own = whole_batch(sum(BATCHES[name]))
    for rank, results in enumerate(of_each):
        torch.testing.assert_close(results["running mean"], 0.1 * own.mean((0, 2, 3)), **CLOSE)
        if not BATCHES[name][rank]:
            assert not results["bias"].any()


def test_running_means_are_the_same_to_the_bit(found):
    first, second = (results["running means"] for results in found)
    assert torch.equal(first, second)
    assert first.any()


def test_nothing_to_average_is_refused_by_every_process(found):
    for results in found:
        message, count = results["nothing at all"]
        assert "empty batch has no mean" in message
        assert count == 0


def test_one_all_reduce_of_c_plus_one_numbers_forward_and_of_c_backward(found):
    for results in found:
        seen = results["collectives"]
        assert seen.pop("sync, forward") == [[[CHANNELS + 1]]]
        assert seen.pop("sync, backward") == [[[CHANNELS]]]
        assert list(seen.values()) == 8 * [[]]


@pytest.mark.parametrize("name", ["sync off", "eval", "group of one", "group of others"])
def test_a_process_can_keep_to_itself(found, name):
    for rank, results in enumerate(found):
        expected = layer_of()(part(whole_batch(), (3, 5), rank))
        torch.testing.assert_close(results["alone"][name], expected.detach(), **CLOSE)


def test_a_copy_has_the_group_of_its_original(found):
    out = torch.cat([results["copied"][0] for results in found])
    torch.testing.assert_close(out, layer_of()(whole_batch()).detach(), **CLOSE)
    assert all(results["copied"][1] == [True, True] for results in found)


def test_data_parallel_training_has_the_gradients_of_one_process(found):
    expected = trained(None)
    assert len(expected) == 8
    for results in found:
        torch.testing.assert_close(results["trained"], expected, **CLOSE)


def test_synchronises_in_compiled_models(found):
    expected = derivatives(BATCHES["unequal"], None)
    of_each = [results["compiled"] for results in found]
    for what in ("output", "input"):
        torch.testing.assert_close(torch.cat([results[what] for results in of_each]), expected[what], **CLOSE)
    torch.testing.assert_close(sum(results["bias"] for results in of_each), expected["bias"], **CLOSE)
    for results in of_each:
        torch.testing.assert_close(results["running mean"], expected["running mean"], **CLOSE)
