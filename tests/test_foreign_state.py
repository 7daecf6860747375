"""State dicts that an optimizer of ours did not write: recognised, projected with a warning, or refused."""

import copy

import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.formula import pull_back

pytestmark = pytest.mark.usefixtures("each_backend")

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


@pytest.mark.parametrize("rule", RULES)
def test_a_plain_state_makes_the_run_go_on_as_the_plain_one_would(rule):
    net, plain, go_on = trained(rule)
    other, third = copy.deepcopy(net), copy.deepcopy(net)
    projected, fresh = ours(rule, net), ours(rule, other)
    with pytest.warns(UserWarning, match="projected"):
        projected.load_state_dict(plain.state_dict())
    staying = RULES[rule][0](third.parameters(), **RULES[rule][2])
    staying.load_state_dict(plain.state_dict())
    losses = [torch.tensor(go_on(*run, 15)) for run in ((net, projected), (other, fresh), (third, staying))]
    distances = [(losses[i] - losses[2]).abs().sum() for i in (0, 1)]
    assert distances[0] < 0.5 * distances[1]  # measured: 0.17 to 0.22


@pytest.mark.parametrize("v_std", [None, 0.05])
def test_first_moments_are_projected_as_gradients_are(v_std):
    net, plain, _ = trained("AdamW")
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
    assert state["step"] == state["g.step"] == 30
    assert torch.equal(optimizer.state[net[0].bias]["exp_avg"], plain.state[net[0].bias]["exp_avg"])


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


def wrong_shape():
    _, plain, _ = trained("AdamW")
    return ours("AdamW", nn.Sequential(nn.Linear(5, 16), nn.Linear(16, 3))), plain.state_dict()


def later_version():
    net, _, _ = trained("AdamW")
    optimizer = ours("AdamW", net)
    return optimizer, optimizer.state_dict() | {"weightnorm_format": 2}


def of_module_form():
    net, _, _ = trained("AdamW")
    wrapped = wn.weight_norm(copy.deepcopy(net))
    inside = torch.optim.AdamW(wrapped.parameters())
    wrapped(torch.randn(2, 6).double()).sum().backward()
    inside.step()
    return ours("AdamW", net), inside.state_dict()


def of_an_unknown_rule():
    net, _, go_on = trained("AdamW")
    rprop = torch.optim.Rprop(net.parameters())
    go_on(net, rprop, 1)
    return ours("AdamW", net), rprop.state_dict()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (wrong_shape, "of parameter 0 has shape"),
        (later_version, "format 2"),
        (of_module_form, "from_module_form"),
        (of_an_unknown_rule, "is not known"),
    ],
)
def test_what_cannot_be_right_is_refused(make, message):
    optimizer, state = make()
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state


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
