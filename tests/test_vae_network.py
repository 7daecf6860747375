"""The paper's convolutional variational autoencoder: its densities, its shapes, and weight norm on masked weights."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd.functional import jacobian
from torch.distributions import Normal, kl_divergence

import weightnorm as wn
from weightnorm.tasks.vae import posterior
from weightnorm.tasks.vae.posterior import AutoregressiveStep, FlowPosterior, mask_weights
from weightnorm.tasks.vae.resnet import Block, ConvolutionalVAE

pytest.importorskip("zuko")

LATENTS, CONTEXT, HIDDEN = 5, 7, 20
SPREAD = 0.7  # of weights that make a step far from the identity


def draw(model, std):
    """Draw weights as tasks do, biases with them."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=std)
            nn.init.normal_(layer.bias, std=std)
    mask_weights(model)
    return model


def masked(model):
    return [layer for layer in model.modules() if hasattr(layer, "mask")]


def images(count):
    return torch.rand(count, 1, 28, 28).round()


@pytest.mark.parametrize("spread", [None, SPREAD])  # None: as it is made
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("context", [0, 1, CONTEXT])
def test_a_step_is_autoregressive_with_the_determinant_it_says(context, reverse, spread):
    step = AutoregressiveStep(LATENTS, context, HIDDEN, reverse).double()
    if spread is not None:
        draw(step, spread)
    z, h = torch.randn(1, LATENTS).double(), torch.randn(1, context).double()
    matrix = jacobian(lambda z: step(z, h)[0], z)[0, :, 0]
    seen = torch.ones(LATENTS, LATENTS).tril().bool()
    assert torch.equal(matrix != 0, seen.T if reverse else seen)
    torch.testing.assert_close(step(z, h)[1][0], torch.linalg.slogdet(matrix)[1], rtol=1e-12, atol=1e-12)


def test_every_part_of_a_step_sees_the_context():
    step = draw(AutoregressiveStep(LATENTS, CONTEXT, HIDDEN).double(), SPREAD)
    z, h = torch.randn(1, LATENTS).double(), torch.randn(1, CONTEXT).double()
    assert (jacobian(lambda h: step(z, h)[0], h) != 0).all()


def test_a_closed_gate_puts_out_m_and_keeps_its_logarithm():
    step = AutoregressiveStep(LATENTS, 0, HIDDEN)
    with torch.no_grad():
        step.network[-1].bias[LATENTS:] = -200  # sigmoid is 0 in float32, its logarithm is not
    z = torch.randn(3, LATENTS)
    after, log_det = step(z, z[:, :0])
    torch.testing.assert_close(after, step.network(z)[:, :LATENTS])
    torch.testing.assert_close(log_det, torch.full((3,), LATENTS * (posterior.OPEN - 200)), rtol=0.05, atol=0)


@pytest.mark.parametrize("steps", [0, 1, 2, 3])
def test_divergence_is_log_q_minus_log_p_by_change_of_variables(steps, monkeypatch):
    flow = draw(FlowPosterior(CONTEXT, LATENTS, steps, HIDDEN).double(), SPREAD)
    h, noise = torch.randn(1, CONTEXT).double(), torch.randn(1, LATENTS).double()

    def drawn(noise):
        monkeypatch.setattr(torch, "randn_like", lambda _: noise)
        return flow(h)

    z, divergence = drawn(noise)
    log_det = torch.linalg.slogdet(jacobian(lambda noise: drawn(noise)[0], noise)[0, :, 0])[1]
    prior = Normal(torch.zeros(()).double(), 1)
    expected = prior.log_prob(noise).sum() - log_det - prior.log_prob(z).sum()
    torch.testing.assert_close(divergence[0], expected, rtol=1e-10, atol=1e-10)


def test_without_steps_divergence_averages_to_the_gaussians():
    flow = draw(FlowPosterior(CONTEXT, LATENTS, 0, HIDDEN), 0.3)
    h = torch.randn(1, CONTEXT)
    _, divergence = flow(h.expand(100_000, -1))
    mean, log_std = flow.gaussian(h)[0].chunk(2)
    exact = kl_divergence(Normal(mean, log_std.exp()), Normal(0.0, 1.0)).sum()
    assert (divergence.mean() - exact).abs() < 4 * divergence.std() / len(divergence) ** 0.5


def test_steps_alternate_their_order():
    flow = FlowPosterior(CONTEXT, LATENTS, 3, HIDDEN)
    firsts = [(step.network[0].mask[:, :LATENTS].sum(0) == 0).nonzero().flatten().tolist() for step in flow.steps]
    assert firsts == [[LATENTS - 1], [0], [LATENTS - 1]]  # the latent that nothing sees


def module_form_drawn_after(model):
    return draw(wn.weight_norm(model), SPREAD)


def adamax(model):
    return torch.optim.Adamax(model.parameters(), lr=0.01)


@pytest.mark.parametrize("context", [0, CONTEXT], ids=["rows that are masked whole", "context"])
@pytest.mark.parametrize(
    ("form", "optimizer"),
    [
        (lambda model: model, adamax),
        (lambda model: model, lambda model: wn.Adamax(model, lr=0.01, v_std=0.05, backend="torch")),
        (wn.weight_norm, adamax),
        (module_form_drawn_after, adamax),
    ],
    ids=["plain", "optimizer", "module form", "module form, drawn after"],
)
@pytest.mark.filterwarnings("ignore:data_init left units")  # those that are masked whole
def test_masked_weights_stay_zero_and_the_step_autoregressive_in_training(form, optimizer, context):
    step = form(draw(AutoregressiveStep(LATENTS, context, HIDDEN), 0.05))
    z, h = torch.randn(200, LATENTS), torch.randn(200, context)
    wn.data_init(step, (z, h))
    before, opt = copy.deepcopy(step.state_dict()), optimizer(step)
    for _ in range(20):
        opt.zero_grad()
        after, log_det = step(z, h)
        (after.square().sum(1) / 2 - log_det).mean().backward()
        opt.step()
    for name, value in step.state_dict().items():
        assert value.isfinite().all()
        assert value.dtype == torch.bool or not torch.equal(value, before[name])
    assert all((layer.weight[~layer.mask] == 0).all() for layer in masked(step))
    matrix = jacobian(lambda z: step(z, h[:1])[0], z[:1])[0, :, 0]
    assert torch.equal(matrix != 0, torch.ones(LATENTS, LATENTS).tril().bool())


def test_both_forms_train_masked_weights_alike():
    plain = draw(AutoregressiveStep(LATENTS, CONTEXT, HIDDEN).double(), 0.05)
    module = wn.weight_norm(copy.deepcopy(plain))
    z, h = torch.randn(50, LATENTS).double(), torch.randn(50, CONTEXT).double()
    for step, opt in ((plain, wn.Adamax(plain, lr=0.01, backend="torch")), (module, adamax(module))):
        for _ in range(10):
            opt.zero_grad()
            after, log_det = step(z, h)
            (after.square().sum(1) / 2 - log_det).mean().backward()
            opt.step()
    torch.testing.assert_close(plain(z, h), module(z, h), rtol=1e-9, atol=1e-9)


def test_weights_are_masked_from_the_start():
    layers = masked(ConvolutionalVAE())
    assert len(layers) == 4
    assert all((layer.weight[~layer.mask] == 0).all() and (layer.weight[layer.mask] != 0).all() for layer in layers)


def test_the_layers_have_the_papers_sizes():
    model, shapes = ConvolutionalVAE(), []
    for part in (*model.encoder, *model.decoder):
        part.register_forward_hook(lambda part, _, out: shapes.append((type(part).__name__, *out.shape[1:])))
    model(images(2))
    assert shapes == [
        ("Block", 16, 28, 28),
        ("Block", 16, 14, 14),
        ("Block", 32, 14, 14),
        ("Block", 32, 7, 7),
        ("Block", 32, 7, 7),
        ("Block", 32, 7, 7),
        ("ELU", 32, 7, 7),
        ("Flatten", 1568),
        ("Linear", 450),
        ("ELU", 450),
        ("Linear", 450),
        ("ELU", 450),
        ("Linear", 1568),
        ("Unflatten", 32, 7, 7),
        ("Block", 32, 7, 7),
        ("Block", 32, 7, 7),
        ("Block", 32, 14, 14),
        ("Block", 16, 14, 14),
        ("Block", 16, 28, 28),
        ("Block", 1, 28, 28),
    ]
    assert model.posterior.gaussian.out_features == 2 * 32


def test_every_convolution_is_3x3_and_a_skip_has_one_where_the_shape_changes():
    model = ConvolutionalVAE()
    for half, kind in ((model.encoder, nn.Conv2d), (model.decoder, nn.ConvTranspose2d)):
        convs = [part for part in half.modules() if isinstance(part, nn.Conv2d | nn.ConvTranspose2d)]
        assert all(isinstance(conv, kind) and conv.kernel_size == (3, 3) for conv in convs)
        assert len(convs) == 6 * 2 + 4  # two blocks keep the shape


def test_the_number_of_parameters():
    # Encoder: convolutions and 1568 x 450; posterior: a Gaussian and two steps; decoder: its mirror.
    blocks = [(1, 16, 1), (16, 16, 1), (16, 32, 1), (32, 32, 1), (32, 32, 0), (32, 32, 0)]  # in, out, skip
    encoder = sum(9 * b * (a + b) + 2 * b + skip * (9 * a * b + b) for a, b, skip in blocks) + 1569 * 450
    decoder = sum(9 * b * (a + b) + a + b + skip * (9 * a * b + a) for a, b, skip in blocks) + 33 * 450 + 451 * 1568
    flow = 451 * 64 + 2 * ((32 + 450 + 1) * 320 + 321 * 64)
    assert sum(parameter.numel() for parameter in ConvolutionalVAE().parameters()) == encoder + flow + decoder
    assert encoder + flow + decoder == 1_992_806


def test_forward_returns_the_negative_log_likelihood_and_the_divergence():
    model, x = draw(ConvolutionalVAE(), 0.05), torch.rand(4, 1, 28, 28)
    torch.manual_seed(1)
    reconstruction, divergence = model(x)
    torch.manual_seed(1)
    z, own = model.posterior(model.encoder(x))
    p = 1 / (1 + np.exp(-model.decoder(z).detach().double().numpy()))
    log_likelihood = x.numpy() * np.log(p) + (1 - x.numpy()) * np.log1p(-p)
    np.testing.assert_allclose(reconstruction.detach(), -log_likelihood.sum((1, 2, 3)), rtol=1e-5)
    assert torch.equal(divergence, own)
    assert reconstruction.dtype == divergence.dtype == torch.float32
    assert reconstruction.shape == divergence.shape == (4,)


def test_under_autocast_both_parts_are_float32_and_near_those_without():
    model, x = draw(ConvolutionalVAE(), 0.05), images(4)
    torch.manual_seed(1)
    exact = model(x)
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(x)
    for ours, wanted in zip(found, exact, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=0.02, atol=0.2)


def test_forward_reads_no_values_and_makes_nothing_on_another_device():
    model, x = ConvolutionalVAE().to("meta"), torch.empty(2, 1, 28, 28, device="meta")
    assert all(part.is_meta and part.shape == (2,) for part in model(x))
    assert model.sample(2).is_meta
    assert model.reconstruct(x).is_meta


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("outputs", "stride"), [(4, 1), (4, 2), (6, 1)])
def test_a_block_adds_its_branch_to_its_input_or_to_a_convolution_of_it(outputs, stride, transposed):
    block, x = Block(4, outputs, stride, transposed), torch.randn(2, 4, 6, 6)
    branch = nn.Sequential(nn.ELU(), block.conv1, nn.ELU(), block.conv2)(x)
    changes = (outputs, stride) != (4, 1)
    torch.testing.assert_close(block(x) - branch, block.skip(x) if changes else x)
    assert branch.shape == (2, outputs, *[6 * stride if transposed else 6 // stride] * 2)
    assert (block.conv1.stride, block.conv2.stride)[transposed] == (stride, stride)


@pytest.mark.parametrize("kind", ["sample", "reconstruct"])
def test_images_are_means_in_the_unit_interval(kind):
    model = draw(ConvolutionalVAE(), 0.05)
    found = model.sample(3) if kind == "sample" else model.reconstruct(images(3))
    assert found.shape == (3, 1, 28, 28)
    assert found.dtype == torch.float32
    assert not found.requires_grad
    assert ((found >= 0) & (found <= 1)).all()
    assert found.std() > 0


def test_data_init_standardises_every_layer():
    model, x, outputs = draw(ConvolutionalVAE(), 0.05), images(50), {}
    torch.manual_seed(1)
    report = wn.data_init(model, x)
    assert not report.left_out
    assert not any(layer.left_alone for layer in report.layers)
    layers = {name: layer for name, layer in model.named_modules() if getattr(layer, "weight", None) is not None}
    assert [layer.name for layer in report.layers if layer.name in layers] == [layer.name for layer in report.layers]
    assert len(report.layers) == len(layers) == 40
    for name, layer in layers.items():
        layer.register_forward_hook(lambda _, __, out, name=name: outputs.update({name: out.movedim(1, 0).flatten(1)}))
    torch.manual_seed(1)
    model(x)
    for out in outputs.values():
        torch.testing.assert_close(out.mean(1), torch.zeros(len(out)), rtol=0, atol=1e-3)
        torch.testing.assert_close(out.std(1, correction=0), torch.ones(len(out)), rtol=1e-3, atol=0)
