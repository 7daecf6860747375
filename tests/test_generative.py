"""The paper's generative experiments: their settings, how digits are drawn, what is made of a model's two numbers."""

import importlib
import inspect
import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from test_cifar10 import made
from weightnorm import cli, tasks
from weightnorm.compare.arms import ARMS
from weightnorm.compare.loop import Comparison, Options
from weightnorm.compare.models import initial_model
from weightnorm.compare.pictures import png
from weightnorm.errors import UserError
from weightnorm.tasks import load_task, mnist
from weightnorm.tasks.draw.task import DrawMnist
from weightnorm.tasks.generative import Generative
from weightnorm.tasks.hub import HubData
from weightnorm.tasks.vae import mnist as vae_mnist
from weightnorm.tasks.vae.cifar10 import CifarVae
from weightnorm.tasks.vae.mnist import MnistVae

SIZES = {"train": 600, "test": 200}
PAIR = [ARMS["plain"], ARMS["weight_norm"]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "mnist"
    made(folder, (28, 28), SIZES)
    return folder


@pytest.fixture
def digits(folder, monkeypatch, tmp_path):
    """Made-up digits in place of MNIST's; where they lie."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(mnist, "DATA", HubData("mnist", "ylecun/mnist", "img", "label", (28, 28), SIZES, None))
    return folder


@pytest.fixture
def few_samples(monkeypatch):
    """What 128 take half a minute for."""
    monkeypatch.setattr(vae_mnist, "SAMPLES", 4)


MADE = {
    "vae": lambda folder, **more: MnistVae("cpu", folder, **{"flows": 1, **more}),
    "draw": lambda folder, **more: DrawMnist("cpu", folder, **{"glimpses": 2, **more}),
}


def is_binary(images):
    return bool(((images == 0) | (images == 1)).all())


def test_dynamic_pixels_are_drawn_at_every_step_by_their_brightness(digits):
    task = MnistVae("cpu", digits)
    (brightness,) = task.train
    draws = torch.stack([task.inputs(brightness[:20]) for _ in range(400)])
    assert is_binary(draws)
    torch.testing.assert_close(draws.mean(0), brightness[:20], rtol=0, atol=0.15)
    assert not torch.equal(draws[0], draws[1])


def test_fixed_pixels_are_drawn_once(digits):
    tasks = [DrawMnist("cpu", digits) for _ in range(2)]
    (drawn,), (again,) = (task.train for task in tasks)
    assert is_binary(drawn)
    assert torch.equal(drawn, again)
    assert torch.equal(tasks[0].inputs(drawn), drawn)
    (brightness,) = MnistVae("cpu", digits).train
    assert abs(float(drawn.mean() - brightness.mean())) < 0.005


@pytest.mark.parametrize("binarise", ["dynamic", "fixed"])
def test_what_is_scored_and_what_weights_are_set_by_never_changes(digits, binarise):
    one, other = (MnistVae("cpu", digits, binarise=binarise) for _ in range(2))
    assert is_binary(one.test[0])
    assert torch.equal(one.test[0], other.test[0])
    assert torch.equal(one.inputs(one.test[0]), one.test[0])
    assert is_binary(one.init_batch())
    assert torch.equal(one.init_batch(), other.init_batch())


def test_digits_may_be_held_out(digits):
    task = MnistVae("cpu", digits, holdout=True)
    assert (len(task.train[0]), len(task.test[0]), task.holdout) == (480, 120, 120)
    assert len(MnistVae("cpu", digits, limit=500).test[0]) == 100


def test_the_vaes_settings_are_the_papers(digits):
    task = MnistVae("cpu", digits)
    model = task.model()
    for optimizer in (task.optimizer(model.parameters(), 0.002), task.weight_norm_optimizer(model, 0.002, 1.0)):
        assert optimizer.param_groups[0]["lr"] == 0.002
        assert optimizer.param_groups[0]["betas"] == (0.9, 0.999)
    assert isinstance(task.optimizer(model.parameters(), 0.002), torch.optim.Adamax)
    assert set(task.rates.values()) == {0.002}
    assert (task.v_std, task.average_epochs, task.max_norm, task.binarise) == (0.05, 10, None, "dynamic")


def test_draws_settings_are_those_of_the_code(digits):
    task = DrawMnist("cpu", digits)
    model = task.model()
    assert (model.glimpses, model.reader is None) == (64, False)
    assert type(task.optimizer(model.parameters(), 3e-4)) is torch.optim.Adam
    group = task.weight_norm_optimizer(model, 3e-4, 1.0).param_groups[0]
    assert (group["lr"], group["v_std"]) == (3e-4, None)
    assert set(task.rates.values()) == {3e-4}
    assert (task.max_norm, task.average_epochs, task.init_batch(), task.binarise) == (10, None, None, "fixed")


def test_draws_arms_begin_with_the_same_untouched_weights(digits):
    task = MADE["draw"](digits)
    one, other = (initial_model(task, arm, 3) for arm in PAIR)
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        assert float(p.detach().std()) == (pytest.approx(0.01, rel=0.15) if p.ndim > 1 else 0), name


def test_draws_weight_vectors_may_begin_with_length_one(digits):
    task = DrawMnist("cpu", digits, lengths="one")
    one, other = (initial_model(task, arm, 3) for arm in PAIR)
    for p, q in zip(one.parameters(), other.parameters(), strict=True):
        assert torch.equal(p, q)
        if p.ndim > 1:
            torch.testing.assert_close(p.detach().norm(dim=1), torch.ones(len(p)))
    assert task.weight_norm_optimizer(one, 3e-4, 1.0).param_groups[0]["v_std"] == 0.01


def test_the_vaes_arms_begin_with_the_same_function_and_masks_in_place(digits):
    task = MADE["vae"](digits)
    one, other = (initial_model(task, arm, 3) for arm in PAIR)
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))
    masked = [layer for layer in one.modules() if hasattr(layer, "mask")]
    assert len(masked) == 2
    assert all(not layer.weight[~layer.mask].any() for layer in masked)


@pytest.mark.parametrize("name", MADE)
def test_there_is_no_batch_norm_in_either(digits, name):
    with pytest.raises(UserError, match="leave that arm out"):
        MADE[name](digits).model(nn.BatchNorm2d)


def test_a_glimpse_is_the_least(digits):
    with pytest.raises(UserError, match="--glimpses 0"):
        DrawMnist("cpu", digits, glimpses=0)


@pytest.mark.parametrize("name", MADE)
def test_both_forms_take_the_same_steps(digits, name, few_samples):
    task, losses = MADE[name](digits, limit=500), []
    for form in ("optimizer", "module"):
        comparison = Comparison(task, Options(PAIR[1:], 1, (), form=form, rates=task.rates))
        comparison.train()
        losses.append(torch.tensor(comparison.runs[0].epochs[0].step_loss))
    assert losses[0][-1] < losses[0][0]
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


# What is made of the two numbers


class Linear(nn.Module):
    """x = W z + noise, z ~ N(0, I), in two dimensions; its posterior is the exact one, or one that is ``off``."""

    def __init__(self, off=0.0):
        super().__init__()
        self.w, self.noise, self.off = torch.tensor([[1.0, 0.5], [-0.3, 2.0]]), 0.7, off

    def marginal(self):
        covariance = self.w @ self.w.T + self.noise**2 * torch.eye(2)
        return torch.distributions.MultivariateNormal(torch.zeros(2), covariance)

    def forward(self, x, samples=1):
        x = x.flatten(1).repeat_interleave(samples, dim=0)
        precision = torch.eye(2) + self.w.T @ self.w / self.noise**2
        mean = torch.linalg.solve(precision, self.w.T @ x.T / self.noise**2).T
        posterior = torch.distributions.MultivariateNormal(mean + self.off, precision_matrix=precision)
        z = posterior.sample()
        prior, likelihood = (torch.distributions.Normal(m, s) for m, s in ((0.0, 1.0), (z @ self.w.T, self.noise)))
        return -likelihood.log_prob(x).sum(1), posterior.log_prob(z) - prior.log_prob(z).sum(1)


def scored(images):
    task = object.__new__(MnistVae)
    task.test, task.batch_size = (images,), 100
    task.inputs = lambda images: images
    return task


def test_of_a_linear_gaussian_model_the_bound_is_the_exact_likelihood():
    torch.manual_seed(0)
    model, images = Linear(), torch.randn(200, 1, 1, 2)
    exact = -float(model.marginal().log_prob(images.flatten(1)).mean())
    task = scored(images)
    loss, reconstruction, divergence = task.evaluate(model)
    assert loss == pytest.approx(exact, abs=1e-5)
    assert reconstruction + divergence == pytest.approx(loss, abs=1e-5)
    assert task.finish(model)["log_likelihood"] == pytest.approx(exact, abs=1e-5)


def test_of_an_inexact_posterior_the_bound_is_off_by_its_divergence_and_many_samples_are_not():
    torch.manual_seed(0)
    model, images = Linear(off=0.2), torch.randn(1000, 1, 1, 2)
    exact = -float(model.marginal().log_prob(images.flatten(1)).mean())
    off = torch.full((2,), 0.2)
    kl = float(off @ (torch.eye(2) + model.w.T @ model.w / model.noise**2) @ off) / 2
    task = scored(images)
    assert kl > 0.15
    assert task.evaluate(model)[0] == pytest.approx(exact + kl, abs=0.04)
    assert task.finish(model)["log_likelihood"] == pytest.approx(exact, abs=0.01)


def test_generative_tasks_see_images_as_they_are():
    images = torch.rand(3, 1, 2, 2)
    assert Generative.inputs(object.__new__(MnistVae), images) is images


# Pictures


def test_a_png_shows_images_in_their_places():
    import PIL.Image

    images = torch.zeros(2, 3, 1, 4, 5)
    images[1, 2] = 1
    pixels = np.asarray(PIL.Image.open(io.BytesIO(png(images))).convert("L"))
    assert pixels.shape == (2 * 6, 3 * 7)
    assert (pixels[7:11, 15:20] == 255).all()
    assert (pixels == 255).sum() == 20
    assert (pixels == 0).sum() == 5 * 20


@pytest.mark.parametrize("name", MADE)
def test_every_model_draws(digits, name):
    task = MADE[name](digits)
    comparison = Comparison(task, Options(PAIR[:1], 1, (), rates=task.rates))
    comparison.prepare()
    (run,) = comparison.runs
    assert not run._step(*next(task.train_batches(0, 0))).requires_grad  # a graph a step would be kept for an epoch
    state = torch.get_rng_state()
    drawn, again = run.pictures(), run.pictures()
    assert torch.equal(state, torch.get_rng_state())
    for title, images in drawn.items():
        assert images.shape == (8, 8, 1, 28, 28)
        assert 0 <= float(images.min()) <= float(images.max()) <= 1
        assert torch.equal(images, again[title])
    assert torch.equal(drawn["reconstructions"][0], task.test[0][:8])
    assert set(drawn) == {"samples", "reconstructions"} | ({"canvas"} if name == "draw" else set())


# From the command line


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ("vae --glimpses 3", "--glimpses is an option of draw, not of vae; leave it out"),
        ("cifar10 --binarise fixed", "--binarise is an option of vae and draw, not of cifar10; leave it out"),
        ("draw --arms batch_norm --lr 0.1 --limit 500", "has no layers that a batch norm follows; leave that arm out"),
        ("vae --arms plain_released --limit 500", "the paper's released code does not train vae; leave plain_released"),
        ("draw --glimpses 0", "DRAW needs a glimpse or more; got --glimpses 0"),
        ("draw --arms plain,mean_only", "the experiment draw has no learning rate for mean_only; give one with --lr"),
        ("vae --data /dev/null", "mnist: no train-*.parquet under /dev/null; name the folder"),
    ],
)
def test_a_mistake_is_told_in_one_line(digits, asked, words, capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("WEIGHTNORM_DATA", str(digits.parent))
    assert cli.run(["compare", *asked.split(), "--device", "cpu", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert words in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("task", "data", "found"),
    [
        ("vae", "cifar10", ("vae_cifar10", None)),
        ("vae", "./cifar10", ("vae", "./cifar10")),
        ("vae", None, ("vae", None)),
        ("draw", "cifar10", ("draw", "cifar10")),
    ],
)
def test_data_may_name_the_data_set_of_a_variant(task, data, found):
    assert cli._variant(task, data) == found


@pytest.mark.parametrize("task", ["vae", "vae_cifar10", "draw"])
def test_options_have_the_same_defaults_from_the_command_line_and_from_python(task):
    home, _, cls = tasks.TASKS[task].home.partition(":")
    signature = inspect.signature(getattr(importlib.import_module(home), cls))
    for name, value in tasks.all_options(task, {}).items():
        assert signature.parameters[name].default == value, name
    assert set(signature.parameters) == {"device", "folder", "limit", "holdout", *tasks.all_options(task, {})}


def test_the_papers_numbers_stand_at_their_epochs():
    """Read off figures 3 and 4; epochs are counted from 0."""
    vae, deep, draw = MnistVae.paper, CifarVae.paper, DrawMnist.paper
    assert (vae.arms["plain"].curve[49], vae.arms["weight_norm"].curve[199]) == (87.30, 85.41)
    assert (vae.arms["plain"].final, vae.arms["weight_norm"].final) == (85.83, 85.33)
    assert deep.arms["plain"].final == pytest.approx(3.70, abs=0.005)
    assert deep.arms["weight_norm"].curve[449] == pytest.approx(3.64, abs=0.005)
    assert draw.arms["plain"].curve == {39: 115.6, 49: 101.5, 59: 95.4, 79: 91.3, 99: 89.4}
    assert draw.arms["weight_norm"].curve[9] == 102.5
    assert (draw.arms["plain"].first_epoch[89.4], draw.arms["weight_norm"].first_epoch[89.4]) == (99, 34)


def test_options_reach_the_task(digits):
    task = load_task("draw", "cpu", digits, options={"glimpses": 3, "attention": False, "binarise": "dynamic"})
    assert (task.glimpses, task.attention, task.binarise) == (3, False, "dynamic")
    assert task.model().reader is None


REAL = Path(os.environ.get("WEIGHTNORM_DATA", ""))


@pytest.mark.slow
@pytest.mark.skipif(not all((REAL / name).is_dir() for name in ("mnist", "cifar10")), reason="needs the data sets")
@pytest.mark.parametrize("asked", ["vae --flows 1", "draw --glimpses 3", "vae --data cifar10 --width 8 --depth 1"])
def test_the_command_trains_on_real_digits_pauses_and_goes_on_to_the_last_bit(tmp_path, asked, capsys, few_samples):
    asked = f"compare {asked} --limit 500 --epochs 2 --seeds 1 --device cpu --out"
    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    assert cli.run([*asked.split(), str(whole)]) == 0
    assert cli.run([*asked.split(), str(pieces), "--max-minutes", "0.03"]) == 0
    while (pieces / "checkpoint.pt").exists():
        assert cli.run(["compare", "--resume", str(pieces), "--device", "cpu"]) == 0
    assert "In brackets: the paper's." in " ".join(capsys.readouterr().out.split())
    record, resumed = (json.loads((folder / "results.json").read_text()) for folder in (whole, pieces))
    for name, arm in record["arms"].items():
        (run,), (again,) = arm["runs"], resumed["arms"][name]["runs"]
        assert {**run, "seconds": 0} == {**again, "seconds": 0}
        assert run["train_loss"][-1] < run["train_loss"][0]
        assert all(map(math.isfinite, run["test_divergence"]))
        assert arm["final"]["test_loss"]["mean"] == pytest.approx(
            arm["final"]["test_reconstruction"]["mean"] + arm["final"]["test_divergence"]["mean"]
        )
        assert set(run["finals"]) == ({"log_likelihood"} if "--flows" in asked else set())
    assert {path.name for path in whole.iterdir()} >= {"samples-plain.png", "reconstructions-weight_norm.png"}
    assert 'src="data:image/png;base64,' in (whole / "report.html").read_text()
