"""DRAW computes what its equations say, re-derived here pixel by pixel and gate by gate in NumPy."""

from copy import deepcopy
from math import exp, log

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

import weightnorm as wn
from weightnorm.tasks.draw.attention import AttentionReader, AttentionWriter, Filterbank
from weightnorm.tasks.draw.network import Draw

AIMS = [  # centre y and x, log δ, log σ², log γ
    (0, 0, 0, 0, 0),
    (0.3, -0.7, -1, 0.5, 0.4),
    (-1, 1, -2, -1, -0.5),
    (0.11, 0.12, 0.5, 3, 1),
    (0.9, 0.2, -3, -4, 2),  # filters narrower than a pixel
    (-5, 0, 0, 0, 0.1),  # outside of the image: the rows' filters are nearly zero
]
SIZES = [(28, 2), (28, 5), (7, 3), (12, 12), (5, 8)]  # image, n


def bank(image, n, g, log_delta, log_variance):
    """Equations 21-26 in their own indices, from 1; the centre is [D]'s, half an image from the 0th pixel, plus 1."""
    centre = (g + 1) / 2 * image + 1
    delta = (image - 1) / (n - 1) * exp(log_delta)
    filters = np.zeros((n, image))
    for i in range(1, n + 1):
        mean = centre + (i - n / 2 - 0.5) * delta
        for a in range(1, image + 1):
            filters[i - 1, a - 1] = exp(-((a - mean) ** 2) / (2 * exp(log_variance)))
        filters[i - 1] /= filters[i - 1].sum() + 1e-4
    return filters


def banks(image, n, aim):
    y, x, log_delta, log_variance, log_gamma = map(float, aim)
    return bank(image, n, y, log_delta, log_variance), bank(image, n, x, log_delta, log_variance), exp(log_gamma)


def read(image, n, aim):
    rows, columns, gamma = banks(len(image), n, aim)
    patch = np.zeros((n, n))
    for i in range(n):
        for j in range(n):
            patch[i, j] = gamma * (rows[i][:, None] * columns[j][None] * image).sum()
    return patch


def write(patch, size, aim):
    rows, columns, gamma = banks(size, len(patch), aim)
    image = np.zeros((size, size))
    for i in range(len(patch)):
        for j in range(len(patch)):
            image += rows[i][:, None] * patch[i, j] * columns[j][None] / gamma
    return image


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


class Paper:
    """One example through equations 3-8, float64, with the weights of a model."""

    def __init__(self, model):
        self.attention = model.reader is not None
        self.weights = {name: value.double().numpy() for name, value in model.state_dict().items()}
        self.canvas, self.encoder, self.decoder = np.zeros((28, 28)), (np.zeros(256),) * 2, (np.zeros(256),) * 2

    def linear(self, name, x):
        return self.weights[f"{name}.weight"] @ x + self.weights[f"{name}.bias"]

    def lstm(self, name, x, state):
        w = self.weights
        gates = w[f"{name}.weight_ih"] @ x + w[f"{name}.bias_ih"] + w[f"{name}.weight_hh"] @ state[0]
        enter, forget, new, leave = gates.reshape(4, 256)
        cell = sigmoid(forget) * state[1] + sigmoid(enter) * np.tanh(new)
        return sigmoid(leave) * np.tanh(cell), cell

    def infer(self, x, noise):
        divergence = 0
        for step in noise:
            images = np.stack([x, x - sigmoid(self.canvas)])
            if self.attention:
                aim = self.linear("reader.aim", self.decoder[0])
                images = np.stack([read(image, 2, aim) for image in images])
            # Rows before channels: any order would do, a weight each
            seen = images.transpose(1, 0, 2).ravel()
            self.encoder = self.lstm("encoder", np.concatenate([seen, self.decoder[0]]), self.encoder)
            mean, log_std = self.linear("posterior", self.encoder[0]).reshape(2, 100)
            divergence += (0.5 * (mean**2 + np.exp(log_std) ** 2 - 1) - log_std).sum()
            self.paint(mean + np.exp(log_std) * step)
        p = sigmoid(self.canvas)
        return -(x * np.log(p) + (1 - x) * np.log(1 - p)).sum(), divergence

    def paint(self, z):
        self.decoder = self.lstm("decoder", z, self.decoder)
        if self.attention:
            output = self.linear("writer.aim_and_patch", self.decoder[0])
            self.canvas = self.canvas + write(output[5:].reshape(5, 5), 28, output[:5])
        else:
            self.canvas = self.canvas + self.linear("writer", self.decoder[0]).reshape(28, 28)


def noise_of(model, count, seed=1):
    noise = torch.randn(model.glimpses, count, 100, generator=torch.Generator().manual_seed(seed)).double().numpy()
    torch.manual_seed(seed)
    return noise.transpose(1, 0, 2)


def drawn(glimpses, attention=True):
    """Return a model whose every part matters: large weights, biases too."""
    model = Draw(glimpses, attention)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.mark.parametrize(("image", "n"), SIZES)
def test_filterbanks_are_the_equations(image, n):
    *ours, gamma = Filterbank(image, n)(torch.tensor(AIMS))
    for example, aim in enumerate(AIMS):
        *theirs, their_gamma = banks(image, n, aim)
        assert gamma[example].item() == pytest.approx(their_gamma)
        for filters, expected in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(filters[example].numpy(), expected, rtol=1e-4, atol=1e-6)


def test_filterbanks_are_computed_in_float32():
    aims = torch.tensor(AIMS).bfloat16()
    for rough, exact in zip(Filterbank(28, 5)(aims), Filterbank(28, 5)(aims.float()), strict=True):
        torch.testing.assert_close(rough, exact, rtol=0, atol=0)


@pytest.mark.parametrize(("image", "n"), SIZES)
def test_reading_is_the_equation_in_every_channel(image, n):
    images, reader = torch.rand(len(AIMS), 2, image, image), AttentionReader(5, image, n)
    torch.nn.init.eye_(reader.aim.weight), torch.nn.init.zeros_(reader.aim.bias)  # so the state is the aim
    patches = reader(images.transpose(1, 2), torch.tensor(AIMS)).detach()
    assert patches.shape == (len(AIMS), n, 2, n)
    for example, aim in enumerate(AIMS):
        for channel in range(2):
            expected = read(images[example, channel].double().numpy(), n, aim)
            np.testing.assert_allclose(patches[example, :, channel].numpy(), expected, rtol=1e-4, atol=1e-5)


def writer_of(image, n):
    writer = AttentionWriter(5 + n * n, image, n)
    torch.nn.init.eye_(writer.aim_and_patch.weight), torch.nn.init.zeros_(writer.aim_and_patch.bias)
    return writer


@pytest.mark.parametrize(("image", "n"), SIZES)
def test_writing_is_the_equation(image, n):
    patches = torch.randn(len(AIMS), n, n)
    images = writer_of(image, n)(torch.cat([torch.tensor(AIMS), patches.flatten(1)], 1)).detach()
    assert images.shape == (len(AIMS), image, image)
    for example, aim in enumerate(AIMS):
        expected = write(patches[example].double().numpy(), image, aim)
        np.testing.assert_allclose(images[example].numpy(), expected, rtol=1e-4, atol=1e-5)


def test_one_sharp_filter_a_pixel_writes_a_patch_where_reading_finds_it():
    n, image, top, left = 5, 28, 3, 20
    aim = torch.tensor([[(top + 2) / 14 - 1, (left + 2) / 14 - 1, log((n - 1) / (image - 1)), -6, 0.7]])
    patch = torch.randn(1, n, n)
    written = writer_of(image, n)(torch.cat([aim, patch.flatten(1)], 1)).detach()
    expected = torch.zeros(1, image, image)
    expected[:, top : top + n, left : left + n] = patch / exp(0.7) / (1 + 1e-4) ** 2
    torch.testing.assert_close(written, expected)
    reader = AttentionReader(5, image, n)
    torch.nn.init.eye_(reader.aim.weight), torch.nn.init.zeros_(reader.aim.bias)
    torch.testing.assert_close(reader(written[:, :, None], aim)[:, :, 0], patch / (1 + 1e-4) ** 4)


@pytest.mark.parametrize("attention", [True, False])
@pytest.mark.parametrize("glimpses", [1, 3])
def test_the_bound_and_the_canvas_are_the_paper_s(glimpses, attention):
    model, x = drawn(glimpses, attention), torch.rand(2, 1, 28, 28)
    noise = noise_of(model, 2)
    reconstruction, divergence = model(x)
    noise_of(model, 2)
    canvas = model.reconstruct(x)
    assert reconstruction.dtype == divergence.dtype == torch.float32
    assert canvas.shape == x.shape
    for example in range(2):
        paper = Paper(model)
        expected = paper.infer(x[example, 0].double().numpy(), noise[example])
        found = reconstruction[example].item(), divergence[example].item()
        np.testing.assert_allclose(found, expected, rtol=1e-5)
        np.testing.assert_allclose(canvas[example, 0].numpy(), sigmoid(paper.canvas), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("attention", [True, False])
def test_samples_unfold_glimpse_by_glimpse(attention):
    model = drawn(3, attention)
    noise = noise_of(model, 2)
    frames = model.unfold(2)
    assert frames.shape == (3, 2, 1, 28, 28)
    assert not frames.requires_grad
    for example in range(2):
        paper = Paper(model)
        for frame, z in zip(frames[:, example, 0], noise[example], strict=True):
            paper.paint(z)
            np.testing.assert_allclose(frame.numpy(), sigmoid(paper.canvas), rtol=1e-4, atol=1e-6)
    noise_of(model, 2)
    assert torch.equal(model.sample(2), frames[-1])


def test_the_divergence_is_torch_s_own_summed_over_glimpses():
    model, seen = drawn(4), []
    model.posterior.register_forward_hook(lambda _, __, output: seen.append(output.detach()))
    _, divergence = model(torch.rand(3, 1, 28, 28))
    assert len(seen) == 4
    posteriors = [Normal(output[:, :100], output[:, 100:].exp()) for output in seen]
    expected = sum(kl_divergence(posterior, Normal(0.0, 1.0)).sum(1) for posterior in posteriors)
    torch.testing.assert_close(divergence.detach(), expected)


def test_the_likelihood_holds_where_the_sigmoid_is_one():
    model, x = Draw(1, attention=False), torch.zeros(1, 1, 28, 28)
    torch.nn.init.constant_(model.writer.bias, 1000)
    assert model(x)[0].item() == pytest.approx(1000 * 784, rel=1e-3)


# Attention: reads 2 x 2 of two images, so the encoder sees 8 + 256, and the writer gives 5 + 25.
# encoder 1024 * (264 + 256 + 1 + 1) + posterior 200 * 257 + decoder 1024 * (100 + 256 + 1 + 1) + aim 5 * 257
# + writer 30 * 257 = 534,528 + 51,400 + 366,592 + 1,285 + 7,710. Without: the encoder sees 1568 + 256, no aim, and the
# writer gives 784: 1024 * (1824 + 258) + 51,400 + 366,592 + 784 * 257 = 2,131,968 + 51,400 + 366,592 + 201,488.
@pytest.mark.parametrize(("attention", "count"), [(True, 961_515), (False, 2_751_448)])
def test_the_number_of_parameters_is_that_of_the_sizes(attention, count):
    model = Draw(attention=attention)
    assert model.glimpses == 64
    assert sum(parameter.numel() for parameter in model.parameters()) == count
    assert model.state_dict().keys() == dict(model.named_parameters()).keys()


def test_initial_weights_are_small_and_biases_zero():
    model = Draw(1)
    model.draw_weights()
    for name, parameter in model.named_parameters():
        if name.endswith(("bias", "bias_ih", "bias_hh")):
            assert not parameter.any(), name
        else:
            assert parameter.std().item() == pytest.approx(0.01, rel=0.1), name


@pytest.mark.parametrize("attention", [True, False])
def test_gradients_are_finite_and_reach_every_weight(attention):
    model = Draw(3, attention)
    model.draw_weights()
    sum(part.mean() for part in model(torch.rand(4, 1, 28, 28))).backward()
    for name, parameter in model.named_parameters():
        if name.endswith("bias_hh"):
            assert parameter.grad is None, name
        else:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.any(), name


@pytest.mark.parametrize("attention", [True, False])
def test_nothing_waits_for_a_value_or_makes_a_tensor_elsewhere(attention):
    model = Draw(2, attention).to("meta")  # which has no values, and mixes with no other device
    x = torch.empty(3, 1, 28, 28, device="meta")
    assert [part.shape for part in model(x)] == [(3,), (3,)]
    assert model.sample(3).shape == model.reconstruct(x).shape == x.shape


def test_bfloat16_gives_nearly_the_same_bound():
    model, x = drawn(3), torch.rand(2, 1, 28, 28)
    noise_of(model, 2)
    exact = torch.stack(model(x))
    noise_of(model, 2)
    with torch.autocast("cpu", torch.bfloat16):
        rough = torch.stack(model(x))
    assert rough.dtype == torch.float32
    torch.testing.assert_close(rough, exact, rtol=0.02, atol=0)


@pytest.mark.parametrize("attention", [True, False])
def test_weight_norm_takes_every_matrix_along_its_outputs(attention):
    model = Draw(1, attention)
    normed = [group for group in wn.param_groups(model) if group["weight_norm"]]
    assert [group["dim"] for group in normed] == [0]
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[parameter] for parameter in normed[0]["params"]] == [
        name for name, parameter in model.named_parameters() if parameter.ndim == 2
    ]


def test_the_optimizer_and_the_module_form_train_alike():
    x, plain, losses = torch.rand(8, 1, 28, 28).bernoulli(), drawn(3), []
    wrapped = wn.weight_norm(deepcopy(plain))
    for model, optimizer in (
        (plain, wn.Adam(plain, lr=3e-4, backend="torch")),  # the quickest to start
        (wrapped, torch.optim.Adam(wrapped.parameters(), lr=3e-4)),
    ):
        torch.manual_seed(1)
        losses.append([])
        for _ in range(5):
            loss = torch.stack(model(x)).sum(0).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses[-1].append(loss.item())
    assert losses[0][4] < losses[0][0]
    np.testing.assert_allclose(*losses, rtol=1e-5)
