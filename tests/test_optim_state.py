"""State behaves as torch's: saved, loaded, resumed after a kill, copied, scheduled; and keeps its float32."""

import copy
import io
import pickle
import signal
import subprocess
import sys
import textwrap
from functools import partial

import pytest
import torch
from torch import nn, optim

import weightnorm as wn
from nets import Lion, batches, conv_net, distance, in_torch_module_form, train

pytestmark = pytest.mark.usefixtures("each_backend")

RULES = {
    "sgd": partial(wn.SGD, lr=0.01, momentum=0.9),
    "adamw": partial(wn.AdamW, lr=1e-3, v_std=0.05),
    "adamw fused": partial(wn.AdamW, lr=1e-3, fused=True),
    "adamw foreach": partial(wn.AdamW, lr=1e-3, foreach=True),
    "adamax": partial(wn.Adamax, lr=1e-3, g_lr="sqrt"),
    "nadam": partial(lambda model, **options: wn.wrap(optim.NAdam, model, **options), lr=1e-3),
    "adagrad": partial(lambda model, **options: wn.wrap(optim.Adagrad, model, **options), lr=0.01),
    "lion": partial(lambda model, **options: wn.wrap(Lion, model, **options), lr=1e-4),
    "muon": lambda model: wn.wrap(optim.Muon, model, lr=0.02, g_class=partial(optim.AdamW, lr=3e-4)),
}


def through_disk(state):
    """Return what a checkpoint gives back, by the loader that refuses arbitrary objects."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", RULES)
def test_a_resumed_run_is_the_uninterrupted_one_to_the_last_bit(rule, dtype):
    net = conv_net().to(dtype)
    optimizer = RULES[rule](net)
    data = batches(6, dtype)
    train(net, optimizer, data[:3])
    saved = through_disk({"model": net.state_dict(), "optimizer": optimizer.state_dict()})
    train(net, optimizer, data[3:])

    resumed = conv_net().to(dtype)
    resumed.load_state_dict(saved["model"])
    again = RULES[rule](resumed)
    again.load_state_dict(saved["optimizer"])
    train(resumed, again, data[3:])
    for name, value in net.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_loading_rounds_nothing(dtype):
    net = conv_net().to(dtype)
    optimizer = wn.AdamW(net)
    train(net, optimizer, batches(2, dtype))
    twin = wn.AdamW(conv_net().to(dtype))
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    ours, theirs = optimizer.state_dict()["state"], twin.state_dict()["state"]
    for index, state in ours.items():
        for name, value in state.items():
            assert torch.equal(value, theirs[index][name]), (index, name)
            assert value.dtype == theirs[index][name].dtype, (index, name)
    weight_state = optimizer.state[net[0].weight]
    assert {value.dtype for value in weight_state.values()} == {torch.float32}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))])
@pytest.mark.parametrize("rule", ["sgd", "adamw", "muon"])
def test_copies_go_on_alike_and_apart(rule, copied):
    net = conv_net()
    optimizer = RULES[rule](net)
    data = batches(4, torch.float32)
    train(net, optimizer, data[:2])
    twin, twin_optimizer = copied((net, optimizer))
    train(twin, twin_optimizer, data[2:])
    assert not torch.equal(net[0].weight, twin[0].weight)
    train(net, optimizer, data[2:])
    assert torch.equal(net[0].weight, twin[0].weight)


@pytest.mark.slow
def test_killed_and_restarted(tmp_path, each_backend):
    program = textwrap.dedent("""
        import os, signal, sys, torch
        sys.path.insert(0, sys.argv[3])
        from nets import batches, conv_net, train
        import weightnorm as wn
        path, kill_at = sys.argv[1], int(sys.argv[2])
        torch.manual_seed(0)
        net, data = conv_net(), batches(8, torch.float32)
        optimizer = wn.AdamW(net, v_std=0.05, backend=sys.argv[4])
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 8)
        parts = {"net": net, "optimizer": optimizer, "schedule": schedule}
        start = 0
        if os.path.exists(path):
            saved = torch.load(path, weights_only=True)
            start = saved.pop("step")
            for name, state in saved.items():
                parts[name].load_state_dict(state)
        for step in range(start, 8):
            if step == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            train(net, optimizer, [data[step]])
            schedule.step()
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"step": step + 1}, path)
    """)

    def run(path, kill_at):
        command = [sys.executable, "-c", program, str(path), str(kill_at), "tests", each_backend]
        return subprocess.run(command, capture_output=True, text=True, timeout=120)

    assert run(tmp_path / "killed", 5).returncode == -signal.SIGKILL
    for name in ("killed", "whole"):
        done = run(tmp_path / name, -1)
        assert done.returncode == 0, done.stderr
    killed, whole = (torch.load(tmp_path / name, weights_only=True) for name in ("killed", "whole"))
    for name, value in whole["net"].items():
        assert torch.equal(value, killed["net"][name]), name


def test_state_of_other_groups_is_refused():
    net = conv_net()
    state = wn.AdamW(net).state_dict()
    with pytest.raises(ValueError, match="different number of parameter groups"):
        wn.AdamW(net.parameters()).load_state_dict(state)
    for group in state["param_groups"]:
        group["dim"] = None
    with pytest.raises(ValueError, match=r"'dim': None.*'dim': 0.*build both alike"):
        wn.AdamW(net).load_state_dict(state)


def test_schedules_move_every_inner_learning_rate():
    net = conv_net().double()
    optimizer = wn.SGD(net, lr=0.1, g_lr=2.0)
    schedule = optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5**epoch)
    twin = conv_net().double()
    twin.load_state_dict(net.state_dict())
    half = wn.SGD(twin, lr=0.05, g_lr=2.0)
    optimizer.zero_grad()
    data = batches(1)
    schedule.optimizer.step()  # nothing has a gradient: nothing moves
    schedule.step()
    train(net, optimizer, data)
    train(twin, half, data)
    assert torch.equal(net[0].weight, twin[0].weight)


def test_options_changed_between_steps_take_effect():
    net = conv_net()
    optimizer = wn.SGD(net, lr=0.1)
    train(net, optimizer, batches(1, torch.float32))
    for group in optimizer.param_groups:
        group["g_lr"] = 0
    lengths = net[5].weight.detach().norm(dim=1)
    train(net, optimizer, batches(3, torch.float32))
    torch.testing.assert_close(net[5].weight.detach().norm(dim=1), lengths)


def test_a_closure_is_called_once_with_gradients_on():
    layer = nn.Linear(4, 3)
    optimizer = wn.SGD(layer, lr=0.1)
    calls = []

    def closure():
        assert torch.is_grad_enabled()
        calls.append(0)
        optimizer.zero_grad()
        loss = layer(torch.ones(2, 4)).square().mean()
        loss.backward()
        return loss

    assert optimizer.step(closure) > optimizer.step(closure)
    assert len(calls) == 2


def test_groups_added_later_are_trained():
    first, second = nn.Linear(4, 3), nn.Linear(3, 2)
    optimizer = wn.Adam(first, lr=0.1)
    x = torch.ones(2, 4)
    second(first(x)).sum().backward()
    optimizer.step()
    before = second.weight.detach().clone()
    for group in wn.param_groups(second):
        optimizer.add_param_group({**group, "lr": 0.01})
    first_state = optimizer.state[first.weight]["exp_avg"].clone()
    optimizer.step()
    assert not torch.equal(second.weight, before)
    assert optimizer.state[second.weight]["scale"].shape == (2, 1)
    assert not torch.equal(optimizer.state[first.weight]["exp_avg"], first_state)  # the old ones kept theirs


def test_no_gradient_frozen_shared_and_empty_parameters():
    shared = nn.Linear(4, 4)
    net = nn.ModuleDict(
        {"a": shared, "b": shared, "frozen": nn.Linear(4, 4).requires_grad_(False), "idle": nn.Linear(4, 4)}
    )
    net["empty"] = nn.ParameterList([torch.empty(0, 4)])
    optimizer = wn.AdamW(net, lr=0.1)
    assert len([p for group in optimizer.param_groups for p in group["params"]]) == 7
    before = copy.deepcopy(net.state_dict())
    x = net["b"](net["a"](torch.ones(2, 4))) + torch.ones(2, 0) @ net["empty"][0]
    net["frozen"](x).square().mean().backward()
    optimizer.step()
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {"a.weight", "a.bias", "b.weight", "b.bias"}
    assert len(optimizer.state) == 3  # a's two, and the empty one
    net["frozen"].requires_grad_(True)
    net["frozen"](torch.ones(2, 4)).sum().backward()
    optimizer.step()
    assert not torch.equal(net["frozen"].weight, before["frozen.weight"])


def test_nothing_is_kept_between_steps_but_the_state():
    net = conv_net()
    optimizer = wn.AdamW(net, backend="torch")
    train(net, optimizer, batches(2, torch.float32))
    weight = net[0].weight
    kept = optimizer.state[weight]
    per_weight = [name for name, value in kept.items() if value.shape == weight.shape]
    assert per_weight == ["exp_avg", "exp_avg_sq"]  # as plain AdamW: no copy of the weights
    for coordinates, _ in optimizer._engines[0]._normalized:
        assert coordinates.v.numel() == coordinates.g.numel() == 0
        assert coordinates.v.grad is None
    assert not optimizer._engines[0]._main.state


def test_a_failing_rule_leaves_normalised_weights_as_they_were():
    class Failing(optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            raise RuntimeError("out of luck")

    net = conv_net()
    before = net[0].weight.detach().clone()
    optimizer = wn.wrap(Failing, net, lr=0.1)
    with pytest.raises(RuntimeError, match="out of luck"):
        train(net, optimizer, batches(1, torch.float32))
    assert torch.equal(net[0].weight, before)
    assert optimizer._engines[0]._normalized[0][0].v.numel() == 0


def test_a_grad_scaler_skips_a_bad_step_whole():
    net = conv_net()
    optimizer = wn.AdamW(net)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = copy.deepcopy(net.state_dict())
    for bad in (True, False):
        optimizer.zero_grad()
        scaler.scale(net(torch.ones(2, 3, 8, 8)).square().mean()).backward()
        if bad:
            net[0].weight.grad[0, 0, 0, 0] = torch.inf
        scaler.step(optimizer)
        scaler.update()
        same = [torch.equal(value, before[name]) for name, value in net.state_dict().items()]
        assert all(same) if bad else not any(same)
        assert bool(optimizer.state) != bad


class Counting(optim.SGD):
    """Makes its state in the constructor and nowhere else, as torch 2.11's Adagrad does."""

    def __init__(self, params, **options):
        super().__init__(params, **options)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moved"] = torch.zeros_like(p)

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["moved"] += p.grad


def test_state_made_in_a_constructor_is_kept():
    net = nn.Linear(4, 3)
    optimizer = wn.wrap(Counting, net, lr=0.1)
    assert optimizer.state[net.weight]["moved"].shape == (3, 4)
    for _ in range(2):
        net.weight.grad, net.bias.grad = torch.ones(3, 4), torch.ones(3)
        optimizer.step()
    assert optimizer.state[net.weight]["g.moved"].shape == (3, 1)
    assert optimizer.state[net.bias]["moved"].tolist() == [2, 2, 2]
    twin = wn.wrap(Counting, net, lr=0.1)
    twin.load_state_dict(through_disk(optimizer.state_dict()))
    assert torch.equal(twin.state[net.weight]["moved"], optimizer.state[net.weight]["moved"])


def test_a_tensor_learning_rate_is_each_groups_own():
    optimizer = wn.AdamW(conv_net(), lr=torch.tensor(1.0))
    assert len(optimizer.param_groups) > 1
    schedule = optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.1, patience=0)
    schedule.step(1.0)
    schedule.step(1.0)
    assert [group["lr"].item() for group in optimizer.param_groups] == pytest.approx(
        [0.1] * len(optimizer.param_groups)
    )


def test_load_hooks_have_their_say():
    net = conv_net()
    optimizer = wn.AdamW(net)
    train(net, optimizer, batches(1, torch.float32))
    twin = wn.AdamW(conv_net())

    def unpack_and_double(_, state):
        inner = copy.deepcopy(state["packed"])
        for parameter_state in inner["state"].values():
            for value in parameter_state.values():
                value.mul_(2)
        return inner

    twin.register_load_state_dict_pre_hook(unpack_and_double)
    seen = []
    twin.register_load_state_dict_post_hook(lambda optimizer: seen.append(len(optimizer.state)))
    twin.load_state_dict({"packed": optimizer.state_dict()})
    ours, theirs = optimizer.state_dict()["state"], twin.state_dict()["state"]
    assert all(torch.equal(2 * value, theirs[i][name]) for i, state in ours.items() for name, value in state.items())
    assert seen == [6]
    assert len(twin._optimizer_load_state_dict_post_hooks) == 1  # ours were for the length of the call


class Idioms(optim.Optimizer):
    """Every way in which rules keep state: made when missing, bound anew, cleared, and under a name of their own."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        self.state["all"] = {"steps": self.state["all"].get("steps", 0) + 1}
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                if p not in self.state:
                    self.state[p] = {"sum": torch.zeros_like(p), "first": True}
                self.state[p] = {"sum": self.state[p]["sum"] + p.grad}
                p.sub_(group["lr"] * self.state[p]["sum"])


def test_state_is_kept_however_a_rule_keeps_it():
    net = conv_net().double()
    twin = in_torch_module_form(net)
    data = batches(5)
    optimizer = wn.wrap(Idioms, net, lr=0.01)
    train(net, optimizer, data)
    train(twin, Idioms(twin.parameters(), lr=0.01), data)
    assert distance(net, twin) < 1e-9
    assert optimizer.state["all"] == {"steps": 5}
    assert set(optimizer.state[net[0].weight]) == {"scale", "sum", "g.sum"}
    assert optimizer.state_dict()["state"]["all"] == {"steps": 5}


class Adapting(optim.SGD):
    """Keeps state in its groups, as learning-rate-free rules do."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            group["momentum"] += 0.1


def test_a_rule_that_keeps_state_in_its_groups_is_refused():
    net = conv_net()
    before = net[0].weight.detach().clone()
    with pytest.raises(ValueError, match=r"keeps state in its param groups \(momentum\)"):
        train(net, wn.wrap(Adapting, net, lr=0.1), batches(1, torch.float32))
    assert torch.equal(net[0].weight, before)


class Restarting(optim.SGD):
    """Forgets everything at its second step."""

    def step(self, closure=None):
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                if p in self.state and self.state[p].setdefault("old", False):
                    self.state[p].clear()
                elif p in self.state:
                    self.state[p]["old"] = True


def test_what_a_rule_forgets_is_forgotten():
    net = nn.Linear(4, 3)
    optimizer = wn.wrap(Restarting, net, lr=0.1, momentum=0.9)
    kept = []
    for _ in range(3):
        net.weight.grad = torch.ones(3, 4)
        optimizer.step()
        kept.append(set(optimizer.state[net.weight]))
    first = {"scale", "momentum_buffer", "old", "g.momentum_buffer", "g.old"}
    assert kept == [first, {"scale"}, first]


def test_a_weight_may_get_another_shape():
    weight = nn.Parameter(torch.randn(4, 9))
    optimizer = wn.SGD([weight], lr=0.01, v_std=0.05, g_lr="sqrt")
    weight.data = torch.randn(4, 400)
    lengths = weight.detach().norm(dim=1)
    weight.grad = weight.detach() / lengths[:, None]  # ∂g = 1, ∂v = 0
    optimizer.step()
    torch.testing.assert_close(weight.detach().norm(dim=1), lengths - 0.01 * 20)
    torch.testing.assert_close((weight.detach() / optimizer.state[weight]["scale"]).norm(dim=1), torch.full((4,), 1.0))
