"""CIFAR-10 in the Hub's layout, and the paper's experiment on it: every number of its table."""

import io
import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm import cli
from weightnorm.compare.arms import ARMS
from weightnorm.compare.loop import Comparison, Options
from weightnorm.errors import UserError
from weightnorm.tasks import TASKS, cifar10
from weightnorm.tasks.cifar10 import Cifar10
from weightnorm.tasks.hub import HubData
from weightnorm.tasks.whitening import Whitening

SMALL = HubData("small", "someone/small", "img", "label", (6, 6, 3), {"train": 600, "test": 100}, 10)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("WEIGHTNORM_DATA", raising=False)


def png(pixels):
    import PIL.Image

    file = io.BytesIO()
    PIL.Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(folder, split, images, labels, part="00000-of-00001"):
    import pyarrow
    import pyarrow.parquet

    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"bytes": png(pixels), "path": f"{i}.png"} for i, pixels in enumerate(images)]
    pyarrow.parquet.write_table(
        pyarrow.table({"img": rows, "label": list(map(int, labels))}), folder / f"{split}-{part}.parquet"
    )


def made(folder, shape=(6, 6, 3), sizes=SMALL.sizes):
    """Write a data set of that many images; return it."""
    generator, arrays = np.random.default_rng(0), {}
    for split, size in sizes.items():
        images, labels = generator.integers(0, 256, (size, *shape), dtype=np.uint8), np.arange(size) % 10
        half = size // 2
        write(folder / "plain_text", split, images[:half], labels[:half], "00000-of-00002")
        write(folder / "plain_text", split, images[half:], labels[half:], "00001-of-00002")
        arrays[split] = images, labels
    return arrays


def test_images_and_labels_come_back_as_they_were_written(tmp_path, monkeypatch):
    arrays = made(tmp_path / "small")
    data = SMALL.load(tmp_path / "small")
    for split, (images, labels) in arrays.items():
        assert data[f"{split}_images"].dtype == torch.uint8
        assert np.array_equal(data[f"{split}_images"].numpy().transpose(0, 2, 3, 1), images)
        assert data[f"{split}_labels"].tolist() == labels.tolist()
    monkeypatch.setenv("WEIGHTNORM_DATA", str(tmp_path))
    assert torch.equal(SMALL.load()["train_images"], data["train_images"])


def test_images_are_decoded_once(tmp_path, monkeypatch):
    made(tmp_path / "small")
    first = SMALL.load(tmp_path / "small")
    monkeypatch.setattr(HubData, "_rows", None)
    assert torch.equal(SMALL.load(tmp_path / "small")["test_images"], first["test_images"])


@pytest.mark.parametrize("content", [b"", b"PK cut short"])
def test_a_damaged_cache_is_made_anew(tmp_path, content):
    made(tmp_path / "small")
    SMALL.load(tmp_path / "small")
    (file,) = (tmp_path / "cache" / "weightnorm").iterdir()
    file.write_bytes(content)
    SMALL.load(tmp_path / "small")
    assert file.stat().st_size > 10_000


def test_without_a_cache_it_works_too(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    made(tmp_path / "small")
    assert len(SMALL.load(tmp_path / "small")["train_labels"]) == 600


def damaged(folder, split="train"):
    return next(folder.rglob(f"{split}-*.parquet"))


def cut(folder):
    file = damaged(folder)
    file.write_bytes(file.read_bytes()[:-9])


def drop(folder):
    damaged(folder).unlink()


def drop_all(folder):
    for file in folder.rglob("test-*"):
        file.unlink()


def other_shape(folder):
    write(folder, "train", np.zeros((600, 5, 6, 3), dtype=np.uint8), np.arange(600) % 10, "1")


def other_column(folder):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"image": [1], "label": [1]}), damaged(folder))


def no_picture(folder):
    import pyarrow
    import pyarrow.parquet

    rows = [{"bytes": b"GIF?", "path": "0"}]
    pyarrow.parquet.write_table(pyarrow.table({"img": rows, "label": [1]}), damaged(folder))


def unbalanced(folder):
    write(folder / "plain_text", "test", np.zeros((50, 6, 6, 3), dtype=np.uint8), [3] * 50, "00000-of-00002")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (cut, "is damaged or not a parquet file of someone/small"),
        (drop, "the train split should have 600 images, 60 of each of 10 classes; got 300"),
        (drop_all, "no test-*.parquet under"),
        (other_shape, "an image of shape (5, 6, 3) in place of (6, 6, 3)"),
        (other_column, "is damaged or not a parquet file"),
        (no_picture, "is damaged or not a parquet file"),
        (unbalanced, "the test split should have 100 images, 10 of each of 10 classes; got 100, by class [5, 5, 5, 55"),
    ],
)
def test_missing_and_damaged_data_is_told_in_one_line(tmp_path, damage, words):
    made(tmp_path / "small")
    damage(tmp_path / "small")
    with pytest.raises(UserError) as caught:
        SMALL.load(tmp_path / "small")
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_cannot_be_downloaded_is_told_in_one_line(monkeypatch):
    import huggingface_hub

    def fail(*_, **__):
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(
        UserError, match=r"^someone/small cannot be downloaded \(ConnectionError: no route\); name .*--data$"
    ):
        SMALL.load()


def test_what_is_downloaded_is_read(monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    made(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **k: asked.append((a, k)) or str(tmp_path))
    assert len(SMALL.load()["test_labels"]) == 100
    assert asked[0] == (("someone/small",), {"repo_type": "dataset", "allow_patterns": "*.parquet"})


def test_whitened_images_have_the_identity_for_covariance():
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(48, 48, generator=generator)
    images = (torch.randn(4000, 48, generator=generator) @ mix * 5 + 128).clamp(0, 255).byte().view(-1, 3, 4, 4)
    whiten = Whitening.fitted(images, 1e-5, torch.device("cpu"))
    rows = whiten(images).flatten(1).double()
    torch.testing.assert_close(rows.mean(0), torch.zeros(48).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(rows.T @ rows / len(rows), torch.eye(48).double(), rtol=0, atol=5e-2)
    torch.testing.assert_close(whiten.matrix, whiten.matrix.T, rtol=1e-3, atol=1e-4)  # ZCA's is symmetric
    pixels = (images.numpy().reshape(len(images), -1).astype(np.float64) - 127.5) / 128
    values, vectors = np.linalg.eigh(np.cov(pixels.T, bias=True))
    expected = (pixels[:3] - pixels.mean(0)) @ (vectors / np.sqrt(values + 1e-5)) @ vectors.T
    np.testing.assert_allclose(rows[:3], expected, rtol=1e-3, atol=1e-3)
    again = Whitening.fitted(images, 1e-5, torch.device("cpu"))
    assert torch.equal(again.matrix, whiten.matrix)


@pytest.fixture
def task(tmp_path, monkeypatch):
    """The experiment on 600 made-up images of the right size; its whitening, of 3,072 pixels, is made up too."""
    sizes = {"train": 600, "test": 200}
    made(tmp_path / "cifar10", (32, 32, 3), sizes)
    monkeypatch.setattr(cifar10, "DATA", HubData("cifar10", "uoft-cs/cifar10", "img", "label", (32, 32, 3), sizes, 10))
    identity = Whitening(torch.zeros(3072), torch.eye(3072))
    monkeypatch.setattr(Whitening, "fitted", lambda *_: identity)
    return Cifar10("cpu", tmp_path / "cifar10")


def test_the_net_is_the_papers(task):
    model = task.model()
    weights = [p for p in model.parameters() if p.ndim > 1]
    assert (len(weights), sum(p.numel() for p in weights)) == (10, 1_405_344)
    assert sum(p.numel() for p in model.parameters() if p.ndim == 1) == 1_450
    sizes, x = [], task.test[0][:2]
    for layer in model.eval():
        x = layer(x)
        if isinstance(layer, nn.Conv2d):
            sizes.append((x.shape[1], x.shape[2]))
    assert sizes == [(96, 32)] * 3 + [(192, 16)] * 3 + [(192, 6)] * 3 + [(10, 1)]
    assert x.shape == (2, 10)
    kinds = [type(layer).__name__ for layer in model]
    assert kinds.count("LeakyReLU") == 9
    assert [layer.p for layer in model if isinstance(layer, nn.Dropout)] == [0.5, 0.5]
    assert {layer.negative_slope for layer in model if isinstance(layer, nn.LeakyReLU)} == {0.1}


def test_noise_is_there_in_training_alone(task):
    noise, x = task.model()[0], torch.zeros(200, 3, 32, 32)
    assert torch.equal(noise.eval()(x), x)
    assert float(noise.train()(x).std()) == pytest.approx(0.15, rel=0.01)


@pytest.mark.parametrize("name", TASKS["cifar10"].arms)
def test_every_arm_of_the_paper_has_its_norms_and_its_rate(task, name):
    norm = {None: None, "mean_only": wn.MeanOnlyBatchNorm, "batch": nn.BatchNorm2d}[ARMS[name].norm]
    model = task.model(norm)
    assert sum(type(layer) is norm for layer in model) == (10 if norm else 0)
    assert all((layer.bias is None) == bool(norm) for layer in model if isinstance(layer, nn.Conv2d))
    assert task.rates[name] == (0.0003 if name == "plain" else 0.003)
    assert task.rates["plain_released"] == 0.0003


def test_the_schedule_is_the_papers(task):
    at = [task.schedule(epoch, 200) for epoch in range(200)]
    for epoch, now in enumerate(at):
        assert now.lr == pytest.approx(min(2 - epoch / 100, 1))
        assert now.betas == ((0.9, 0.999) if epoch < 100 else (0.5, 0.999))
    assert at[199].lr == pytest.approx(0.01)


def test_optimizers_are_adam_as_in_the_paper(task):
    model = task.model()
    for optimizer in (task.optimizer(model.parameters(), 0.003), task.weight_norm_optimizer(model, 0.003, 1.0)):
        group = optimizer.param_groups[0]
        assert (group["lr"], group["betas"], group["eps"], group["weight_decay"]) == (0.003, (0.9, 0.999), 1e-8, 0)
    assert group["v_std"] == 0.05


def test_a_fifth_of_the_training_images_may_be_held_out(task, tmp_path):
    held = Cifar10("cpu", tmp_path / "cifar10", holdout=True)
    assert (len(held.train[1]), len(held.test[1]), held.holdout, held.steps_per_epoch) == (480, 120, 120, 4)
    assert torch.equal(torch.cat([held.train[0], held.test[0]]), task.train[0])
    assert torch.equal(torch.cat([held.train[1], held.test[1]]), task.train[1])
    limited = Cifar10("cpu", tmp_path / "cifar10", limit=500, holdout=True)
    assert torch.equal(limited.test[0], task.train[0][400:500])


@pytest.mark.parametrize("limit", [0, 100, 501, 50_500])
def test_a_limit_is_a_number_of_whole_batches(limit):
    with pytest.raises(UserError, match=r"the limit must be a multiple of 500 up to 50,000; got"):
        Cifar10("cpu", Path("/nowhere"), limit=limit)


@pytest.mark.slow
def test_both_forms_take_the_same_steps(task):
    """The same losses, from the same start; in one step, for on noise these few grow apart by rounding alone."""
    task.train = tuple(part[:200] for part in task.train)
    losses = []
    for form in ("optimizer", "module"):
        comparison = Comparison(task, Options([ARMS["weight_norm_mean_only"]], 1, (0.003,), form=form))
        comparison.train()
        losses.append(torch.tensor(comparison.runs[0].epochs[0].step_loss))
    torch.testing.assert_close(*losses, rtol=1e-3, atol=0)


@pytest.mark.slow
@pytest.mark.skipif(not Path(os.environ.get("WEIGHTNORM_DATA", ""), "cifar10").is_dir(), reason="needs CIFAR-10")
def test_real_images_become_white(monkeypatch):
    monkeypatch.undo()
    task = Cifar10(limit=2000)
    images, labels = task.train
    assert images.shape == (2000, 3, 32, 32)
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert len(task.test[1]) == 400
    assert abs(float(images.mean())) < 0.01
    assert 0.8 < float(images.std()) < 1.0  # the smallest eigenvalues, near ε, stay below 1
    assert math.isclose(float(labels.float().mean()), 4.5, abs_tol=0.2)


@pytest.mark.slow
@pytest.mark.skipif(not Path(os.environ.get("WEIGHTNORM_DATA", ""), "cifar10").is_dir(), reason="needs CIFAR-10")
def test_the_command_trains_on_real_images_and_reports(monkeypatch, tmp_path, capsys):
    monkeypatch.undo()
    asked = "compare cifar10 --limit 500 --epochs 1 --arms plain,weight_norm --precision bf16 --device cpu --out"
    assert cli.run([*asked.split(), str(tmp_path)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "Every arm ran at the learning rate that it has in the experiment" in out
    assert "In brackets: the paper's." in out
    record = json.loads((tmp_path / "results.json").read_text())
    assert [record["arms"][name]["lr"] for name in ("plain", "weight_norm")] == [0.0003, 0.003]
    for arm in record["arms"].values():
        assert len(arm["runs"][0]["step_loss"]) == 5
        assert all(math.isfinite(loss) for loss in arm["runs"][0]["step_loss"])
