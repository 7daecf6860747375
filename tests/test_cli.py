"""The command line: quick to answer, one line for a mistake, and a report whatever happens."""

import json
import os
import signal
import subprocess
import sys
import time

import click
import pytest

from weightnorm import __version__, cli
from weightnorm.compare.arms import ARMS
from weightnorm.tasks import TASKS, fashion

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
QUICK = ["compare", "--arms", "plain,weight_norm", "--epochs", "1", "--seeds", "1", "--lr", "0.001", "--device", "cpu"]


@pytest.fixture(autouse=True)
def _interrupts():
    """Give Ctrl-C back to pytest: a comparison ends with it ignored."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def start(*arguments, **options):
    command = [sys.executable, "-m", "weightnorm", *arguments]
    return subprocess.Popen(
        command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_help_is_quick():
    def seconds():
        begin = time.perf_counter()
        with start("--help") as process:
            assert "compare" in process.communicate()[0]
        return time.perf_counter() - begin

    assert min(seconds() for _ in range(5)) < 0.3  # the best: other programs may be busy


@pytest.mark.parametrize(
    "arguments", [["--help"], ["--version"], ["compare", "--help"], ["compare", "--epochs", "0"], []]
)
def test_answers_come_without_torch(arguments):
    code = f"import sys; from weightnorm import cli; cli.run({arguments!r}); sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(capsys):
    assert cli.run(["--version"]) == 0
    assert __version__ in capsys.readouterr().out


def test_help_explains_every_option_and_default(capsys):
    assert cli.run(["compare", "--help"]) == 0
    text = "".join(capsys.readouterr().out.split())
    assert f"[{'|'.join(TASKS)}]" in text
    options = [param for param in cli.compare.params if isinstance(param, click.Option)]
    for option in options:
        assert option.opts[0] in text
        assert "".join(option.help.partition("  [")[0].split()) in text
    assert text.count("[default:") == len(options)
    assert all(name in text for name in ARMS)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["mnist"], "'mnist' is not one of 'fashion', 'cifar10'"),
        (
            ["fashion", "--limit", "100"],
            "the data of fashion comes with the package; leave --data, --limit and --holdout out",
        ),
        (["cifar10", "--limit", "300"], "the limit must be a multiple of 500 up to 50,000; got 300"),
        (["cifar10", "--data", "/dev/null"], "cifar10: no train-*.parquet under /dev/null; name the folder"),
        (["--arms", "plain,fast"], "'fast' is not an arm; there are plain, plain_default_init"),
        (["--arms", ""], "'' is not an arm"),
        (["--epochs", "-3"], "'--epochs': -3 is not in the range x>=1"),
        (["--epochs", "0"], "'--epochs': 0 is not"),
        (["--epochs", "many"], "'many' is not a valid integer"),
        (["--seeds", "0"], "'--seeds': 0 is not"),
        (["--lr", "0.1,-1"], "'--lr': '-1' is not a positive number"),
        (["--lr", "nan"], "'nan' is not a positive number"),
        (["--lr", "0.1,,1"], "'' is not a positive number"),
        (["--g-lr", "cube"], "'cube' is not 'sqrt' or a number >= 0"),
        (["--device", "abacus"], "--device abacus cannot be used"),
        (["--device", "meta"], "--device meta cannot be used"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used"),
        (["--out", "/dev/null/runs"], "cannot write to the folder /dev/null/runs (Not a directory)"),
        (["--speed", "9"], "--speed"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, words, capsys):
    assert cli.run(["compare", *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("weightnorm: ")
    assert words in err


def test_an_unknown_command_is_told_in_one_line(capsys):
    assert cli.run(["comapre"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_data_is_told_in_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(fashion.Fashion.__init__, "__defaults__", ("cpu", tmp_path / "fashion.npz"))
    assert cli.run([*QUICK, "--out", str(tmp_path / "out")]) == 2
    assert "fashion.npz cannot be read" in (err := capsys.readouterr().err)
    assert err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("missing", ["click", "jinja2"])
def test_a_missing_extra_is_told_in_one_line(missing):
    code = f"import sys; sys.modules[{missing!r}] = None; from weightnorm.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "compare"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == f"weightnorm: {missing} not installed; pip install 'weightnorm[compare]'\n"


@pytest.mark.slow
def test_a_comparison_leaves_its_report(tmp_path, capsys):
    folder = tmp_path / "a" / "b"
    assert cli.run([*QUICK, "--out", str(folder)]) == 0
    out = capsys.readouterr().out
    assert "one seed: no verdict" in " ".join(out.split())
    assert str(folder / "report.html") in out
    assert {path.name for path in folder.iterdir()} == {"results.json", "curves.png", "report.html"}
    assert json.loads((folder / "results.json").read_text())["options"]["epochs_compared"] == 1


@pytest.mark.slow
def test_ctrl_c_leaves_a_report_even_if_pressed_twice(tmp_path):
    folder = tmp_path / "out"
    with start("compare", "--arms", "plain,batch_norm", "--epochs", "1000", "--out", str(folder)) as process:
        while not folder.exists():  # made right before training
            assert process.poll() is None
            time.sleep(0.05)
        time.sleep(3)
        for _ in range(2):
            process.send_signal(signal.SIGINT)
            time.sleep(0.2)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in err
    assert "interrupted" in out
    assert {path.name for path in folder.iterdir()} == {"results.json", "curves.png", "report.html", "checkpoint.pt"}
    record = json.loads((folder / "results.json").read_text())
    assert list(record["arms"]) == ["plain", "batch_norm"]
    assert "</html>" in (folder / "report.html").read_text()
