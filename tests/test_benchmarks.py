"""The benchmarks: the shapes are those of the models they name, and the scripts run end to end on a CPU."""

import importlib
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import weightnorm as wn

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))  # where the scripts find each other when they are run
arms, report, shapes, timing = (importlib.import_module(name) for name in ("arms", "report", "shapes", "timing"))

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
CPU = torch.device("cpu")
# All parameters, normalised layers, weights in these: as published, or counted from the published configurations.
KNOWN = {
    "hifigan": (13_926_017, 78, 13_916_384),
    "hifigan-gan": (74_758_600, 124, 74_727_168),
    "dac": (76_620_777, 78, 76_498_016),
    "convpool": (1_406_794, 10, 1_405_344),
    "resnet50": (25_557_032, 54, 25_502_912),
    "gpt2-small": (124_439_808, 48, 84_934_656),
    "llama-layer": (218_112_000, 7, 218_103_808),
    "gpt2-xl": (1_557_611_200, 192, 1_474_560_000),
}


@pytest.mark.parametrize("name", KNOWN)
def test_models_have_the_published_sizes(name):
    with torch.device("meta"):
        entries = wn.param_groups(shapes.STEPPED[name][1]()).entries
    normalised = [entry.parameter.numel() for entry in entries if entry.axis]
    assert (sum(entry.parameter.numel() for entry in entries), len(normalised), sum(normalised)) == KNOWN[name]


def test_rows_have_the_lengths_that_they_are_named_by():
    assert [shapes.one_matrix(length, 10**6).in_features for length in (96, 131_072)] == [96, 131_072]
    with torch.device("meta"):
        lengths = {
            entry.axis.row_length(entry.parameter) for entry in wn.param_groups(shapes.llama_layer()).entries[:7]
        }
    assert lengths == {4096, 14336}


@pytest.mark.parametrize("name", shapes.TRAINED)
def test_trained_models_map_their_batch_to_a_loss(name):
    training = shapes.TRAINED[name]
    with torch.device("meta"):
        model, (inputs, targets) = training.build(), training.batch(2)
        loss = training.loss(model(inputs), targets)
    loss.backward()
    assert loss.shape == ()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


@pytest.mark.slow
def test_every_arm_steps_on_the_same_weights_and_gradients():
    case = arms.Case(shapes.Tiny, CPU)
    plain, ours, torchs = arms.Stepper(case, arms.torch_adamw), arms.stepper(case), arms.TorchWeightNorm(case)
    pair = [optimizer.param_groups[0]["params"] for optimizer in (plain.optimizer, torchs.optimizer)]
    for arm in (plain.eager(), ours.eager(), torchs.eager()):
        arm.prepare()
        arm.step()
    assert len(pair[0]) + 3 == len(pair[1])  # g beside each v
    assert arms.bytes_moved(plain.optimizer) == arms.bytes_moved(ours.optimizer) == 28 * case.parameters
    assert arms.state_bytes(plain.optimizer) == 8 * case.parameters + 4 * 8  # two moments, and a count a tensor


def test_gradients_move_when_asked():
    seen = []

    class Recording(torch.optim.SGD):
        def step(self):
            seen.append(self.param_groups[0]["params"][0].grad.data_ptr())

    for sets, places in ((1, 1), (2, 2)):
        seen.clear()
        arm = arms.Stepper(arms.Case(shapes.Tiny, CPU, sets=sets), lambda model: Recording(model.parameters())).eager()
        for _ in range(3):
            arm.prepare()
            arm.step()
        assert len(set(seen)) == places
        assert seen[-1] == seen[-3]


def test_an_arm_that_fails_is_noted_and_the_others_go_on():
    calls = []

    def fails_later():
        calls.append(1)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("no room\nmore")

    given = {
        "good": timing.Arm(lambda: time.sleep(1e-4)),
        "bad": timing.Arm(fails_later),
        "never": timing.Failure("no"),
    }
    found = timing.time_in_turn(given, timing.Stopwatch(CPU, flush=False), 10, time.monotonic() + 60)
    assert len(found["good"].seconds) == 10
    assert found["good"].quartiles[0] <= found["good"].median <= found["good"].quartiles[1]
    assert (found["bad"].reason, found["never"].reason) == ("OutOfMemoryError: no room", "no")
    assert list(found) == list(given)
    assert report.ratio(found["bad"], found["good"]) == "–"


def test_rounds_end_with_the_time():
    arm = timing.Arm(lambda: None)
    found = timing.time_in_turn({"a": arm}, timing.Stopwatch(CPU, flush=True), 10**6, time.monotonic())
    assert len(found["a"].seconds) == timing.FEWEST


def test_reports_are_only_ever_added(tmp_path):
    paths = [report.new_file(tmp_path / "results", "step_cpu_202611") for _ in range(3)]
    assert [path.name for path in paths] == ["step_cpu_202611.md", "step_cpu_202611_2.md", "step_cpu_202611_3.md"]


def test_devices_and_times_in_words():
    assert [report.slug(name) for name in ("NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "CPU (AMD EPYC)")] == [
        "h100",
        "a100-sxm4-80gb",
        "cpu",
    ]
    assert [report.digits(seconds) for seconds in (1.23456e-5, 0.0123456, 1.23456)] == ["0.0123", "12.35", "1,235"]


def run(script, *arguments, out):
    """Run a script on the CPU; return the report that it printed, which is also the one that it wrote."""
    command = [sys.executable, str(FOLDER / script), "--device", "cpu", "--out", str(out), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    (path,) = out.iterdir()
    assert path.read_text(encoding="utf-8") == done.stdout
    assert re.fullmatch(r"(compose|mean_only|train_step|step(_rows)?)(_bf16)?_cpu_\d{6}\.md", path.name)
    return done.stdout


def table(text, title):
    """Return a table of a report, row by row, each a dict by column."""
    lines = text.split(f"## {title}\n")[1].split("\n## ")[0].splitlines()
    cells = [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines if line.startswith("|")]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[2:]]


def ratio(cell):
    """Return the ratio in a cell that has one."""
    return float(re.fullmatch(r"[\d.,]+ ms \((\d+\.\d\d)\)", cell)[1])


@pytest.mark.slow
def test_step_reports_models(tmp_path):
    text = run("step.py", "--quick", "--backends", "auto,torch", out=tmp_path)
    (row,) = table(text, "A step")
    assert list(row)[:3] == ["model", "weights", "normalised tensors"]
    assert list(row)[3:] == ["plain", "weight_norm", "ours", "ours, torch backend"]
    assert (row["model"], row["weights"], row["normalised tensors"]) == ("tiny", "3,554", "3 of 8")
    assert all(ratio(row[arm]) > 0 for arm in ("weight_norm", "ours", "ours, torch backend"))
    (limits,) = table(text, "Against the copy bandwidth")
    assert all(re.fullmatch(r"\d+ %", limits[arm]) for arm in list(row)[3:])
    every = table(text, "Every measurement")
    assert [line["arm"] for line in every] == ["plain", "ours", "ours, torch backend", "weight_norm"]
    assert {line["n"] for line in every} == {"5"}
    for fact in (
        "command: python",
        "device: CPU",
        f"torch: {torch.__version__}",
        "python: 3",
        "weightnorm: ",
        "threads",
    ):
        assert fact in text


@pytest.mark.slow
def test_step_reports_rows(tmp_path):
    rows = table(run("step.py", "--quick", "--rows", out=tmp_path), "Rows of one length")
    assert [row["case"] for row in rows] == ["rows of 96", "rows of 4,096"]
    assert all(ratio(row["ours"]) > 0 and row["ours, of the limit"].endswith(" %") for row in rows)


@pytest.mark.slow
def test_step_reports_bfloat16(tmp_path):
    rows = table(run("step.py", "--quick", "--bf16", out=tmp_path), "Training state in bfloat16")
    kept = {row["arm"]: float(row["state bytes a weight"]) for row in rows}
    assert list(kept) == ["plain", "ours, master", "ours, no master"]
    assert kept["plain"] < kept["ours, no master"] < kept["ours, master"]
    assert all(ratio(row["eager"]) > 0 for row in rows[1:])


@pytest.mark.slow
def test_train_step_reports_time_and_memory(tmp_path):
    text = run("train_step.py", "--quick", "--precision", "fp32,bf16", "--module-form", out=tmp_path)
    rows = table(text, "A training step")
    assert [(row["model"], row["precision"], row["mode"]) for row in rows] == [
        ("tiny, 4 examples", "fp32", "eager"),
        ("tiny, 4 examples", "bf16", "eager"),
    ]
    forms = "ours", "ours, module form", "module form, cached"
    assert all(ratio(row[arm]) > 0 for row in rows for arm in ("weight_norm", *forms))
    assert ratio(rows[1]["ours, no master"]) > 0
    assert rows[0]["ours, no master"] == "–"
    assert "Not measured on a CPU." in text


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--bf16"]], ids=["float32", "bfloat16"])
def test_compose_reports_layers_and_models(more, tmp_path):
    text = run("compose.py", "--quick", *more, out=tmp_path)
    rows, limits = table(text, "Forward and backward"), table(text, "Against the copy bandwidth")
    assert [(row["case"], row["weights"]) for row in rows] == [("Linear 8 to 6", "48"), ("tiny", "3,456")]
    assert all(re.fullmatch(r"[\d.]+ ms \(-?[\d.]+\)", row[arm]) for row in rows for arm in ("ours", "ours, cached"))
    assert all(re.fullmatch(r"\d+ %", row[arm]) for row in limits for arm in list(row)[1:])
    arms_of_each = ["copy", "plain", "weight_norm", "ours", "ours, cached"]
    assert [line["arm"] for line in table(text, "Every measurement")] == 2 * arms_of_each


@pytest.mark.slow
def test_mean_only_reports_every_dtype_and_layout(tmp_path):
    text = run("mean_only.py", "--quick", out=tmp_path)
    rows, limits = table(text, "Forward and backward"), table(text, "Against the copy bandwidth")
    kinds = [(dtype, layout) for dtype in ("fp32", "bf16") for layout in ("contiguous", "channels_last")]
    assert [(row["activations"], row["dtype"], row["layout"]) for row in rows] == [
        ("(4, 8, 8, 8)", *kind) for kind in kinds
    ]
    assert all(ratio(row["ours"]) > 0 and row["BatchNorm2d"].endswith(" ms") for row in rows)
    assert all(re.fullmatch(r"\d+ %", row[arm]) for row in limits for arm in ("BatchNorm2d", "ours"))
    assert [line["arm"] for line in table(text, "Every measurement")] == 4 * ["copy", "BatchNorm2d", "ours"]


@pytest.mark.slow
def test_a_run_that_reaches_its_limit_reports_what_it_has(tmp_path):
    models = "tiny,gpt2-xl"  # the second takes longer to draw than there is time
    text = run("step.py", "--models", models, "--backends", "torch", "--limit-seconds", "6", out=tmp_path)
    assert [row["model"] for row in table(text, "A step")] == ["tiny"]
    assert "Stopped by the limit of 6 s" in text


@pytest.mark.parametrize("script", ["step.py", "train_step.py", "compose.py", "mean_only.py"])
def test_unknown_models_are_named(script):
    command = [sys.executable, str(FOLDER / script), "--models", "tiny,gpt3"]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "unknown: gpt3; known are " in done.stderr
