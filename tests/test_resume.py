"""A comparison that is paused, interrupted or killed goes on as if nothing had been."""

import json
import signal
import subprocess
import sys
import time

import pytest
import torch

from test_compare import Tiny
from weightnorm import cli
from weightnorm.compare import command, saving
from weightnorm.compare import request as compare_request
from weightnorm.compare.request import Request
from weightnorm.compare.saving import NAME
from weightnorm.errors import UserError

REQUEST = Request("tiny", ("plain", "weight_norm", "weight_norm_mean_only"), 4, (0.01, 0.03), (1.0, "sqrt"), 2)


class Uneven(Tiny):
    """Ends the program after some batches."""

    left = 10**9

    def loss(self, model, batch):
        type(self).left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().loss(model, batch)


@pytest.fixture(autouse=True)
def tasks(monkeypatch):
    monkeypatch.setattr(compare_request, "load_task", lambda *_: Uneven())
    monkeypatch.setattr(Uneven, "left", 10**9)
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def losses(comparison):
    return [
        [[*epoch.step_loss, *epoch.train.values(), *epoch.test.values()] for epoch in run.epochs]
        for run in comparison.runs
    ]


@pytest.fixture(scope="module")
def whole():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare_request, "load_task", lambda *_: Tiny())
        comparison = REQUEST.comparison("cpu")
    comparison.train()
    return losses(comparison)


@pytest.mark.parametrize("form", ["optimizer", "module"])
@pytest.mark.parametrize("pauses", [[1], [3, 11], [0, 29]])
def test_it_goes_on_to_the_last_bit(tmp_path, pauses, form):
    """Paused before some epoch of some run, saved, and restored in a comparison made anew."""
    request = Request(**(vars(REQUEST) | {"form": form}))
    expected = request.comparison("cpu")
    expected.train()
    comparison = request.comparison("cpu")
    for left in pauses:
        counted = iter([False] * left + [True])
        comparison.train(pause=lambda counted=counted: next(counted))
        saving.save(tmp_path, request, comparison)
        torch.rand(3)
        asked, runs = saving.load(tmp_path, "cpu")
        comparison = asked.comparison("cpu")
        saving.restore(comparison, runs)
    comparison.train()
    assert losses(comparison) == losses(expected)


def test_averages_and_finals_go_on_too(tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "average_epochs", 2.0)
    monkeypatch.setattr(Tiny, "finish", lambda self, model: {"norm": next(model.parameters()).norm().item()})
    expected = REQUEST.comparison("cpu")
    expected.train()
    comparison = REQUEST.comparison("cpu")
    counted = iter([False] * 70 + [True])
    comparison.train(pause=lambda: next(counted))
    assert sum(bool(run.finals) for run in comparison.runs) == 70 - 3 * len(comparison.runs)
    saving.save(tmp_path, REQUEST, comparison)
    asked, runs = saving.load(tmp_path, "cpu")
    comparison = asked.comparison("cpu")
    saving.restore(comparison, runs)
    comparison.train()
    assert losses(comparison) == losses(expected)
    assert [run.finals for run in comparison.runs] == [run.finals for run in expected.runs]
    assert all(run.finals for run in comparison.runs)


@pytest.mark.parametrize("batches", [0, 7, 33, 50])
def test_interrupted_in_the_middle_of_an_epoch_it_begins_that_epoch_again(
    tmp_path, monkeypatch, whole, batches, capsys
):
    monkeypatch.setattr(Uneven, "left", batches)
    assert command.compare_and_report(REQUEST, tmp_path, "cpu", None, 100) == 130
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    monkeypatch.setattr(Uneven, "left", 10**9)
    assert command.resume_and_report(tmp_path, "cpu", None, 100) == 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["finished"]
    found = [run["step_loss"] for arm in record["arms"].values() for run in arm["runs"]]
    expected = [[loss for epoch in run for loss in epoch[:5]] for run in whole]
    assert sorted(found) == sorted(expected)


def test_when_the_time_is_up_it_pauses_and_says_how_to_go_on(tmp_path, capsys):
    assert command.compare_and_report(REQUEST, tmp_path, "cpu", 0.0, 1) == 0
    assert f"weightnorm compare --resume {tmp_path}" in capsys.readouterr().err
    assert command.resume_and_report(tmp_path, "cpu", None, 1) == 0
    assert "--resume" not in capsys.readouterr().err


def test_a_checkpoint_is_left_every_so_many_epochs(tmp_path, monkeypatch):
    saved, save = [], saving.save
    monkeypatch.setattr(command, "save", lambda *given: saved.append(1) or save(*given))
    assert command.compare_and_report(REQUEST, tmp_path, "cpu", None, 2) == 0
    assert len(saved) == 2  # after 2 of 4 epochs, and before the report, after which it is taken away
    assert not (tmp_path / NAME).exists()


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot read"),
        (b"", "is no torch file, or a damaged one"),
        ({"a": 1}, "is no checkpoint of a comparison"),
    ],
)
def test_what_is_no_checkpoint_is_told_in_one_line(tmp_path, content, words, capsys):
    if isinstance(content, bytes):
        (tmp_path / NAME).write_bytes(content)
    elif content:
        torch.save(content, tmp_path / NAME)
    assert cli.run(["compare", "--resume", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert words in err
    assert err.count("\n") == 1


def test_options_beside_resume_are_refused(capsys):
    assert cli.run(["compare", "fashion", "--lr", "0.1", "--resume", "somewhere"]) == 2
    assert "leave TASK, --lr out" in capsys.readouterr().err.replace("task,", "TASK,")


def test_it_goes_on_on_the_kind_of_device_it_ran_on_alone(tmp_path):
    saving.save(tmp_path, REQUEST, REQUEST.comparison("cpu"))
    with pytest.raises(UserError, match="ran on cpu and cannot go on on cuda: name it with --device"):
        saving.load(tmp_path, "cuda:1")


@pytest.mark.parametrize("deterministic", [True, False])
def test_cudnn_is_told_and_told_again_on_resume(tmp_path, monkeypatch, deterministic):
    cudnn = torch.backends.cudnn
    for name in ("deterministic", "benchmark"):
        monkeypatch.setattr(cudnn, name, getattr(cudnn, name))  # put back in the end
    request = Request(**(vars(REQUEST) | {"deterministic": deterministic}))
    command.compare_and_report(request, tmp_path, "cpu", 0.0, 100)
    assert (cudnn.deterministic, cudnn.benchmark) == (deterministic, not deterministic)
    cudnn.deterministic = not deterministic
    command.resume_and_report(tmp_path, "cpu", None, 100)
    assert cudnn.deterministic == deterministic


@pytest.mark.slow
def test_a_killed_comparison_loses_an_interval_at_most(tmp_path):
    def run(*arguments):
        return subprocess.Popen([sys.executable, "-m", "weightnorm", "compare", *arguments], stderr=subprocess.DEVNULL)

    asked = [
        "--arms",
        "plain,weight_norm",
        "--epochs",
        "3",
        "--lr",
        "0.003",
        "--seeds",
        "1",
        "--checkpoint-every",
        "1",
        "--out",
    ]
    with run(*asked, str(tmp_path / "killed")) as process:
        while not (tmp_path / "killed" / NAME).exists():
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    with run("--resume", str(tmp_path / "killed")) as process:
        assert process.wait() == 0
    with run(*asked, str(tmp_path / "whole")) as process:
        assert process.wait() == 0
    killed, whole = (json.loads((tmp_path / name / "results.json").read_text()) for name in ("killed", "whole"))
    for name in ("plain", "weight_norm"):
        assert killed["arms"][name]["runs"][0]["step_loss"] == whole["arms"][name]["runs"][0]["step_loss"]
