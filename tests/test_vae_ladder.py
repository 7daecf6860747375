"""The variational autoencoder of CIFAR-10: its likelihood, its bound, and who depends on whom."""

import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributions import Normal, kl_divergence

import weightnorm as wn
from weightnorm.tasks.vae.ladder import RESIDUAL, STD, Gaussian, LadderVAE, Layer
from weightnorm.tasks.vae.logistic import bits_per_dimension, log_probability

CONVOLUTIONS = nn.Conv2d | nn.ConvTranspose2d
LATENTS = 3
LOCATIONS = [-3.0, -0.5, -0.1, 0.0, 0.123, 0.5, 3.0]
LOG_SCALES = [-7.0, -4.0, -2.0, 0.0, 3.0]


def images(count=6):
    """Return smooth images of integers: few waves, in random colours."""
    generator = np.random.default_rng(0)
    waves = np.sin(np.linspace(0, 6, 32) * generator.uniform(0.5, 2, (count, 3, 1)))
    noise = generator.normal(0, 10, (count, 3, 32, 32))
    return torch.from_numpy((127 + 90 * waves[..., None] * waves[..., None, :] + noise).clip(0, 255).round()).float()


def small(initialised=True, **options):
    """Return two layers of 16 x 16 and one of 8 x 8, whose statistics differ from zero if it is initialised."""
    torch.manual_seed(0)
    model = LadderVAE(8, LATENTS, (2, 1), **options)
    if initialised:
        wn.data_init(model, images(), std=STD)
    return model


def outputs_of_convolutions(model, run):
    """Run it, and return what each convolution put out, by name, and what came back."""
    seen, hooks = {}, []
    for name, layer in model.named_modules():
        if isinstance(layer, CONVOLUTIONS):
            hooks.append(layer.register_forward_hook(lambda _, __, out, name=name: seen.update({name: out.detach()})))
    result = run()
    for hook in hooks:
        hook.remove()
    return seen, result


def log_of_difference(x, location, log_scale):
    """Return the logarithm of the probability of each bin, from differences of the distribution function in float64."""
    below = ((np.where(x == 0, -np.inf, x / 256) - 0.5) - location) / np.exp(log_scale)
    above = ((np.where(x == 255, np.inf, (x + 1) / 256) - 0.5) - location) / np.exp(log_scale)
    upper_half = below > 0  # there both are near 1: subtract what is left to 1
    low, high = np.where(upper_half, -above, below), np.where(upper_half, -below, above)
    with np.errstate(over="ignore", divide="ignore"):
        return np.log(1 / (1 + np.exp(-high)) - 1 / (1 + np.exp(-low)))


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize("location", LOCATIONS)
def test_probabilities_of_bins_are_differences_of_the_distribution_function_and_sum_to_one(location, log_scale):
    x = np.arange(256.0)
    ours = log_probability(torch.from_numpy(x), torch.tensor(location), torch.tensor(log_scale))
    assert ours.dtype == torch.float32
    rounding = 4e-7 * math.exp(-log_scale)  # of a and b, which are edges divided by the scale
    assert abs(ours.double().exp().sum() - 1) < 1e-5 + rounding
    theirs = log_of_difference(x, location, log_scale)
    visible = theirs > -600  # where float64 does not underflow
    assert visible.any()
    np.testing.assert_allclose(ours.numpy()[visible], theirs[visible], rtol=1e-5, atol=1e-5 + rounding)
    assert ours.isfinite().all()


@pytest.mark.parametrize("log_scale", LOG_SCALES)
@pytest.mark.parametrize(("x", "location", "side"), [(0, 100, -1), (255, -100, 1), (99, 100, -1), (99, -100, 1)])
def test_gradients_far_out_are_finite_and_point_back(x, location, side, log_scale):
    where, width = (torch.tensor(float(value), requires_grad=True) for value in (location, log_scale))
    log_probability(torch.tensor(x), where, width).backward()
    slope = 1 / math.exp(log_scale) * math.tanh(100 / math.exp(log_scale) / 2)
    assert where.grad.item() == pytest.approx(side * slope, rel=0.02)
    assert width.grad.isfinite()


def test_a_uniform_distribution_has_eight_bits():
    assert bits_per_dimension(3072 * math.log(256)) == pytest.approx(8)
    assert bits_per_dimension(10 * math.log(2), count=5) == pytest.approx(2)


@pytest.mark.parametrize("std", [0.1, 2.0])
def test_divergence_of_gaussians_is_that_of_torch(std):
    torch.manual_seed(0)
    numbers = (std * torch.randn(4, 500, dtype=torch.float64)).unbind()
    ours = Gaussian(*numbers[:2]).divergence(Gaussian(*numbers[2:]))
    (mean, log_std), (prior_mean, prior_log_std) = numbers[:2], numbers[2:]
    theirs = kl_divergence(Normal(mean, log_std.exp()), Normal(prior_mean, prior_log_std.exp()))
    torch.testing.assert_close(ours, theirs)


def test_samples_of_gaussians_have_their_moments():
    torch.manual_seed(0)
    samples = Gaussian(torch.full((100_000,), 3.0), torch.full((100_000,), -1.0)).sample()
    assert samples.mean().item() == pytest.approx(3, abs=0.01)
    assert samples.std().item() == pytest.approx(math.exp(-1), rel=0.02)


def recomputed(model, x):
    """Return the reconstruction (N,) and the divergences by channel (N, channels of all layers), and what came back."""
    seen, result = outputs_of_convolutions(model, lambda: model.objective(x))
    divergences = []
    for i in range(len(model.layers)):
        up, down = (seen[f"layers.{i}.{way}_in"].double() for way in ("up", "down"))
        up_mean, up_log_std = up[:, :LATENTS], up[:, LATENTS : 2 * LATENTS]
        prior_mean, prior_log_std, mean, log_std = down[:, : 4 * LATENTS].split(LATENTS, dim=1)
        posterior = Normal(up_mean + mean, (up_log_std + log_std).exp())
        divergences.append(kl_divergence(posterior, Normal(prior_mean, prior_log_std.exp())).sum((2, 3)).numpy())
    log_scale = model.log_scale.item()
    reconstruction = -log_of_difference(x.double().numpy(), seen["output"].double().numpy(), log_scale).sum((1, 2, 3))
    return reconstruction, np.concatenate(divergences, axis=1), result


@pytest.mark.parametrize("level", ["below all", "among them", "above all"])
def test_the_bound_and_what_free_bits_add_are_those_of_the_statistics_of_the_layers(level):
    model, x = small(), images()
    channels = np.sort(recomputed(model, x)[1].mean(0))
    model.free_bits = {"below all": channels[0] / 2, "among them": np.median(channels), "above all": channels[-1] + 1}[
        level
    ].item()
    reconstruction, divergences, result = recomputed(model, x)
    missing = np.maximum(model.free_bits - divergences.mean(0), 0)
    assert (missing > 0).sum() == {"below all": 0, "among them": 4, "above all": 9}[level]
    for ours, theirs in zip(result, (reconstruction, divergences.sum(1), missing.sum()), strict=True):
        np.testing.assert_allclose(ours.detach().numpy(), theirs, rtol=1e-4, atol=1e-6)
    assert [tuple(part.shape) for part in result] == [(6,), (6,), ()]


def test_the_bound_does_not_know_of_free_bits():
    bounds = []
    for free_bits in (0.0, 1e6):
        model = small(free_bits=free_bits)
        torch.manual_seed(1)
        bounds.append(torch.stack(model(images())))
    assert torch.equal(*bounds)


def test_divergences_below_their_free_bits_have_no_gradient():
    model = small(free_bits=1e6)
    _, divergence, penalty = model.objective(images())
    (divergence.mean() + penalty).backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert len(gradients) > 20
    assert max(gradient.abs().max() for gradient in gradients) < 1e-3 * penalty.item() / 1e6


def used_by(model, value):
    """Return the names of the layers' weights, and of the other parameters, on which a value depends."""
    names, parameters = zip(*model.named_parameters(), strict=True)
    gradients = torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=True)
    pairs = zip(names, gradients, strict=True)
    return {name for name, gradient in pairs if gradient is not None and gradient.any() and "bias" not in name}


def test_every_posterior_sees_the_image_and_the_layers_above_and_none_below():
    model = small()
    _, divergences = model._infer(images())
    ways_up = {f"layers.{i}.{part}.weight" for i in (0, 1) for part in ("up_in", "up_out")} | {"layers.2.up_in.weight"}
    first = ways_up | {"input.weight", "top"}
    second, third = ({f"layers.{above}.down_out.weight", f"layers.{above - 1}.down_in.weight"} for above in (2, 1))
    expected = [first | {"layers.2.down_in.weight"}]
    for more in (second, third):
        expected.append(expected[-1] | more)
    for divergence, names in zip(divergences.split(LATENTS, dim=1), expected, strict=True):
        assert used_by(model, divergence.sum()) == names


def test_the_lowest_posterior_adds_what_the_image_and_what_the_layers_above_say():
    layer = small().layers[0]
    torch.manual_seed(0)
    h, mean, log_std = torch.randn(2, 8, 16, 16), torch.randn(2, LATENTS, 16, 16), torch.randn(2, LATENTS, 16, 16)
    inputs = [tensor.requires_grad_() for tensor in (h, mean, log_std)]
    _, divergence = layer.down(h, Gaussian(mean, log_std))
    assert all(gradient.abs().min() > 0 for gradient in torch.autograd.grad(divergence.sum(), inputs))


def test_no_parameter_is_idle():
    model = small()
    reconstruction, divergence, _ = model.objective(images())
    (reconstruction + divergence).mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


def test_without_evidence_latents_come_from_the_prior():
    model = small()
    with torch.no_grad():
        _, divergences = model._generate([None] * 3, 5)
    assert divergences.shape == (5, 3 * LATENTS)
    assert not divergences.any()


def test_branches_of_zero_leave_the_image_to_what_enters_at_the_top():
    model = small()
    for layer in model.layers:
        nn.init.zeros_(layer.down_out.weight)
        nn.init.constant_(layer.down_out.bias, 2)
    top = torch.nn.functional.interpolate(model.top[None].detach() + 2 * RESIDUAL, scale_factor=2)
    expected = model.output(torch.nn.functional.elu(top + 2 * 2 * RESIDUAL)) + 0.5
    torch.testing.assert_close(model.sample(1), expected.detach().clamp(0, 1))


@pytest.mark.parametrize("halves", [False, True])
def test_branches_of_zero_on_the_way_up_leave_the_means_of_the_features(halves):
    torch.manual_seed(0)
    layer, h = Layer(8, LATENTS, halves, topmost=False), torch.randn(2, 8, 4, 4)
    nn.init.zeros_(layer.up_out.weight)
    nn.init.constant_(layer.up_out.bias, 2)
    kept = h.unflatten(3, (2, 2)).unflatten(2, (2, 2)).mean((3, 5)) if halves else h
    torch.testing.assert_close(layer.up(h)[0], kept + 2 * RESIDUAL)


@pytest.mark.parametrize(
    ("depths", "maps"), [((1,), [16]), ((1, 1, 1), [4, 8, 16]), ((2, 2), [8, 8, 16, 16]), ((3,), [16] * 3)]
)
def test_images_come_out_as_images_and_maps_have_the_sizes_of_their_levels(depths, maps):
    torch.manual_seed(0)
    model, x = LadderVAE(4, 2, depths), images(3)
    seen, samples = outputs_of_convolutions(model, lambda: model.sample(3))
    assert [out.shape[-1] for name, out in seen.items() if name.endswith("down_in")] == maps
    for pictures in (samples, model.reconstruct(x)):
        assert pictures.shape == (3, 3, 32, 32)
        assert pictures.dtype == torch.float32
        assert pictures.min() >= 0
        assert pictures.max() <= 1
        assert pictures.std() > 0
        assert not pictures.requires_grad


def test_reconstructions_resemble_their_images_after_training():
    model, x = small(), images()
    optimizer = wn.Adamax(model, lr=0.02, v_std=0.05, backend="torch")
    for _ in range(60):
        train(model, optimizer, x)
    errors = torch.cdist(model.reconstruct(x).flatten(1), x.flatten(1) / 255)
    assert errors.argmin(1).tolist() == list(range(len(x)))


def train(model, optimizer, x):
    reconstruction, divergence, penalty = model.objective(x)
    loss = (reconstruction + divergence).mean() + penalty
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def test_the_default_has_the_sizes_of_the_authors_code():
    model = LadderVAE()
    width, latents, pixel = 160, 32, 9
    up, topmost = pixel * width * (2 * latents + width) + pixel * width * width, pixel * width * 2 * latents
    down = pixel * width * (4 * latents + width) + pixel * (latents + width) * width
    weights = 3 * up + topmost + 4 * down + 2 * 25 * 3 * width
    biases = 3 * (2 * latents + 2 * width) + 2 * latents + 4 * (4 * latents + 2 * width) + width + 3
    assert sum(parameter.numel() for parameter in model.parameters()) == weights + biases + width * 8 * 8 + 1


def test_data_dependent_initialisation_standardises_every_convolution():
    model = small(initialised=False)
    torch.manual_seed(3)
    report = wn.data_init(model, images(), std=STD)  # which draws the noise that the next pass draws
    seen, _ = outputs_of_convolutions(model, lambda: model(images()))
    assert len(report.layers) == len(seen) == 13
    for name, out in seen.items():
        std = STD["output"] if name == "output" else STD["*_in"] if name.endswith("_in") else 1.0
        units = out.transpose(0, 1).flatten(1)
        torch.testing.assert_close(units.mean(1), torch.zeros(len(units)), atol=1e-4, rtol=0)
        torch.testing.assert_close(units.std(1, correction=0), torch.full((len(units),), std), atol=0, rtol=1e-3)


def test_every_convolution_is_normalised_and_nothing_else():
    model = small()
    normalised = {entry.name for entry in wn.param_groups(model).entries if entry.axis is not None}
    assert normalised == {f"{name}.weight" for name, part in model.named_modules() if isinstance(part, CONVOLUTIONS)}


@pytest.mark.parametrize("form", ["optimizer", "module"])
def test_both_forms_train(form):
    model = small()
    if form == "optimizer":
        optimizer = wn.Adamax(model, lr=0.002, v_std=0.05, backend="torch")
    else:
        wn.weight_norm(model)
        optimizer = torch.optim.Adamax(model.parameters(), lr=0.002)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    assert all(math.isfinite(train(model, optimizer, images())) for _ in range(3))
    for old, new in zip(before, model.parameters(), strict=True):
        assert new.isfinite().all()
        assert not torch.equal(old, new)


def test_the_bound_is_float32_under_autocast_and_the_same_with_channels_last(monkeypatch):
    monkeypatch.setattr(Gaussian, "sample", lambda self: self.mean)  # noise is drawn in the order of memory
    model = small()
    bounds = {}
    for name, half, memory_format in [
        ("plain", False, torch.contiguous_format),
        ("half", True, torch.contiguous_format),
        ("last", False, torch.channels_last),
    ]:
        model.to(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, enabled=half), torch.no_grad():
            parts = model(images().to(memory_format=memory_format))
        assert [part.dtype for part in parts] == [torch.float32, torch.float32]
        bounds[name] = torch.stack(parts)
    torch.testing.assert_close(bounds["half"], bounds["plain"], rtol=0.02, atol=0)
    torch.testing.assert_close(bounds["last"], bounds["plain"])
