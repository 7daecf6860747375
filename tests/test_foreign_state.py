"""State dicts that an optimizer of ours did not write: recognised, projected with a warning, or refused."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint import state_dict as distributed

import weightnorm as wn
from weightnorm.formula import pull_back
from weightnorm.optim.backends import AUTO

on_each_backend = pytest.mark.usefixtures("each_backend")


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    """They take seconds to compile; ``on_each_backend`` asks for them where a step is what is tested."""
    monkeypatch.setitem(AUTO, "cpu", "torch")


RULES = {
    "SGD": (torch.optim.SGD, wn.SGD, {"lr": 0.02, "momentum": 0.9}),
    "AdamW": (torch.optim.AdamW, wn.AdamW, {"lr": 0.01}),
    "Adam, amsgrad": (torch.optim.Adam, wn.Adam, {"lr": 0.01, "amsgrad": True}),
    "Adamax": (torch.optim.Adamax, wn.Adamax, {"lr": 0.01}),
}


def trained(rule, steps=30):
    """Return a net trained by a plain torch optimizer, its optimizer and what goes on training it."""
    torch.manual_seed(3)
    net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).double()
    target = nn.Linear(6, 3).double()
    plain, _, options = RULES[rule]
    optimizer = plain(net.parameters(), **options)

    def go_on(net, optimizer, steps):
        generator = torch.Generator().manual_seed(7)
        losses = []
        for _ in range(steps):
            x = torch.randn(32, 6, generator=generator, dtype=torch.float64)
            optimizer.zero_grad()
            loss = (net(x) - target(x)).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    go_on(net, optimizer, steps)
    return net, optimizer, go_on


def ours(rule, net, **options):
    net.zero_grad()
    _, kind, shared = RULES[rule]
    return kind(list(net.parameters()), **shared, **options)


@on_each_backend
@pytest.mark.parametrize("rule", RULES)
def test_a_plain_state_makes_the_run_go_on_as_the_plain_one_would(rule):
    net, plain, go_on = trained(rule)
    other, third = copy.deepcopy(net), copy.deepcopy(net)
    projected, fresh = ours(rule, net), ours(rule, other)
    with pytest.warns(UserWarning, match="projected") as warned:
        projected.load_state_dict(plain.state_dict())
    assert warned[0].filename == __file__
    staying = RULES[rule][0](third.parameters(), **RULES[rule][2])
    staying.load_state_dict(plain.state_dict())
    losses = [torch.tensor(go_on(*run, 15)) for run in ((net, projected), (other, fresh), (third, staying))]
    assert (losses[0] < 1.2 * losses[2]).all()  # no jump; measured: 1.12 at most
    distances = [(losses[i] - losses[2]).abs().sum() for i in (0, 1)]
    assert distances[0] < 0.5 * distances[1]  # measured: 0.17 to 0.22


@on_each_backend
@pytest.mark.parametrize("v_std", [None, 0.05])
def test_first_moments_are_projected_as_gradients_are_and_counts_go_on(v_std):
    net, plain, go_on = trained("AdamW")
    optimizer = ours("AdamW", net, v_std=v_std)
    with pytest.warns(UserWarning, match="projected"):
        optimizer.load_state_dict(plain.state_dict())
    w = net[0].weight.detach()
    g = w.norm(dim=1, keepdim=True)
    v = w if v_std is None else w / g * v_std * 6**0.5
    of_v, of_g = pull_back(plain.state[net[0].weight]["exp_avg"], v, g)
    state = optimizer.state[net[0].weight]
    torch.testing.assert_close(state["exp_avg"], of_v)
    torch.testing.assert_close(state["g.exp_avg"], of_g)
    torch.testing.assert_close(state["scale"], g / v.norm(dim=1, keepdim=True))
    assert torch.equal(optimizer.state[net[0].bias]["exp_avg"], plain.state[net[0].bias]["exp_avg"])
    go_on(net, optimizer, 1)
    assert optimizer.state[net[0].weight]["step"] == optimizer.state[net[0].weight]["g.step"] == 31


def test_second_moments_are_those_of_uncorrelated_gradients():
    w = nn.Parameter(torch.randn(3, 5, dtype=torch.float64))
    moments = torch.rand(3, 5, dtype=torch.float64)
    plain, optimizer = torch.optim.AdamW([w]), wn.AdamW([w], v_std=0.1)
    plain.state[w] = {"step": torch.tensor(1.0), "exp_avg": torch.zeros_like(w), "exp_avg_sq": moments}
    with pytest.warns(UserWarning, match="projected"):
        optimizer.load_state_dict(plain.state_dict())
    g = w.detach().norm(dim=1, keepdim=True)
    v = w.detach() / g * 0.1 * 5**0.5
    draws = torch.randn(20000, 3, 5, dtype=torch.float64) * moments.sqrt()
    found = [pull_back(grad, v, g) for grad in draws]
    of_v, of_g = (torch.stack(parts).square().mean(0) for parts in zip(*found, strict=True))
    torch.testing.assert_close(optimizer.state[w]["exp_avg_sq"], of_v, rtol=0.06, atol=0)
    torch.testing.assert_close(optimizer.state[w]["g.exp_avg_sq"], of_g, rtol=0.06, atol=0)


def test_a_second_moment_is_never_below_zero_nor_a_row_without_direction_special():
    w = nn.Parameter(torch.tensor([[1.0, 1e-3, 1e-4, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    plain, optimizer = torch.optim.AdamW([w]), wn.AdamW([w], v_std=0.1)
    moments = torch.tensor([[0.3, 0.0, 0.0, 0.0], [1.0, 2.0, 3.0, 4.0]])
    plain.state[w] = {"step": torch.tensor(1.0), "exp_avg": moments, "exp_avg_sq": moments}
    with pytest.warns(UserWarning, match="projected"):
        optimizer.load_state_dict(plain.state_dict())
    state = optimizer.state[w]
    assert state["exp_avg_sq"].min() >= 0  # by rounding, 0.3 (1 - 2u²) + 0.3 u⁴ is -3e-8
    for name in ("exp_avg", "exp_avg_sq"):
        assert torch.equal(state[name][1], moments[1])  # it takes plain steps
        assert state["g." + name][1] == 0
    assert state["scale"][1] == 0


def test_moments_of_narrow_weights_are_projected_wide():
    w = nn.Parameter(torch.randn(3, 5).bfloat16())
    plain, optimizer = torch.optim.AdamW([w]), wn.AdamW([w])
    w.grad = torch.ones_like(w)
    plain.step()
    with pytest.warns(UserWarning, match="projected"):
        optimizer.load_state_dict(plain.state_dict())
    optimizer.step()
    assert {value.dtype for value in optimizer.state[w].values()} == {torch.float32}


def test_a_rule_of_its_own_for_lengths_starts_afresh_there():
    w = nn.Parameter(torch.randn(6, 4))
    plain = torch.optim.Muon([w], lr=0.02)
    optimizer = wn.wrap(torch.optim.Muon, [{"params": [w], "dim": 1}], lr=0.02, g_class=torch.optim.AdamW)
    w.grad = torch.randn(6, 4)
    plain.step()
    with pytest.warns(UserWarning, match="projected"):
        optimizer.load_state_dict(plain.state_dict())
    of_v, _ = pull_back(plain.state[w]["momentum_buffer"], w.detach(), w.detach().norm(dim=0, keepdim=True), 1)
    torch.testing.assert_close(optimizer.state[w]["momentum_buffer"], of_v.T)  # v as a matrix, a vector a row
    optimizer.step()
    assert optimizer.state[w]["g.step"] == 1


def test_a_groups_own_options_stay_and_the_rules_are_loaded():
    w = nn.Parameter(torch.randn(3, 5))
    optimizer = wn.AdamW([{"params": [w], "g_lr": 0.0, "v_std": 0.05, "dim": 1, "weight_norm": True}])
    optimizer.load_state_dict(torch.optim.AdamW([w], lr=0.3, betas=(0.5, 0.6)).state_dict())
    group = optimizer.param_groups[0]
    assert [group[name] for name in ("g_lr", "v_std", "dim", "weight_norm")] == [0.0, 0.05, 1, True]
    assert (group["lr"], group["betas"]) == (0.3, (0.5, 0.6))


def test_strict_refuses_it_and_changes_nothing():
    net, plain, _ = trained("AdamW")
    optimizer = ours("AdamW", net)
    with pytest.raises(ValueError, match="strict=True"):
        optimizer.load_state_dict(plain.state_dict(), strict=True)
    assert not optimizer.state


def test_ours_says_its_format_and_loads_strictly_with_it_or_from_before_it():
    net, _, go_on = trained("AdamW")
    optimizer = ours("AdamW", net)
    go_on(net, optimizer, 2)
    saved = optimizer.state_dict()
    assert saved["weightnorm_format"] == 1
    for state in (saved, {key: saved[key] for key in ("state", "param_groups")}):
        other = ours("AdamW", net)
        other.load_state_dict(copy.deepcopy(state), strict=True)
        assert torch.equal(other.state[net[0].weight]["scale"], optimizer.state[net[0].weight]["scale"])


def test_a_later_format_is_refused():
    optimizer = wn.AdamW(linear())
    with pytest.raises(ValueError, match=r"format 2, and this version of weightnorm knows 1; update it"):
        optimizer.load_state_dict(optimizer.state_dict() | {"weightnorm_format": 2})


@pytest.mark.parametrize("flatten", [False, True])
def test_torchs_distributed_state_dicts_take_it(flatten):
    options = distributed.StateDictOptions(flatten_optimizer_state_dict=flatten)
    net, _, go_on = trained("AdamW")
    optimizer, other = wn.AdamW(net, g_lr=0.5), wn.AdamW(net)
    go_on(net, optimizer, 2)
    optimizer.zero_grad()
    saved = distributed.get_optimizer_state_dict(net, optimizer, options=options)
    distributed.set_optimizer_state_dict(net, other, saved, options=options)
    torch.testing.assert_close(other.state_dict()["state"], optimizer.state_dict()["state"], rtol=0, atol=0)
    assert other.param_groups[0]["g_lr"] == 0.5


def stepped(optimizer):
    """Return the state of an optimizer whose parameters took a step."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return optimizer.state_dict()


def linear(inputs=6):
    return list(nn.Linear(inputs, 4).parameters())


def wrap(rule, **options):
    return lambda p: wn.wrap(rule, p, **options)


def module_form():
    return wn.weight_norm(nn.Linear(6, 4)).parameters()


SGD, RMSprop = partial(torch.optim.SGD, momentum=0.9), partial(torch.optim.RMSprop, momentum=0.9)
REFUSED = {
    "plain, other shape": (wn.AdamW, torch.optim.AdamW, linear(5), "exp_avg of parameter 0 has shape .*5.*6.*position"),
    "ours, other shape": (wn.AdamW, wn.AdamW, linear(5), "exp_avg of parameter 0 has shape"),
    "ours, other axis": (
        lambda p: wn.AdamW([{"params": p, "dim": 0}]),
        lambda p: wn.AdamW([{"params": p, "dim": 1}]),
        linear(),
        "build both alike",
    ),
    "plain, another rule": (wn.AdamW, SGD, linear(), "parameter 0 is momentum_buffer, and AdamW wants .*exp_avg"),
    "ours, another rule": (wn.AdamW, partial(wn.SGD, momentum=0.9), linear(), "and AdamW wants .*another rule"),
    "amsgrad": (wn.AdamW, lambda p: with_option(torch.optim.AdamW(p), amsgrad=True), linear(), "max_exp_avg_sq too"),
    "no counterpart": (wrap(torch.optim.Rprop), torch.optim.Rprop, linear(), "how its prev would be .* is not known"),
    "of steps": (wrap(RMSprop), RMSprop, linear(), "how its momentum_buffer would be .* is not known"),
    "module form": (
        wn.AdamW,
        torch.optim.AdamW,
        module_form(),
        r"of 3 parameters, .* has 2\. .*from_module_form\(model",
    ),
    "other groups": (
        wn.AdamW,
        lambda p: torch.optim.AdamW([{"params": [one]} for one in p]),
        linear(),
        r"different number of parameter groups: they have \[1, 1\] members, here \[2\].*model.parameters\(\)",
    ),
    "fewer": (wn.AdamW, torch.optim.AdamW, linear()[:1], "different number of parameters in its groups"),
}


def with_option(optimizer, **options):
    """Return an optimizer with a group's option changed after its step, so that its state does not fit it."""
    optimizer.register_step_post_hook(lambda optimizer, *_: optimizer.param_groups[0].update(options))
    return optimizer


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_right_is_refused_and_changes_nothing(case):
    make, of, parameters, message = REFUSED[case]
    state, optimizer = stepped(of(list(parameters))), make(linear())
    before = copy.deepcopy(optimizer.state_dict()["param_groups"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    assert optimizer.state_dict()["param_groups"] == before


@pytest.mark.parametrize(
    "wrap", [wn.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.weight_norm], ids=["ours", "new", "old"]
)
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
def test_a_model_in_module_form_is_told_what_to_do(wrap):
    model = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 2))
    for models in (model, [model, nn.Linear(2, 2)]):
        with pytest.raises(ValueError, match=r"0\.weight hold weight norm .*from_module_form.*param_groups"):
            wn.AdamW(models, lr=1e-3)
    optimizer = wn.AdamW(wn.param_groups(model), lr=1e-3)  # the other weights only
    chosen = [p for group in optimizer.param_groups for p in group["params"] if group["weight_norm"]]
    assert [p is model[1].weight for p in chosen] == [True]
