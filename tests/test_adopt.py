"""A run in module form that goes on in the optimizer form: the same trajectory, whatever the spelling and the rule."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn
from weightnorm.layers.found import find

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.usefixtures("each_backend"),
]

FORMS = {
    "hooks": nn.utils.weight_norm,
    "parametrization": parametrizations.weight_norm,
    "parametrization, whole tensor": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "ours": wn.weight_norm,
    "ours, axis 0": lambda layer: wn.weight_norm(layer, dim=0),
}
RULES = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.05),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9, nesterov=True, weight_decay=0.01),
    "Adam, amsgrad": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True, weight_decay=0.1),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, betas=(0.5, 0.99)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.003),
}
NAMES = {
    "SGD, momentum": "SGD",
    "Adam, amsgrad": "Adam",
    "RMSprop": "WeightNormOptimizer",
    "NAdam": "WeightNormOptimizer",
}


def net(form, dtype=torch.float64):
    layers = [nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 3, 4), nn.Flatten(), nn.Linear(27, 2)]
    model = nn.Sequential(*layers).to(dtype)
    for index in (0, 2, 4):
        FORMS[form](model[index])
    return model


def train(model, optimizer, steps, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        x = torch.randn(4, 2, 8, generator=generator, dtype=torch.float64).to(dtype)
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def weights(model):
    return torch.cat([p.detach().flatten() for p in wn.remove_weight_norm(copy.deepcopy(model)).parameters()])


def twins(form, dtype=torch.float64):
    """Return two models of equal weights, of which torch's hooks allow no deep copy."""
    one, other = net(form, dtype), net(form, dtype)
    other.load_state_dict(one.state_dict())
    return one, other


def plain_weights(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def adopted(form, rule, dtype=torch.float64, before=6, after=20):
    """Return the weights after a run in module form, and after one that changed forms on the way."""
    staying, leaving = twins(form, dtype)
    optimizers = [RULES[rule](model.parameters()) for model in (staying, leaving)]
    for model, optimizer in zip((staying, leaving), optimizers, strict=True):
        train(model, optimizer, before, dtype=dtype)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    train(staying, optimizers[0], after, seed=1, dtype=dtype)
    train(leaving, optimizer, after, seed=1, dtype=dtype)
    wn.fold(staying)
    return plain_weights(staying), plain_weights(leaving), optimizer


@pytest.mark.parametrize(
    ("form", "rule"), [*((form, "AdamW") for form in FORMS), *(("parametrization", rule) for rule in RULES)]
)
def test_the_trajectory_goes_on(form, rule):
    expected, found, optimizer = adopted(form, rule)
    assert type(optimizer).__name__ == NAMES.get(rule, rule)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


@pytest.mark.parametrize("rule", ["SGD, momentum", "AdamW"])
def test_the_trajectory_goes_on_in_float32(rule):
    expected, found, _ = adopted("parametrization", rule, torch.float32)
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


def test_without_state_the_scale_alone_is_carried():
    expected, found, _ = adopted("ours", "AdamW", before=0)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


def test_a_vocoder_resumes_from_upstreams_files(tmp_path):
    def discriminators():
        return [net("hooks"), net("hooks")]

    def optimizers(generator, critics):
        both = itertools.chain(*(critic.parameters() for critic in critics))
        of_g = torch.optim.AdamW(generator.parameters(), lr=2e-3, betas=(0.8, 0.99))
        return of_g, torch.optim.AdamW(both, lr=2e-3, betas=(0.8, 0.99))

    generator, critics = net("hooks"), discriminators()
    of_g, of_d = optimizers(generator, critics)

    def go_on(models, optimizers, seed):
        train(models[0], optimizers[0], 3, seed)
        for model in models[1:]:
            train(model, optimizers[1], 3, seed)

    go_on([generator, *critics], (of_g, of_d), 0)
    torch.save({"generator": generator.state_dict()}, tmp_path / "g")
    saved = {"critics": [critic.state_dict() for critic in critics], "g": of_g.state_dict(), "d": of_d.state_dict()}
    torch.save(saved, tmp_path / "do")
    go_on([generator, *critics], (of_g, of_d), 1)

    again, others = net("hooks"), discriminators()
    of_g, of_d = optimizers(again, others)
    again.load_state_dict(torch.load(tmp_path / "g")["generator"])
    loaded = torch.load(tmp_path / "do")
    for critic, state in zip(others, loaded["critics"], strict=True):
        critic.load_state_dict(state)
    of_g.load_state_dict(loaded["g"])
    of_d.load_state_dict(loaded["d"])
    again, of_g = wn.from_module_form(again, of_g)
    others, of_d = wn.from_module_form(others, of_d)
    go_on([again, *others], (of_g, of_d), 1)
    for one, other in zip([generator, *critics], [again, *others], strict=True):
        wn.fold(one)
        torch.testing.assert_close(plain_weights(one), plain_weights(other), rtol=1e-11, atol=1e-12)


def split(model, **of_g):
    """Return param groups in which lengths have options of their own."""
    lengths = [p for name, p in model.named_parameters() if name.endswith(("original0", "_g"))]
    others = [p for p in model.parameters() if not any(p is g for g in lengths)]
    return [{"params": others}, {"params": lengths} | of_g]


@pytest.mark.parametrize(
    ("options", "of_g", "expected"),
    [
        ({"lr": 0.01}, {"lr": 0.03}, {"g_lr": 3.0}),
        ({"lr": 0.01, "weight_decay": 0.0}, {"weight_decay": 0.2}, {"decay": "g", "weight_decay": 0.2}),
        ({"lr": 0.01, "weight_decay": 0.0}, {"weight_decay": 0.2, "lr": 0.005}, {"decay": "g", "g_lr": 0.5}),
    ],
)
def test_options_of_lengths_are_carried(options, of_g, expected):
    staying, leaving = twins("ours")
    optimizers = [torch.optim.AdamW(split(model, **of_g), **options) for model in (staying, leaving)]
    for model, optimizer in zip((staying, leaving), optimizers, strict=True):
        train(model, optimizer, 4)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    group = next(group for group in optimizer.param_groups if group["weight_norm"])
    assert {name: pytest.approx(group[name]) if name == "g_lr" else group[name] for name in expected} == expected
    train(staying, optimizers[0], 10, seed=1)
    train(leaving, optimizer, 10, seed=1)
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


def test_frozen_lengths_stay_frozen():
    staying, leaving = twins("ours")
    optimizers = []
    for model in (staying, leaving):
        for found in find(model):
            found.g.requires_grad_(False)
        optimizers.append(torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01))
        train(model, optimizers[-1], 4)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    train(staying, optimizers[0], 10, seed=1)
    train(leaving, optimizer, 10, seed=1)
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


def test_a_model_that_is_frozen_for_the_moment_keeps_its_axis_and_state():
    staying, leaving = twins("ours")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (staying, leaving)]
    for model, optimizer in zip((staying, leaving), optimizers, strict=True):
        train(model, optimizer, 4)
    leaving.requires_grad_(False)  # a GAN's critic while the generator learns
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    leaving.requires_grad_(True)
    train(staying, optimizers[0], 10, seed=1)
    train(leaving, optimizer, 10, seed=1)
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


def test_lengths_that_have_taken_fewer_steps_go_on_from_theirs():
    staying, leaving = twins("ours")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (staying, leaving)]
    for model, optimizer in zip((staying, leaving), optimizers, strict=True):
        for trains in (False, True):  # g frozen in a warm-up
            for found in find(model):
                found.g.requires_grad_(trains)
            train(model, optimizer, 3)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    train(staying, optimizers[0], 10, seed=1)
    train(leaving, optimizer, 10, seed=1)
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


def test_the_old_optimizer_writes_to_nothing_of_the_new():
    model = net("ours")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    train(model, optimizer, 2)
    old = {value.data_ptr() for state in optimizer.state.values() for value in state.values()}
    _, new = wn.from_module_form(model, optimizer)
    assert not old & {value.data_ptr() for state in new.state.values() for value in state.values()}


def test_a_negative_length_and_a_dead_direction():
    staying, leaving = twins("ours")
    for model in (staying, leaving):
        with torch.no_grad():
            model[4].parametrizations.weight.original0[0] *= -1
            model[4].parametrizations.weight.original1[1] = 0
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (staying, leaving)]
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    assert optimizer.state[leaving[4].weight]["scale"][0] < 0
    assert (leaving[4].weight[1] == 0).all()
    with torch.no_grad():  # the dead row learns in the optimizer form, and cannot in module form
        for p in (staying[4].bias, leaving[4].bias):
            p[1] = 1.0
    train(staying, optimizers[0], 1)
    train(leaving, optimizer, 1)
    torch.testing.assert_close(leaving[4].weight[0], staying[4].weight[0].detach().clone())


def test_bfloat16_goes_on_from_the_unrounded_weight():
    layer = wn.weight_norm(nn.Linear(8, 4).bfloat16())
    optimizer = torch.optim.AdamW(layer.parameters(), lr=1e-2)
    layer(torch.ones(2, 8).bfloat16()).square().mean().backward()
    optimizer.step()
    before = layer.weight.detach().clone()
    layer, new = wn.from_module_form(layer, optimizer)
    assert torch.equal(layer.weight, before)
    state = new.state[layer.weight]
    assert state["master"].dtype == state["scale"].dtype == state["exp_avg"].dtype == torch.float32
    assert torch.equal(state["master"].bfloat16(), layer.weight)
    assert not torch.equal(state["master"], layer.weight.float())


@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
@pytest.mark.parametrize(
    "make",
    [
        lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2),
        lambda optimizer: torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=10),
        lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    ],
)
def test_a_schedule_goes_on_when_its_state_is_loaded(make):
    model = net("ours")
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    schedule = make(optimizer)
    for _ in range(3):
        train(model, optimizer, 1)
        schedule.step()
    model, new = wn.from_module_form(model, optimizer)
    rates = [group["lr"] for group in new.param_groups]
    again = make(new)
    again.load_state_dict(schedule.state_dict() | {"base_lrs": again.base_lrs})
    for group, rate in zip(new.param_groups, rates, strict=True):
        group["lr"] = rate
    for _ in range(4):
        schedule.step()
        again.step()
        expected = optimizer.param_groups[0]["lr"]
        assert [group["lr"] for group in new.param_groups] == pytest.approx([expected] * len(new.param_groups))


def test_what_is_not_the_models_is_carried_as_it_is():
    model, extra = net("ours"), nn.Parameter(torch.zeros(3, 3))
    extra.grad = torch.ones(3, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), extra], lr=0.01)
    optimizer.step()
    _, new = wn.from_module_form(model, optimizer)
    group = next(group for group in new.param_groups if any(p is extra for p in group["params"]))
    assert group["weight_norm"] is False
    assert torch.equal(new.state[extra]["exp_avg"], optimizer.state[extra]["exp_avg"])


def test_tied_weights_have_one_state():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight = model[0].weight
    wn.weight_norm(model)
    model, new = wn.from_module_form(model, torch.optim.AdamW(model.parameters()))
    assert model[0].weight is model[1].weight
    assert sum(p is model[0].weight for group in new.param_groups for p in group["params"]) == 1


def test_without_an_optimizer_the_model_is_folded():
    model, none = wn.from_module_form(net("ours"))
    assert none is None
    assert type(model[0]) is nn.Conv1d


def trained(model, make):
    optimizer = make(model)
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    return model, optimizer


REFUSALS = {
    "nothing in module form": lambda: trained(nn.Linear(4, 3), lambda m: torch.optim.SGD(m.parameters(), lr=1)),
    "logarithms": lambda: trained(
        wn.weight_norm(nn.Linear(4, 3), log_g=True), lambda m: torch.optim.AdamW(m.parameters())
    ),
    "element by element": lambda: trained(
        wn.weight_norm(nn.Linear(4, 3)), lambda m: torch.optim.Adafactor(m.parameters())
    ),
    "differ in betas": lambda: trained(
        wn.weight_norm(nn.Linear(4, 3)), lambda m: torch.optim.AdamW(split(m, betas=(0.5, 0.9)))
    ),
    "weight decay is": lambda: trained(
        wn.weight_norm(nn.Linear(4, 3)), lambda m: torch.optim.AdamW(split(m, weight_decay=0.0), weight_decay=0.1)
    ),
    "v is frozen or in no group": lambda: trained(
        wn.weight_norm(nn.Linear(4, 3)), lambda m: torch.optim.SGD([m.parametrizations.weight.original0], lr=0.1)
    ),
    "optimizer form already": lambda: (wn.weight_norm(nn.Linear(4, 3)), wn.SGD(nn.Linear(4, 3), lr=0.1)),
    "differentiable": lambda: (
        m := wn.weight_norm(nn.Linear(4, 3)),
        torch.optim.AdamW(m.parameters(), differentiable=True),
    ),
    "none of the directions": lambda: (m := wn.weight_norm(nn.Linear(4, 3)), torch.optim.AdamW([m.bias])),
    "LBFGS": lambda: (m := wn.weight_norm(nn.Linear(4, 3)), torch.optim.LBFGS(m.parameters())),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_change_nothing(message):
    model, optimizer = REFUSALS[message]()
    state, kind = copy.deepcopy(model.state_dict()), type(model)
    with pytest.raises(ValueError, match=message):
        wn.from_module_form(model, optimizer)
    assert type(model) is kind
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
