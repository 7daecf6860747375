"""The embedded data is what it says, and the task makes of it what the paper's experiment does."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.errors import UserError
from weightnorm.tasks import load_task
from weightnorm.tasks.fashion import DATA, Fashion, read_data

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def task():
    return load_task("fashion")


def test_the_file_is_small_and_its_licence_lies_beside_it():
    assert DATA.stat().st_size < 5_000_000
    licence = (DATA.parent / "LICENSE.fashion-mnist").read_text()
    for words in ("2017 Zalando SE, https://tech.zalando.com", "Permission is hereby granted", "first 800 of each"):
        assert words in licence


@pytest.mark.parametrize(("split", "per_class"), [("train", 800), ("test", 200)])
def test_classes_are_balanced(split, per_class):
    data = read_data()
    images, labels = data[f"{split}_images"], data[f"{split}_labels"]
    assert images.shape == (10 * per_class, 28, 28)
    assert images.dtype == labels.dtype == np.uint8
    assert np.bincount(labels).tolist() == [per_class] * 10
    assert len(np.unique(images.reshape(len(images), -1), axis=0)) > 0.99 * len(images)


def test_the_tool_makes_the_same_arrays_from_the_originals():
    spec = importlib.util.spec_from_file_location("tool", ROOT / "tools/make_fashion_subset.py")
    tool = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tool)
    if not tool.SOURCE.exists():
        pytest.skip("needs Debian's dataset-fashion-mnist")
    data = read_data()
    for split, ours in (("train", "train"), ("t10k", "test")):
        images, labels = tool.subset(split)
        assert np.array_equal(images, data[f"{ours}_images"])
        assert np.array_equal(labels, data[f"{ours}_labels"])


@pytest.mark.parametrize(
    ("content", "words"), [(None, "cannot be read (No such file"), (b"PK", "damaged (2 bytes"), ("cut", "damaged")]
)
def test_a_missing_or_damaged_file_is_told_in_one_line(tmp_path, content, words):
    path = tmp_path / "fashion.npz"
    if content is not None:
        path.write_bytes(DATA.read_bytes()[:-1] if content == "cut" else content)
    with pytest.raises(UserError) as caught:
        Fashion(path=path)
    assert words in str(caught.value)
    assert "pip install" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_training_images_are_standardised(task):
    images, _ = task.train
    assert images.mean().abs() < 1e-4
    assert (images.std() - 1).abs() < 1e-4


def test_an_epoch_shows_every_image_once_in_an_order_of_its_own(task):
    def order(seed, epoch):
        batches = list(task.train_batches(seed, epoch))
        assert len(batches) == task.steps_per_epoch == 80
        assert all(images.shape == (100, 1, 28, 28) for images, _ in batches)
        return torch.cat([images.sum((1, 2, 3)) for images, _ in batches])

    first = order(0, 0)
    assert torch.equal(first, order(0, 0))
    for other in (order(0, 1), order(1, 0)):
        assert not torch.equal(first, other)
        assert torch.equal(first.sort().values, other.sort().values)


@pytest.mark.parametrize("norm", [None, wn.MeanOnlyBatchNorm, nn.BatchNorm2d])
def test_every_layer_of_the_net_is_followed_by_the_norm_asked_for(task, norm):
    layers = list(task.model(norm))
    convs = [i for i, layer in enumerate(layers) if isinstance(layer, nn.Conv2d)]
    assert len(convs) >= 5
    for i in convs:
        assert (layers[i].bias is None) == (norm is not None)
        assert norm is None or isinstance(layers[i + 1], norm)
    assert torch.nn.Sequential(*layers)(task.init_batch()).shape == (500, 10)


def test_weights_are_drawn_as_in_the_paper(task):
    torch.manual_seed(0)
    model = task.model()
    task.draw_weights(model)
    weights = torch.cat([p.flatten() for p in model.parameters() if p.ndim > 1])
    assert abs(weights.std() - 0.05) < 0.001
    assert all(not p.any() for p in model.parameters() if p.ndim == 1)


def test_loss_and_error_are_those_of_the_classes(task):
    class Oracle(nn.Module):
        """Answers the test set, in its order, with what it was given."""

        def __init__(self, answers):
            super().__init__()
            self.answers = iter(answers)

        def forward(self, images):
            return torch.stack([50.0 * nn.functional.one_hot(next(self.answers), 10) for _ in images])

    _, labels = task.test
    loss, error = task.evaluate(Oracle(labels))
    assert loss < 1e-6
    assert error == 0
    assert task.evaluate(Oracle((labels + (torch.arange(2000) < 500)) % 10))[1] == pytest.approx(25)
