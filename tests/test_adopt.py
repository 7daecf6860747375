"""A run in module form that goes on in the optimizer form: the same trajectory, whatever the spelling and the rule."""

import copy
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.optim import lr_scheduler

import weightnorm as wn
from weightnorm.layers.found import find
from weightnorm.optim.backends import AUTO

pytestmark = pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated")
on_each_backend = pytest.mark.usefixtures("each_backend")


@pytest.fixture(autouse=True)
def _without_kernels(monkeypatch):
    """They take seconds to compile; ``on_each_backend`` asks for them where a step is what is tested."""
    monkeypatch.setitem(AUTO, "cpu", "torch")


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
    "AdamW, fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adam, maximize": lambda p: torch.optim.Adam(p, lr=0.001, maximize=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01),
    "Adamax": lambda p: torch.optim.Adamax(p, lr=0.01, betas=(0.5, 0.99)),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.003, momentum=0.5),
    "NAdam": lambda p: torch.optim.NAdam(p, lr=0.003),
}
WRAPPED = ("RMSprop", "NAdam", "Adagrad")


def net(form, dtype=torch.float64):
    layers = [nn.Conv1d(2, 4, 3), nn.Tanh(), nn.ConvTranspose1d(4, 6, 4, groups=2), nn.Flatten(), nn.Linear(54, 2)]
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


@on_each_backend
@pytest.mark.parametrize(
    ("form", "rule"), [*((form, "AdamW") for form in FORMS), *(("parametrization", rule) for rule in RULES)]
)
def test_the_trajectory_goes_on(form, rule):
    expected, found, optimizer = adopted(form, rule)
    assert type(optimizer).__name__ == ("WeightNormOptimizer" if rule in WRAPPED else rule.split(",")[0])
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


@on_each_backend
@pytest.mark.parametrize("rule", ["SGD, momentum", "AdamW"])
def test_the_trajectory_goes_on_in_float32(rule):
    expected, found, _ = adopted("parametrization", rule, torch.float32)
    assert ((found - expected).norm() / expected.norm()).item() < 2e-6


def test_without_state_the_scale_alone_is_carried():
    expected, found, _ = adopted("ours", "AdamW", before=0)
    assert ((found - expected).norm() / expected.norm()).item() < 1e-12


@on_each_backend
def test_a_vocoder_resumes_from_upstreams_files(tmp_path):
    """HiFi-GAN's training script: its two files, its two discriminators in one optimizer, its schedule."""

    def build():
        models = {"generator": net("hooks"), "mpd": net("hooks"), "msd": net("hooks")}
        critics = itertools.chain(models["msd"].parameters(), models["mpd"].parameters())
        optim_g = torch.optim.AdamW(models["generator"].parameters(), 2e-3, betas=[0.8, 0.99])
        return models, {"optim_g": optim_g, "optim_d": torch.optim.AdamW(critics, 2e-3, betas=[0.8, 0.99])}

    def schedule(optimizers, last_epoch):
        return [
            torch.optim.lr_scheduler.ExponentialLR(o, gamma=0.5, last_epoch=last_epoch) for o in optimizers.values()
        ]

    def go_on(models, optimizers, schedules, seed):
        for epoch in range(2):
            for name, model in models.items():
                train(model, optimizers["optim_g" if name == "generator" else "optim_d"], 3, seed + epoch)
            for one in schedules:
                one.step()

    def state_dicts(parts):
        return {name: part.state_dict() for name, part in parts.items()}

    models, optimizers = build()
    schedules = schedule(optimizers, -1)
    go_on(models, optimizers, schedules, 0)
    torch.save({"generator": models["generator"].state_dict()}, tmp_path / "g")
    critics = {name: models[name].state_dict() for name in ("mpd", "msd")}
    torch.save(critics | state_dicts(optimizers) | {"epoch": 1}, tmp_path / "do")
    go_on(models, optimizers, schedules, 9)

    again, resumed = build()
    saved = torch.load(tmp_path / "g") | torch.load(tmp_path / "do")
    for name, part in (again | resumed).items():
        part.load_state_dict(saved[name])
    again["generator"], resumed["optim_g"] = wn.from_module_form(again["generator"], resumed["optim_g"])
    _, resumed["optim_d"] = wn.from_module_form([again["mpd"], again["msd"]], resumed["optim_d"])
    go_on(again, resumed, schedule(resumed, saved["epoch"]), 9)
    for name, model in models.items():
        wn.fold(model)
        torch.testing.assert_close(plain_weights(again[name]), plain_weights(model), rtol=1e-11, atol=1e-12)


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


@pytest.mark.parametrize("left_out", [False, True])
def test_frozen_lengths_stay_frozen(left_out, each_backend):
    staying, leaving = twins("ours")
    optimizers = []
    for model in (staying, leaving):
        for found in find(model):
            found.g.requires_grad_(False)
        optimizers.append(
            torch.optim.AdamW([p for p in model.parameters() if p.requires_grad or not left_out], lr=0.01)
        )
        train(model, optimizers[-1], 4)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    assert {group["g_lr"] for group in optimizer.param_groups if group["weight_norm"]} == {0.0}
    train(staying, optimizers[0], 10, seed=1)
    train(leaving, optimizer, 10, seed=1)
    assert {type(engine).__name__ for engine in optimizer._engines} == {
        "Engine" if each_backend == "torch" else "Fused"
    }
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("only", ["a layer", "all"])  # all: a GAN's critic while the generator learns
def test_what_is_frozen_for_the_moment_keeps_its_axis_and_state(only):
    staying, leaving = twins("ours")
    optimizers = [torch.optim.AdamW(model.parameters(), lr=0.01) for model in (staying, leaving)]
    for model, optimizer in zip((staying, leaving), optimizers, strict=True):
        train(model, optimizer, 4)
        (model[0] if only == "a layer" else model).requires_grad_(False)
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    assert [p.requires_grad for p in leaving.parameters()] == [False] * 2 + [only == "a layer"] * 4
    for model, one in ((staying, optimizers[0]), (leaving, optimizer)):
        if only == "a layer":
            train(model, one, 4, seed=1)
        model.requires_grad_(True)
        train(model, one, 10, seed=2)
    wn.fold(staying)
    torch.testing.assert_close(plain_weights(leaving), plain_weights(staying), rtol=1e-11, atol=1e-12)


@on_each_backend
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


def test_what_is_frozen_and_in_no_group_is_folded_and_left_out():
    model = net("hooks")
    model[0].requires_grad_(False)
    model, optimizer = wn.from_module_form(model, torch.optim.SGD([*model[2].parameters(), *model[4].parameters()]))
    assert type(model[0].weight) is nn.Parameter
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 4


def test_a_negative_length_and_a_dead_direction():
    staying, leaving = twins("ours")
    for model in (staying, leaving):
        with torch.no_grad():
            model[4].parametrizations.weight.original0[0] *= -1
            model[4].parametrizations.weight.original1[1] = 0
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (staying, leaving)]
    leaving, optimizer = wn.from_module_form(leaving, optimizers[1])
    scale = optimizer.state[leaving[4].weight]["scale"]
    assert scale[0] < 0
    assert scale[1] == 0  # not set yet
    assert (leaving[4].weight[1] == 0).all()
    with torch.no_grad():  # the dead row learns in the optimizer form, and cannot in module form
        for p in (staying[4].bias, leaving[4].bias):
            p[1] = 1.0
    train(staying, optimizers[0], 1)
    train(leaving, optimizer, 1)
    torch.testing.assert_close(leaving[4].weight[0], staying[4].weight[0].detach().clone())


def test_counts_stay_counts_where_the_whole_tensor_has_one_length():
    model = parametrizations.weight_norm(nn.Linear(4, 3), dim=None)
    optimizer = torch.optim.NAdam(model.parameters())
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step()
    _, new = wn.from_module_form(model, optimizer)
    shapes = {name: tuple(value.shape) for name, value in new.state[model.weight].items() if name.startswith("g.")}
    assert shapes == {"g.step": (), "g.mu_product": (), "g.exp_avg": (1, 1), "g.exp_avg_sq": (1, 1)}


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


SCHEDULES = {
    "step": lambda optimizer: lr_scheduler.StepLR(optimizer, step_size=2),
    "cosine": lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, T_max=10),
    "lambda": lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.8**epoch),
    "warmup": lambda optimizer: lr_scheduler.LinearLR(optimizer, 0.1, 1.0, 6),
    "one cycle": lambda optimizer: lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=20),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_a_schedule_goes_on_as_the_docs_say(name, lr):
    optimizers, schedules = [], []
    models = twins("ours")
    for model in models:
        optimizers.append(torch.optim.AdamW([{"params": model.parameters(), "lr": copy.deepcopy(lr)}]))
        schedules.append(SCHEDULES[name](optimizers[-1]))
        for _ in range(4):
            optimizers[-1].step()
            schedules[-1].step()
    _, new = wn.from_module_form(models[1], optimizers[1])
    if torch.is_tensor(lr):  # schedules change it in place, group by group
        assert len({id(group["lr"]) for group in new.param_groups}) == len(new.param_groups) > 1
    rates = [group["lr"] * 1 for group in new.param_groups]
    again = SCHEDULES[name](new)
    again.load_state_dict(schedules[1].state_dict() | {"base_lrs": again.base_lrs})
    for group, rate in zip(new.param_groups, rates, strict=True):
        group["lr"] = rate
    for _ in range(4):
        expected = float(optimizers[0].param_groups[0]["lr"])
        assert [float(group["lr"]) for group in new.param_groups] == pytest.approx([expected] * len(rates))
        for part in (optimizers[0], schedules[0], new, again):
            part.step()


def test_what_is_not_the_models_is_carried_as_it_is():
    model, extra = net("ours"), nn.Parameter(torch.zeros(3, 3))
    extra.grad = torch.ones(3, 3)
    optimizer = torch.optim.AdamW([*model.parameters(), extra], lr=0.01)
    optimizer.step()
    _, new = wn.from_module_form(model, optimizer)
    group = next(group for group in new.param_groups if any(p is extra for p in group["params"]))
    assert group["weight_norm"] is False
    assert set(new.state[extra]) == {"step", "exp_avg", "exp_avg_sq"}


def test_names_and_what_a_rule_keeps_under_one_are_carried():
    models = nn.ModuleList([net("hooks"), net("parametrization")])
    optimizer = torch.optim.AdamW(models.named_parameters())
    optimizer.state["all"] = {"steps": 3}
    _, new = wn.from_module_form(models, optimizer)
    names = {
        name: p for group in new.param_groups for name, p in zip(group["param_names"], group["params"], strict=True)
    }
    assert names.keys() == dict(models.named_parameters()).keys()
    assert all(names[name] is p for name, p in models.named_parameters())
    assert new.state["all"] == {"steps": 3}


@pytest.mark.parametrize("backend", ["torch", "numba"])
def test_the_backend_can_be_chosen(backend):
    model = wn.weight_norm(nn.Linear(4, 3))
    _, new = wn.from_module_form(model, torch.optim.SGD(model.parameters()), backend=backend)
    assert new._backend == backend


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


def trained(make, wrap=wn.weight_norm):
    """Return a small model in module form and its optimizer, a step on."""
    model = nn.Sequential(wrap(nn.Linear(4, 3)), nn.Linear(3, 4))
    optimizer = make(model)
    model(torch.randn(2, 4)).square().mean().backward()
    optimizer.step()
    return model, optimizer


def adamw(**of_g):
    return lambda model: torch.optim.AdamW(split(model, **of_g), lr=0.1, weight_decay=0.1)


def of_weight(*names):
    """Return the optimizer of ``original0`` (g), ``original1`` (v), both or neither, and of what is plain."""

    def make(model):
        held = dict(model[0].parametrizations.weight.named_parameters())
        return torch.optim.SGD([model[0].bias, *(held[name] for name in names)], lr=0.1)

    return make


def scheduled_apart(model):
    optimizer = torch.optim.SGD(split(model), lr=0.1)
    lr_scheduler.LambdaLR(optimizer, [lambda epoch: 1.0, lambda epoch: 0.5])
    return optimizer


def tied(model):
    model[1].weight = nn.Parameter(model[0].parametrizations.weight.original1.detach().T.contiguous())
    model[0].other = model[0].parametrizations.weight.original1
    return torch.optim.SGD(model.parameters(), lr=0.1)


def frozen_v(model):
    model[0].parametrizations.weight.original1.requires_grad_(False)
    return torch.optim.SGD(model.parameters(), lr=0.1)


class Wrapper(torch.optim.SGD):
    def __init__(self, inner):
        super().__init__(inner.param_groups, lr=0.1)


REFUSALS = {
    "there is nothing in module form": lambda: trained(lambda m: torch.optim.SGD(m.parameters(), lr=1), lambda m: m),
    "0.weight holds lengths as logarithms": lambda: trained(
        lambda m: torch.optim.AdamW(m.parameters()), lambda m: wn.weight_norm(m, log_g=True)
    ),
    "only rules that keep state element by element": lambda: trained(lambda m: torch.optim.Adafactor(m.parameters())),
    "0.weight: v and g are in groups that differ in betas": lambda: trained(adamw(betas=(0.5, 0.9))),
    r"0.weight: weight decay is 0.1 on v and 0.0 on g; .*decay=\"g\"": lambda: trained(adamw(weight_decay=0.0)),
    "learning rates .* fixed multiple": lambda: trained(scheduled_apart),
    "0.weight: v would be trained, but not by this": lambda: trained(of_weight("original0")),
    "0.weight: g would be trained, but not by this": lambda: trained(of_weight("original1")),
    "0.weight: v and g would be trained, but not by this": lambda: trained(of_weight()),
    "0.weight: v is frozen and g is trained": lambda: trained(frozen_v),
    "0.weight: g or v is a parameter of another layer too": lambda: trained(tied),
    "optimizer form already": lambda: (trained(adamw())[0], wn.SGD(nn.Linear(4, 3), lr=0.1)),
    "LBFGS": lambda: (m := trained(adamw())[0], torch.optim.LBFGS(m.parameters())),
    "another Wrapper cannot be made": lambda: trained(lambda m: Wrapper(torch.optim.SGD(m.parameters()))),
    "differentiable must be False": lambda: (
        m := trained(adamw())[0],
        torch.optim.SGD(m.parameters(), differentiable=True),
    ),
}


@pytest.mark.parametrize("message", REFUSALS)
def test_refusals_change_nothing(message):
    model, optimizer = REFUSALS[message]()
    kind, saved = type(model[0]), copy.deepcopy([model.state_dict(), optimizer.state_dict()["state"]])
    with pytest.raises(ValueError, match=message):
        wn.from_module_form(model, optimizer)
    assert type(model[0]) is kind
    torch.testing.assert_close([model.state_dict(), optimizer.state_dict()["state"]], saved, rtol=0, atol=0)


def test_state_dicts_and_wrapped_models_are_refused(tmp_path):
    model = wn.weight_norm(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(model.parameters())
    with pytest.raises(TypeError, match="optimizer must be a torch optimizer; got dict"):
        wn.from_module_form(model, optimizer.state_dict())
    dist = torch.distributed
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        with pytest.raises(ValueError, match="holds on to g and v; give the model inside"):
            wn.from_module_form(nn.parallel.DistributedDataParallel(model), optimizer)
    finally:
        dist.destroy_process_group()
