"""The comparison is fair, its numbers are what they say, and whatever happens it leaves a report."""

import json
import math
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.compare.arms import ARMS
from weightnorm.compare.evidence import mean_ratio, spread, steps_to_reach, verdict
from weightnorm.compare.loop import Comparison, Options
from weightnorm.compare.models import initial_model
from weightnorm.compare.report import write_report
from weightnorm.compare.results import device_name, results
from weightnorm.compare.run import Epoch, Run, Setting
from weightnorm.compare.table import columns, evidence, notes, rows
from weightnorm.compare.view import Summary, view
from weightnorm.tasks import TASKS, load_task
from weightnorm.tasks.task import Measure, Paper, Schedule, Task

DEFAULT_ARMS = TASKS["fashion"].arms
KEYS = {"task", "measures", "headline", "finals", "paper", "command", "device", "versions", "seeds", "arms", "options"}
KEYS |= {"finished"}


class Tiny(Task):
    """Two classes of 6x6 images, with dropout, so that torch's global random state matters; 5 steps an epoch."""

    name = "tiny"
    measures = {"loss": Measure("loss", 3), "error": Measure("error %", 1)}  # noqa: RUF012
    headline = "error"
    steps_per_epoch = 5

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(50, 1, 6, 6, generator=generator)
        self.labels = (self.images[:, 0, 2:4, 2:4].sum((1, 2)) > 0).long()

    def model(self, norm=None):
        first, last = nn.Conv2d(1, 4, 3, bias=norm is None), nn.Conv2d(4, 2, 4, bias=norm is None)
        norms = [[norm(4)], [norm(2)]] if norm else [[], []]
        return nn.Sequential(first, *norms[0], nn.LeakyReLU(0.1), nn.Dropout(0.2), last, *norms[1], nn.Flatten())

    def init_batch(self):
        return self.images

    def train_batches(self, seed, epoch):
        order = torch.randperm(50, generator=torch.Generator().manual_seed(100 * seed + epoch))
        for chosen in order.split(10):
            yield self.images[chosen], self.labels[chosen]

    def loss(self, model, batch):
        logits = model(batch[0])
        return nn.functional.cross_entropy(logits, batch[1]), 100 * (logits.argmax(1) != batch[1]).float().mean()

    def evaluate(self, model):
        with torch.no_grad():
            return torch.stack(self.loss(model, (self.images, self.labels))).tolist()


def options(arms=DEFAULT_ARMS, epochs=3, lrs=(0.01,), **more):
    return Options([ARMS[name] for name in arms], epochs, lrs, **more)


def trained(**more):
    comparison = Comparison(Tiny(), options(**more))
    comparison.train()
    return comparison


@pytest.fixture(scope="module")
def summary():
    return results(trained(lrs=(0.001, 0.01), g_lrs=(1.0, "sqrt"), seeds=2), "weightnorm compare")


# The forms and the schedule


def report(record, folder):
    write_report(Summary(record, view(record)), folder)


class Scheduled(Tiny):
    """Follows a schedule."""

    def schedule(self, epoch, epochs):
        return Schedule(1 - epoch / epochs, (0.9 - 0.2 * epoch, 0.999))


@pytest.mark.parametrize("arm", ["weight_norm", "weight_norm_mean_only"])
@pytest.mark.parametrize("g_lr", [1.0, 0.3, "sqrt"])
def test_both_forms_train_alike(arm, g_lr):
    """From the same start, through a schedule: the same losses at every step."""
    losses = []
    for form in ("optimizer", "module"):
        comparison = Comparison(Scheduled(), options([arm], 3, g_lrs=(g_lr,), form=form))
        comparison.train()
        losses.append(torch.tensor([epoch.step_loss for epoch in comparison.runs[0].epochs]))
    torch.testing.assert_close(*losses, rtol=1e-4, atol=0)


@pytest.mark.parametrize("v_std", [0.05, None])
def test_both_forms_clip_alike(monkeypatch, v_std):
    """By the norm of the gradients of lengths and directions, where there are any; SGD, since Adam hides the norm."""
    monkeypatch.setattr(Tiny, "v_std", v_std)
    monkeypatch.setattr(Tiny, "draw_weights", lambda self, model: None)
    monkeypatch.setattr(Tiny, "optimizer", lambda self, params, lr: torch.optim.SGD(params, lr))
    ours = lambda self, model, lr, g_lr: wn.SGD(model, lr, v_std=v_std, g_lr=g_lr)  # noqa: E731
    monkeypatch.setattr(Tiny, "weight_norm_optimizer", ours)
    losses = {}
    for max_norm in (None, 0.05):
        monkeypatch.setattr(Tiny, "max_norm", max_norm)
        for form in ("optimizer", "module"):
            comparison = Comparison(Tiny(), options(["plain", "weight_norm"], 3, form=form))
            comparison.train()
            losses[max_norm, form] = torch.tensor([[e.step_loss for e in run.epochs] for run in comparison.runs])
        torch.testing.assert_close(losses[max_norm, "optimizer"], losses[max_norm, "module"], rtol=1e-4, atol=0)
    assert (losses[None, "module"] - losses[0.05, "module"]).flatten(1).abs().max(1).values.gt(1e-4).all()


def test_an_average_goes_back_as_far_as_it_may_and_is_what_is_scored(monkeypatch):
    monkeypatch.setattr(Tiny, "average_epochs", 0.5)
    comparison = Comparison(Tiny(), options(["plain"], 4))
    comparison.prepare()
    (run,) = comparison.runs
    expected, taken = [p.detach().double().clone() for p in run.model.parameters()], []
    step = run._step

    def watched(*batch):
        measured = step(*batch)
        length = max(min(0.5, (len(taken) // 5 + 1) / 5) * 5, 1)
        taken.append(length)
        for mean, p in zip(expected, run.model.parameters(), strict=True):
            mean += (p.detach().double() - mean) / length
        return measured

    run._step = watched
    comparison.train()
    assert taken == [1] * 5 + [2] * 5 + [2.5] * 10
    for mean, p in zip(expected, run.scored.parameters(), strict=True):
        torch.testing.assert_close(p.double(), mean, rtol=1e-5, atol=1e-7)
    assert list(run.epochs[-1].test.values()) == Tiny().evaluate(run.scored.eval())


def test_runs_follow_the_tasks_schedule():
    comparison = Comparison(Scheduled(), options(["plain", "weight_norm"], 3, (0.1,), g_lrs=("sqrt",)))
    comparison.train()
    for run in comparison.runs:
        for group in run.optimizer.param_groups:
            assert group["lr"] == pytest.approx(0.1 / 3)
            assert group["betas"] == (0.5, 0.999)


def test_without_learning_rates_each_arm_has_the_tasks_own():
    rates = {"plain": 0.01, "weight_norm": 0.02}
    comparison = Comparison(Tiny(), options(["plain", "weight_norm"], 1, (), rates=rates))
    comparison.train()
    assert [run.setting.lr for run in comparison.runs] == [0.01, 0.02]


def test_of_a_gpu_the_arithmetic_is_told_too(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)
    assert device_name(torch.device("cuda")) == "cuda (a GPU, TF32 convolutions, deterministic)"


# The arms


def test_arms_start_from_the_same_function():
    task = load_task("fashion")
    models = {}
    for name, arm in ARMS.items():
        models[name] = initial_model(task, arm, seed=3).train()
    plain = models["plain"](task.init_batch())
    assert torch.allclose(plain.std(0, correction=0), torch.ones(10), atol=1e-3)
    for name, model in models.items():
        same = ARMS[name].init == "data"
        assert torch.allclose(model(task.init_batch()), plain, atol=2e-4) == same, name


def test_the_released_codes_plain_arm_steps_on_what_a_fixed_scale_multiplies():
    task = Tiny()
    model = initial_model(task, ARMS["plain_released"], seed=3)
    torch.manual_seed(3)
    outputs = model.train()(task.init_batch())
    first, last = model[0], model[3]
    bound = (6 / (9 + 4 * 9)) ** 0.5
    drawn = first.parametrizations.weight.original
    assert drawn.abs().max().item() <= bound
    assert drawn.std().item() == pytest.approx(bound / 3**0.5, rel=0.2)
    assert {name for name, _ in model.named_parameters()} == {
        f"{i}.{name}" for i in (0, 3) for name in ("bias", "parametrizations.weight.original")
    }
    pre = nn.functional.conv2d(task.images, first.weight, first.bias)
    torch.testing.assert_close(pre.std((0, 2, 3), correction=0), torch.ones(4), rtol=0, atol=1e-4)
    before, scale = last.weight.detach().clone(), last.parametrizations.weight[0].scale
    assert scale.shape == (2, 1, 1, 1)
    outputs.square().sum().backward()
    torch.optim.Adam(model.parameters(), lr=0.001).step()
    torch.testing.assert_close((last.weight - before).abs(), (0.001 * scale).expand_as(before), rtol=1e-2, atol=0)


def test_batch_norm_starts_from_the_directions_of_the_others():
    task, directions = load_task("fashion"), []
    for name in ("plain", "batch_norm"):
        weights = [p.flatten(1) for p in initial_model(task, ARMS[name], seed=3).parameters() if p.ndim == 4]
        directions.append([nn.functional.normalize(w) for w in weights])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*directions, strict=True))


def test_default_arms_are_the_five_of_the_table():
    assert DEFAULT_ARMS == ("plain", "plain_default_init", "weight_norm", "weight_norm_mean_only", "batch_norm")


# The loop


@pytest.mark.parametrize("name", ARMS)
def test_what_runs_in_between_changes_no_result(name):
    among_others = trained(arms=ARMS, seeds=2).runs
    alone = trained(arms=[name], seeds=2).runs
    for run in alone:
        twin = next(r for r in among_others if (r.arm.name, r.seed) == (name, run.seed))
        assert [e.step_loss for e in run.epochs] == [e.step_loss for e in twin.epochs]
        assert [e.test for e in run.epochs] == [e.test for e in twin.epochs]


def test_training_leaves_the_programs_random_state_alone():
    before = torch.get_rng_state()
    trained(epochs=1)
    assert torch.equal(before, torch.get_rng_state())


def test_arms_take_turns_side_by_side():
    told = []
    Comparison(Tiny(), options(arms=["plain", "weight_norm"], epochs=2, g_lrs=(1.0, "sqrt"), seeds=2)).train(
        lambda run: told.append((run.seed, run.arm.name, run.setting.g_lr))
    )
    turn = [(seed, *arm) for seed in (0, 1) for arm in (("plain", None), ("weight_norm", 1.0), ("weight_norm", "sqrt"))]
    assert told == turn * 2


def test_a_run_that_diverges_is_recorded_and_the_others_go_on(tmp_path):
    comparison = trained(arms=["plain", "weight_norm"], epochs=4, lrs=(0.01, 1e30))
    for run in comparison.runs:
        diverges = run.setting.lr > 1
        assert run.diverged == diverges
        assert len(run.epochs) == (1 if diverges else 4)
    record = results(comparison, "")
    assert record["arms"]["plain"]["lr"] == record["arms"]["weight_norm"]["lr"] == 0.01
    assert record["options"]["epochs_compared"] == 4
    report(record, tmp_path)


def test_an_arm_that_only_diverges_says_so(tmp_path):
    record = results(trained(arms=["plain", "weight_norm"], lrs=(1e30,)), "")
    assert record["arms"]["plain"]["final"]["train_loss"]["mean"] is None
    assert [row[columns(record).index("train loss")] for row in rows(record)] == ["diverged"] * 2
    assert "never reached" in evidence(record)
    assert not any("interrupted" in note for note in notes(record))
    report(record, tmp_path)


@pytest.mark.parametrize(("at", "epochs"), [(0, 0), (1, 0), (5, 0), (13, 1), (31, 1), (49, 2)])
def test_an_interrupted_comparison_keeps_whole_epochs_and_reports(at, epochs, tmp_path, monkeypatch):
    calls = iter(range(at))
    plain_loss = Tiny.loss

    def loss(self, model, batch):
        if next(calls, None) is None:
            raise KeyboardInterrupt
        return plain_loss(self, model, batch)

    monkeypatch.setattr(Tiny, "loss", loss)
    comparison = Comparison(Tiny(), options(arms=["plain", "weight_norm"], seeds=2))
    with pytest.raises(KeyboardInterrupt):
        comparison.train()
    assert all(len(epoch.step_loss) == 5 for run in comparison.runs for epoch in run.epochs)
    record = results(comparison, "")
    assert record["options"]["epochs_compared"] == epochs  # 6 calls an epoch, 4 runs a round
    report(record, tmp_path)
    assert set(json.loads((tmp_path / "results.json").read_text())) == KEYS
    assert any("interrupted" in note for note in notes(record))


# What the curves prove


@pytest.mark.parametrize(
    ("target", "losses", "window", "steps"),
    [
        (2.0, [4, 3, 2, 2, 1], 2, 4),
        (3.5, [4, 3, 2, 2, 1], 2, 2),  # at the first step that has a full window
        (1.0, [4, 3, 2, 2, 1], 2, None),
        (9.0, [4], 2, None),  # shorter than a window
        (2.0, [4, math.nan, 1, 1, 1], 2, None),  # a diverged run is over
        (1.0, [1, 5, 1], 1, 1),
    ],
)
def test_steps_to_reach(target, losses, window, steps):
    assert steps_to_reach(target, losses, window) == steps


def test_mean_ratio_is_the_t_interval_of_the_logarithm():
    ratio = mean_ratio([(1, 2), (1, 4), (1, 8)])  # logs: -1, -2, -3 times log 2; standard error log(2)/sqrt(3)
    half = 4.302653 / 3**0.5  # t at 0.975 with 2 degrees of freedom
    assert ratio.mean == pytest.approx(1 / 4)
    assert (ratio.low, ratio.high) == pytest.approx((2 ** (-2 - half), 2 ** (-2 + half)), rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_of_values_that_are_not_finite_there_is_no_mean(bad):
    found = spread([1.0, bad])
    assert math.isnan(found.mean)
    assert (found.standard_error, found.n) == (None, 2)


def test_one_seed_that_diverges_leaves_a_report(tmp_path, monkeypatch):
    comparison = made_up({(arm, 0.1, seed): [4, 3, 2] for arm in ("plain", "weight_norm") for seed in (0, 1)})
    for run in comparison.runs[1:]:
        run.epochs[-1] = made_up_epoch(math.nan, 1.0)
    monkeypatch.setattr(Tiny, "paper", TINY_PAPER)
    record = results(comparison, "")
    assert record["arms"]["plain"]["final"]["train_loss"]["mean"] is None
    report(record, tmp_path)
    assert "diverged" in (tmp_path / "report.html").read_text()


def test_a_setting_that_ends_in_nan_on_held_out_examples_loses(monkeypatch):
    comparison = made_up({("plain", 0.1, 0): [4, 3, 2], ("plain", 0.2, 0): [4, 3, 2.5]})
    comparison.runs[0].epochs[-1].test["error"] = math.nan
    monkeypatch.setattr(Tiny, "holdout", 10)
    assert results(comparison, "")["arms"]["plain"]["lr"] == 0.2


def test_what_was_asked_of_the_task_is_told():
    comparison = made_up({("plain", 0.1, 0): [4, 3, 2]})
    record = results(comparison, "", {"limit": None, "glimpses": 8, "attention": False})
    assert "Of the task: glimpses 8, attention no." in notes(record)
    assert record["options"]["of_the_task"] == {"limit": None, "glimpses": 8, "attention": False}


def test_spread_is_mean_and_standard_error():
    assert spread([1.0, 2.0, 3.0]) == pytest.approx((2, 1 / 3**0.5, 3))
    assert spread([5.0]) == (5, None, 1)
    assert spread([]) is None


@pytest.mark.parametrize(
    ("pairs", "seeds", "said"),
    [
        ([(50, 100), (55, 100), (52, 100)], 3, "fewer steps"),
        ([(150, 100), (155, 100), (152, 100)], 3, "more steps"),
        ([(90, 100), (110, 100), (95, 100)], 3, "no difference"),
        ([(100, 100), (100, 100)], 2, "no difference"),
        ([(50, 100)], 1, "one seed: no verdict"),
        ([(50, 100), (50, 100)], 3, "reached by 2 of 3 seeds"),
        ([], 3, "never reached"),
    ],
)
def test_verdict(pairs, seeds, said):
    assert verdict(mean_ratio(pairs), len(pairs), seeds) == said


TINY_PAPER = Paper(3, ("train", "error"), (0, 2), (12.0,), ("test", "error"), {})


def made_up_epoch(loss, seconds):
    return Epoch([loss] * 5, {"loss": loss, "error": 10.0}, {"loss": 1.0, "error": 20.0}, seconds)


def made_up(curves):
    """Return a comparison with given epoch losses: (arm, lr, seed) -> a loss an epoch, constant over its 5 steps."""
    comparison = Comparison(Tiny(), options(["plain", "weight_norm"], 3, (0.1, 0.2), seeds=2))
    for (arm, lr, seed), losses in curves.items():
        run = Run(comparison.task, ARMS[arm], Setting(lr, 1.0 if arm == "weight_norm" else None), seed, 3)
        step = 0.2 if arm == "plain" else 0.1
        run.epochs = [made_up_epoch(loss, 5 * step) for loss in losses]
        comparison.runs.append(run)
    return comparison


@pytest.mark.parametrize(("holdout", "lr"), [(0, 0.1), (10, 0.2)])
def test_held_out_examples_choose_the_setting_and_the_test_set_does_not(monkeypatch, holdout, lr):
    comparison = made_up({("plain", 0.1, 0): [4, 3, 2], ("plain", 0.2, 0): [4, 3, 2.5]})
    comparison.runs[1].epochs[-1].test["error"] -= 1
    monkeypatch.setattr(Tiny, "holdout", holdout)
    record = results(comparison, "weightnorm compare")
    assert record["arms"]["plain"]["lr"] == lr
    assert ("is 10 training examples held out" in " ".join(notes(record))) == bool(holdout)


def test_each_arm_is_judged_at_its_best_against_plain_at_its_best():
    record = results(
        made_up(
            {
                ("plain", 0.1, 0): [4, 3, 2],  # on average better than at 0.2
                ("plain", 0.1, 1): [4, 3, 2.5],
                ("plain", 0.2, 0): [4, 3, 1],
                ("plain", 0.2, 1): [4, 4, 4],
                ("weight_norm", 0.1, 0): [2, 2, 2],
                ("weight_norm", 0.1, 1): [2, 2, 2],
                ("weight_norm", 0.2, 0): [3, 2, 1],  # reaches seed 0's target, 2, at step 10
                ("weight_norm", 0.2, 1): [3, 2, 1],  # and seed 1's, 2.5, halfway through that epoch: (2 * 3 + 3 * 2)/5
            }
        ),
        "",
    )
    plain, ours = record["arms"]["plain"], record["arms"]["weight_norm"]
    assert (plain["lr"], ours["lr"]) == (0.1, 0.2)
    assert plain["train_loss"] == [4, 3, 2.25]
    assert plain["steps_to_plain"] == 15
    assert ours["steps_to_plain"] == (10 + 8) / 2
    assert ours["seconds_per_step"] == pytest.approx(0.1)
    assert ours["seconds_to_plain"] == pytest.approx(0.9)
    assert ours["step_time_vs_plain"] == pytest.approx(0.5)
    assert ours["steps_vs_plain"]["mean"] == pytest.approx(math.sqrt(10 / 15 * 8 / 15))
    assert (plain["verdict"], ours["verdict"]) == ("reference", "no difference")  # two seeds: the interval is wide
    assert "weight_norm took 60% of plain's steps and 30% of its time (no difference)" in evidence(record)


@pytest.mark.parametrize(("arms", "words"), [(["weight_norm"], "plain arm, which"), (["plain"], "only the plain arm")])
def test_without_a_pair_there_is_no_evidence(arms, words, tmp_path):
    record = results(trained(arms=arms, epochs=1), "")
    assert words in evidence(record)
    report(record, tmp_path)


# The report


def test_results_hold_every_number(summary, tmp_path):
    assert set(summary) == KEYS
    assert list(summary["arms"]) == list(DEFAULT_ARMS)
    for name, arm in summary["arms"].items():
        for measure in ("train_loss", "train_error", "test_error", "test_loss"):
            assert len(arm[measure]) == 3
        assert arm["seconds_per_step"] > 0
        assert "steps_to_plain" in arm
        assert len(arm["runs"]) == 2 * 2 * (2 if ARMS[name].weight_norm else 1)
        assert all(len(run["step_loss"]) == 15 for run in arm["runs"])
    report(summary, tmp_path)
    strict = json.loads((tmp_path / "results.json").read_text(), parse_constant=pytest.fail)
    assert strict == summary


def test_several_g_lrs_are_told_as_more_chances(summary):
    assert any("more settings" in note for note in notes(summary))


class Page(HTMLParser):
    """Collects a page's tags, checks that they nest, and lists what it would load."""

    VOID = ("meta", "link", "img", "br", "hr", "input")

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.loads, self.text = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.loads += [v for k, v in attributes if k in ("src", "href", "xlink:href", "data") and not v.startswith("#")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.handle_endtag(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_the_page_is_whole_and_loads_nothing(summary, tmp_path):
    report(summary, tmp_path)
    text = (tmp_path / "report.html").read_text()
    page = Page(text)
    assert page.open == []
    assert page.loads == []
    assert "url(http" not in text
    assert "@import" not in text
    assert {"svg", "table"} <= set(page.tags)
    assert page.tags.count("tr") == 1 + len(DEFAULT_ARMS)
    words = "".join(page.text)
    assert evidence(summary) in words
    assert all(cell in words for row in rows(summary) for cell in row)


def test_text_in_the_page_is_escaped(summary, tmp_path):
    report({**summary, "command": "<script>alert(1)</script>"}, tmp_path)
    assert "script" not in Page((tmp_path / "report.html").read_text()).tags


def test_files_are_replaced_whole_and_nothing_else_is_left(summary, tmp_path):
    (tmp_path / "results.json").write_text("old")
    report(summary, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curves.png", "report.html"}
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG\r\n")
