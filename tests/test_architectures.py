"""Nets that people train with weight norm: wrapped, trained, saved and loaded in every spelling, folded, exported.

A case is a net and the axes of its lengths: one length per output unit, our default; or as its authors have them where
that is something else (HiFi-GAN's transposed convolutions, wav2vec 2.0's kernel positions).
"""

import copy
import io
from fnmatch import fnmatchcase
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.nn.utils import parametrizations

import weightnorm as wn
from architectures import ARCHITECTURES, BRIEF, DacEncoder, HifiGan, PosConv, Sdf, squared_error

pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated"),
    pytest.mark.filterwarnings("ignore:LSTM with projections"),  # not supported by oneDNN
    pytest.mark.filterwarnings("ignore:The tensor attributes .*_flat_weights"),  # plain recurrent layers export so too
    pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec:FutureWarning"),  # torch.onnx's own use
]

CASES = {name: (net, "output") for name, net in ARCHITECTURES.items()}
CASES |= {f"{name}, its own axes": (ARCHITECTURES[name], ARCHITECTURES[name].dim) for name in ("hifi-gan", "wav2vec2")}
each_case = pytest.mark.parametrize(("net", "dim"), CASES.values(), ids=CASES)
each_brief_net = pytest.mark.parametrize("net", BRIEF.values(), ids=BRIEF)

TOLERANCE = 1e-5  # relative to a whole tensor; rounding in float32 makes 3e-6, a wrong axis in training 3e-3


def places(net, model):
    """Return each weight that the authors normalise: its name in the model, its layer, its name there."""
    found = []
    for path, layer in model.named_modules():
        names = ["weight"] if isinstance(layer, nn.Linear | nn.Conv1d | nn.ConvTranspose1d) else []
        names += [own for own in getattr(layer, "_flat_weights_names", ()) if "weight" in own]
        found += [(f"{path}.{own}", layer, own) for own in names]
    return [place for place in found if not any(fnmatchcase(place[0], pattern) for pattern in net.plain)]


def axis_of(layer, dim):
    return int(isinstance(layer, nn.ConvTranspose1d)) if dim == "output" else dim


def wrapped(form, net, dim, model=None):
    """Return the model with weight norm: in one call in our form, layer by layer in torch's two."""
    model = build(net) if model is None else model
    if form == "ours":
        return wn.weight_norm(model, dim=dim, skip=net.plain)
    torchs = {"parametrization": parametrizations.weight_norm, "hook": nn.utils.weight_norm}
    for _, layer, own in places(net, model) if form != "plain" else ():
        torchs[form](layer, own, axis_of(layer, dim))
    return model


def seeded(draw):
    """Return what is drawn from a fixed seed, whatever was drawn before and comes after."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return draw()


def build(net):
    return seeded(net.build)


@cache
def batches(net):
    """Return inputs and targets of four batches: three to train on, one to compare outputs on."""
    model = build(net)
    with torch.no_grad():
        inputs = seeded(lambda: [[torch.randn(shape) for shape in net.inputs] for _ in range(4)])
        return [(batch, seeded(lambda batch=batch: torch.randn_like(model(*batch)))) for batch in inputs]


def train(net, model, optimizer):
    """Take three steps."""
    for inputs, target in batches(net)[:3]:
        optimizer.zero_grad()
        net.loss(model, inputs, target).backward()
        optimizer.step()
    return model


@cache
def trained(form, net, dim):
    """Return a model after three steps; shared by tests, which leave it as it is."""
    model = wrapped(form, net, dim)
    return train(net, model, torch.optim.AdamW(model.parameters(), lr=1e-3))


def own_copy(form, net, dim):
    """Return a trained model to change; torch's old form has no deep copies."""
    model = wrapped(form, net, dim)
    model.load_state_dict(trained(form, net, dim).state_dict())
    return model


def output(net, model):
    return model(*batches(net)[3][0]).detach()


def parameters(net, model):
    """Return each weight as its layer has it, and the other parameters."""
    stored = ("original0", "original1", "_g", "_v")
    rest = {name: p.detach() for name, p in model.named_parameters() if not name.endswith(stored)}
    return rest | {name: getattr(layer, own).detach() for name, layer, own in places(net, model)}


def distance(one, other):
    return ((one - other).norm() / other.norm().clamp(min=1e-30)).item()


def check_agreement(net, model, expected, tolerance=TOLERANCE):
    """Compare outputs, less their mean; and weights, since a wrong one moves the output of a deep net by little."""
    out = output(net, expected)
    assert distance(output(net, model) - out.mean(), out - out.mean()) < tolerance
    ours, theirs = parameters(net, model), parameters(net, expected)
    assert ours.keys() == theirs.keys()
    errors = {name: distance(ours[name], theirs[name]) for name in ours}
    assert not {name: error for name, error in errors.items() if not error < tolerance}  # NaN is not less


def lengths(model):
    return [g for name, g in model.named_parameters() if name.endswith("original0")]


PUBLISHED = {  # at full width: the elements of all v, which follow from the published shapes
    "hifi-gan": (partial(HifiGan, channels=512), 13.92e6),
    "dac": (partial(DacEncoder, channels=64), 22.28e6),
    "wav2vec2": (partial(PosConv, channels=768), 4.72e6),
    "sdf": (partial(Sdf, width=256), 0.52e6),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_rebuilt_nets_have_the_published_sizes(name):
    make, elements = PUBLISHED[name]
    with torch.device("meta"):
        found = places(ARCHITECTURES[name], make())
    assert len(found) == ARCHITECTURES[name].weights
    assert sum(layer.weight.numel() for _, layer, _ in found) == pytest.approx(elements, rel=0.01)


@each_case
def test_one_call_wraps_what_the_authors_wrap_and_changes_nothing(net, dim):
    plain, model = build(net), wrapped("ours", net, dim)
    check_agreement(net, model, plain, 1e-6)
    assert len(lengths(model)) == net.weights
    for _, layer, own in places(net, model):
        g, v = layer.parametrizations[own].original0, layer.parametrizations[own].original1
        assert g.shape == tuple(size if axis == axis_of(layer, dim) else 1 for axis, size in enumerate(v.shape))


@pytest.mark.parametrize(("name", "std"), [("hifi-gan", 0.01), ("dac", 0.02), ("tcn", 0.01)])
def test_their_initialisation_after_wrapping_has_its_effect(name, std):
    """What ``m.weight.data.normal_(0.0, 0.01)`` was meant to do in all of them, and did in none."""
    net = ARCHITECTURES[name]
    plain, model, before = build(net), wrapped("ours", net, net.dim), build(net)
    seeded(plain.initialise)
    seeded(model.initialise)
    wn.fold(model)
    check_agreement(net, model, plain, 1e-6)
    old, new = parameters(net, before), parameters(net, model)
    drawn = [new[key] for key, _, _ in places(net, model) if distance(new[key], old[key]) > 0.1]
    assert len(drawn) >= net.weights - 1  # HiFi-GAN leaves out its first
    assert torch.cat([w.flatten() for w in drawn]).std().item() == pytest.approx(std, rel=0.02)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
@each_case
def test_three_steps_beside_torch(net, dim, form):
    model = trained("ours", net, dim)
    check_agreement(net, model, trained(form, net, dim))
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.any(), name
    start, end = parameters(net, build(net)), parameters(net, model)
    assert all(distance(end[name], start[name]) > 1e-3 for name, _, _ in places(net, model))  # they did go somewhere


@pytest.mark.parametrize("net", ARCHITECTURES.values(), ids=ARCHITECTURES)
def test_three_steps_in_the_optimizer_form(net):
    model = build(net)
    groups = wn.param_groups(model, skip=net.plain)
    train(net, model, wn.AdamW(groups, lr=1e-3, backend="torch"))
    check_agreement(net, model, trained("ours", net, "output"))


def rows(net, model, dim):
    """Return the first vector of each weight, where that leaves others, as its layer computes it now."""
    weights = [(getattr(layer, own), axis_of(layer, dim)) for _, layer, own in places(net, model)]
    return [weight.select(axis, 0) for weight, axis in weights if weight.shape[axis] > 1]


@each_case
def test_zero_rows_stay_until_they_learn(net, dim):
    plain = build(net)
    with torch.no_grad():
        for row in rows(net, plain, dim):
            row.zero_()
        for name, p in plain.named_parameters():
            if name.endswith("bias"):
                p.abs_()  # or a unit of the TCN could be dead whatever its row is
    model = wrapped("ours", net, dim, copy.deepcopy(plain))
    check_agreement(net, model, plain, 1e-6)
    train(net, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(row.norm() > 1e-5 for row in rows(net, model, dim))


def test_a_whole_weight_of_zeros_learns():
    """WaveGlow's last layer, which its authors leave plain: torch would make NaN of it."""
    net = ARCHITECTURES["waveglow"]
    model = wn.weight_norm(build(net))
    assert len(lengths(model)) == net.weights + 1
    assert not output(net, model).any()
    train(net, model, torch.optim.AdamW(model.parameters(), lr=1e-3))
    assert output(net, model).isfinite().all()
    assert model.end.weight.flatten(1).norm(dim=1).min() > 1e-4


LOADED_BY = {
    "original": ("ours", "parametrization"),
    "gv": ("ours", "parametrization", "hook"),
    "plain": ("ours", "plain"),
}


def through_a_file(value, **options):
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, **options)


@pytest.mark.parametrize("spelling", LOADED_BY)
@each_case
def test_every_spelling_loads_into_every_form_that_has_it(net, dim, spelling):
    model = own_copy("ours", net, dim)
    with torch.no_grad():
        for row in rows(net, model, dim):
            row.zero_()
    own = model.state_dict()
    for along in {dim, net.dim}:  # and as the authors' programs read it
        options = {} if along == dim else {"dim": along}
        state = through_a_file(wn.convert_state_dict(own, to=spelling, **options))
        for form in LOADED_BY[spelling]:
            other = wrapped(form, net, dim if form == "ours" else along)
            other.load_state_dict(state, strict=True)
            check_agreement(net, other, model)
            assert not any(row.any() for row in rows(net, other, dim)), form
        back = wrapped("parametrization", net, dim)
        back.load_state_dict(wn.convert_state_dict(state, to="original", model=model), strict=True)
        check_agreement(net, back, model)


@pytest.mark.parametrize("form", ["parametrization", "hook"])
@each_case
def test_the_authors_checkpoint_loads_along_any_axis(net, dim, form):
    upstream = trained(form, net, net.dim)
    state = through_a_file(upstream.state_dict())
    model = wrapped("ours", net, dim)
    model.load_state_dict(state, strict=True)
    check_agreement(net, model, upstream)
    converted = wrapped("ours", net, dim)
    converted.load_state_dict(wn.convert_state_dict(state, to="original", model=converted), strict=True)
    check_agreement(net, converted, upstream)


def test_hifi_gans_checkpoints_are_along_another_axis_than_ours():
    net = ARCHITECTURES["hifi-gan"]
    assert trained("hook", net, 0).state_dict()["ups.0.weight_g"].shape == (32, 1, 1)
    assert trained("ours", net, "output").ups[0].parametrizations.weight.original0.shape == (1, 16, 1)


HOOKS = [
    "_forward_pre_hooks",
    "_forward_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
]


@pytest.mark.parametrize("form", ["ours", "parametrization", "hook"])
@each_case
def test_fold_leaves_no_trace(net, dim, form):
    plain, expected = build(net), trained(form, net, dim)
    model = own_copy(form, net, dim)
    assert wn.fold(model) == net.weights
    assert wn.fold(model) == 0
    check_agreement(net, model, expected, 1e-6)
    assert [type(layer) for layer in model.modules()] == [type(layer) for layer in plain.modules()]
    assert not [(hooks, layer) for layer in model.modules() for hooks in HOOKS if getattr(layer, hooks)]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [n for n, _ in plain.named_parameters()]
    again = through_a_file(model, weights_only=False)
    assert torch.equal(output(net, again), output(net, model))


@each_case
def test_folding_a_copy_leaves_the_model_training(net, dim):
    model, expected = own_copy("ours", net, dim), trained("ours", net, dim)
    folded = copy.deepcopy(model)
    wn.fold(folded)
    with torch.no_grad():
        for p in folded.parameters():
            p.zero_()
    assert len(lengths(model)) == net.weights
    check_agreement(net, model, expected, 1e-6)
    net.loss(model, *batches(net)[0]).backward()
    assert all(g.grad.any() for g in lengths(model))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # an LSTM in torch's form too
@each_brief_net
def test_compiled_as_one_graph(net):
    torch._dynamo.reset()
    eager, model = (own_copy("ours", net, "output") for _ in range(2))
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    inputs, target = batches(net)[3]
    with torch._dynamo.config.patch(allow_rnn=True):  # without it torch refuses a plain LSTM too
        for one in (eager, compiled):
            squared_error(one, inputs, target).backward()
        assert distance(output(net, compiled), output(net, eager)) < TOLERANCE
    for (key, p), q in zip(eager.named_parameters(), model.parameters(), strict=True):
        assert distance(q.grad, p.grad) < TOLERANCE, key


@pytest.mark.parametrize("form", ["wrapped", "folded"])
@each_brief_net
def test_exported(net, form):
    model = own_copy("ours", net, "output")
    expected = output(net, model)
    if form == "folded":
        assert wn.fold(model) == net.weights
    inputs = tuple(batches(net)[3][0])
    program = torch.export.export(model, inputs)
    assert distance(program.module()(*inputs).detach(), expected) < 1e-6


# Not the LSTM: of one with projections, plain or not, torch 2.13 writes ONNX that does not load.
@pytest.mark.slow
@pytest.mark.parametrize("form", ["wrapped", "folded"])
@pytest.mark.parametrize("name", ["dac", "hifi-gan", "sdf"])
def test_run_as_onnx(name, form):
    import onnxruntime

    net = BRIEF[name]
    model = own_copy("ours", net, "output")
    expected = output(net, model)
    if form == "folded":
        assert wn.fold(model) == net.weights
    inputs = tuple(batches(net)[3][0])
    program = torch.onnx.export(model.eval(), inputs, dynamo=True, verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    feeds = {slot.name: x.numpy() for slot, x in zip(session.get_inputs(), inputs, strict=True)}
    assert distance(torch.from_numpy(session.run(None, feeds)[0]), expected) < TOLERANCE


SDF = ARCHITECTURES["sdf"]


def sdf(form):
    return own_copy(form, SDF, 0).double()


def eikonal_loss(model):
    inputs, target = batches(SDF)[0]
    return SDF.loss(model, [x.double() for x in inputs], target.double())


def slopes(model, **options):
    """Return the gradient of a loss that holds a gradient."""
    return torch.autograd.grad(eikonal_loss(model), list(model.parameters()), **options)


def curvature(model, step):
    """Return the Hessian of the loss times ``step``: a third derivative."""
    weighted = sum((slope * by).sum() for slope, by in zip(slopes(model, create_graph=True), step, strict=True))
    return torch.autograd.grad(weighted, list(model.parameters()))


def curvature_by_differences(model, step, small=1e-7):
    sides = []
    for sign in (1, -1):
        moved = copy.deepcopy(model)
        with torch.no_grad():
            for p, by in zip(moved.parameters(), step, strict=True):
                p.add_(by, alpha=sign * small)
        sides.append(slopes(moved))
    return [(up - down) / (2 * small) for up, down in zip(*sides, strict=True)]


def test_the_eikonal_loss_has_the_gradient_of_the_formula():
    model = sdf("ours")
    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    weights = {}
    for i in range(SDF.weights):
        g, v = (leaves[f"lins.{i}.parametrizations.weight.original{k}"] for k in (0, 1))
        weights |= {f"lins.{i}.weight": g * v / v.norm(dim=1, keepdim=True), f"lins.{i}.bias": leaves[f"lins.{i}.bias"]}
    plain = build(SDF).double()
    loss = eikonal_loss(lambda points: functional_call(plain, weights, (points,)))
    expected = torch.autograd.grad(loss, list(leaves.values()))
    for name, slope, right in zip(leaves, slopes(model), expected, strict=True):
        assert distance(slope, right) < 1e-10, name


@pytest.mark.parametrize("form", ["ours", "parametrization"])
def test_the_eikonal_loss_has_the_curvature_of_its_slopes(form):
    """What Newton's method and meta-learning need. torch's is wrong: its saved norms count as constants there."""
    model = sdf(form)
    step = [torch.randn_like(p) for p in model.parameters()]
    found, expected = curvature(model, step), curvature_by_differences(model, step)
    errors = [distance(one, other) for one, other in zip(found, expected, strict=True)]
    if form == "ours":
        assert all(error < 1e-6 for error in errors)
    else:
        assert max(errors) > 5e-3  # whatever ``small`` is, 1e-5 to 1e-8


LSTM = ARCHITECTURES["lstm"]


def flat_weights(lstm):
    """Return what torch's kernels are given beside what the layer says its weights are."""
    return list(zip(lstm._flat_weights, (getattr(lstm, name) for name in lstm._flat_weights_names), strict=True))


def test_every_gate_row_of_an_lstm_has_a_length_of_its_own():
    model = wrapped("ours", LSTM, 0)
    LSTM.loss(model, *batches(LSTM)[0]).backward()
    for name, layer, own in places(LSTM, model):
        g = layer.parametrizations[own].original0
        assert len(g) == (5 if "hr" in name else 4 * 8)
        assert (g.grad != 0).all(), name
        with torch.no_grad():
            g.copy_(torch.arange(1.0, len(g) + 1).unsqueeze(1))
        torch.testing.assert_close(getattr(layer, own).norm(dim=1, keepdim=True), g)


def test_an_lstm_runs_on_the_weights_that_it_has():
    model = own_copy("ours", LSTM, 0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for inputs, target in batches(LSTM)[:3]:
        LSTM.loss(model, inputs, target).backward()
        optimizer.step()
        plain = build(LSTM)
        plain.load_state_dict(wn.convert_state_dict(model.state_dict()))
        check_agreement(LSTM, model, plain, 1e-6)  # after a forward, which is when torch makes the list anew
        assert all(torch.equal(used, weight) for used, weight in flat_weights(model.lstm))
    wn.fold(model)
    check_agreement(LSTM, model, plain, 1e-6)
    assert all(used is weight for used, weight in flat_weights(model.lstm))
    train(LSTM, model, torch.optim.SGD(model.parameters(), lr=0.1))
    assert all(used is weight for used, weight in flat_weights(model.lstm))
    assert distance(output(LSTM, model), output(LSTM, plain)) > 1e-2


def test_an_lstm_initialises_after_wrapping():
    plain, model = build(LSTM), wrapped("ours", LSTM, 0)
    seeded(plain.initialise)
    seeded(model.initialise)
    check_agreement(LSTM, model, plain, 1e-6)
    columns = model.lstm.weight_hh_l1_reverse.detach()
    torch.testing.assert_close(columns.mT @ columns, torch.eye(5))
