"""Comparisons of agents: what is asked, trained, recorded, shown and resumed; players made up, and real ones once."""

import json
import os
import signal
import subprocess
import sys
from functools import partial

import pytest
import torch

from weightnorm import cli
from weightnorm.compare import command
from weightnorm.compare.games import comparison as games_comparison
from weightnorm.compare.games import record as games_record
from weightnorm.compare.games.request import GamesRequest
from weightnorm.compare.report import page
from weightnorm.compare.saving import NAME
from weightnorm.errors import UserError
from weightnorm.tasks.dqn import memory

ASKED = dict(arms=("plain", "weight_norm"), lr=None, g_lr=1.0, seeds=2, budget=2_000, episodes=2, max_frames=400)


class MadeUp:
    """A player that scores as it is told, and learns nothing."""

    points = staticmethod(lambda arm, seed, steps: [float(seed), seed + 2.0])
    loss = staticmethod(lambda arm, seed, steps: 0.5)
    left = 10**9  # epochs until Ctrl-C

    def __init__(self, game, arm, settings, seed, lr, g_lr, device):
        self.arm, self.settings, self.seed, self.steps = arm, settings, seed, 0
        self.losses, self.seconds_of_updates = [], 0.0

    def train(self, steps):
        self.steps += steps
        if self.steps > self.settings.learning_starts:
            self.losses += [self.loss(self.arm, self.seed, self.steps)] * (steps // 4)
        self.seconds_of_updates += 2.0 if self.arm == "plain" else 3.0
        type(self).left -= 1
        if self.left < 0:
            raise KeyboardInterrupt

    def evaluate(self, episodes, max_frames):
        return self.points(self.arm, self.seed, self.steps)[:episodes]

    def state_dict(self):
        return {"steps": self.steps, "tensor": torch.full((2,), float(self.steps))}

    def load_state_dict(self, state):
        assert state["tensor"].tolist() == [state["steps"]] * 2
        self.steps = state["steps"]


@pytest.fixture(autouse=True)
def made_up(monkeypatch):
    monkeypatch.setattr(games_comparison, "Player", MadeUp)
    monkeypatch.setattr(games_record, "random_scores", lambda game, max_frames: [1.0, 2.0, 3.0])
    for name in ("points", "loss", "left"):
        monkeypatch.setattr(MadeUp, name, vars(MadeUp)[name])
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def asked(game="Breakout", memory=None, **changed):
    return GamesRequest.settled(game=game, memory=memory, **(ASKED | changed))


def summed_up(epochs=10**9, **changed):
    request = asked(**changed)
    comparison = request.comparison("cpu")
    turns = iter([False] * min(epochs * len(request.arms) * request.seeds, 10**4) + [True])
    comparison.train(pause=partial(next, turns))
    return request.summary(comparison, "weightnorm compare dqn")


def whole(summary):
    """Return all the words of the page, after JSON took the record."""
    json.dumps(summary.record, allow_nan=False)
    text = page(summary)
    assert text.count("</html>") == 1
    return text


def test_what_is_not_said_is_decided_once(monkeypatch):
    request = asked(game="space invaders", budget=50_000_000)
    assert request.game == "SpaceInvaders"
    assert 0 < request.memory <= memory.free_memory() // 2 // 4 // memory.replay_bytes(1) + 1_000_000
    assert asked().memory == 2_000
    assert asked(memory=1_500).memory == 1_500
    monkeypatch.setattr(memory, "free_memory", lambda: 10 * memory.replay_bytes(1_000))
    assert asked().memory == 1_250  # half of it for 4 players
    with pytest.raises(
        UserError, match=r"dqn compares plain and weight_norm; leave batch_norm, mean_only out of --arms"
    ):
        asked(arms=("plain", "batch_norm", "mean_only"))


def test_memory_is_told_before_it_is_taken_and_refused_where_there_is_less(monkeypatch):
    request = asked(memory=1_000)
    assert request.needs().startswith("replay memory: 1,000 transitions for each of 4 players take 0.11 GB of")
    assert request.needs(resumed=True).endswith("free; agents play their last steps again to fill it")
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * memory.replay_bytes(1_000))
    with pytest.raises(UserError, match=r"4 players take 0\.11 GB, 0\.06 GB are free; 500 fit"):
        request.needs()


def ahead_by(*differences):
    """Return points in which weight norm is ahead, seed by seed."""
    return staticmethod(lambda arm, seed, steps: [10.0 + (arm == "weight_norm") * differences[seed]] * 2)


@pytest.mark.parametrize(
    ("points", "changed", "cell", "said"),
    [
        (ahead_by(5.0, 6.0), {}, "+5.5 (-0.9 to +11.9)", "no difference"),
        (ahead_by(5.0, 5.2), {}, "+5.1 (+3.8 to +6.4)", "higher"),
        (ahead_by(-5.0, -5.2), {}, "-5.1 (-6.4 to -3.8)", "lower"),
        (ahead_by(9.0), {"seeds": 1}, "+9.0", "one seed: no verdict"),
        (ahead_by(9.0, 9.0), {"arms": ("weight_norm",)}, "–", "nothing to compare"),
    ],
)
def test_the_verdict(monkeypatch, points, changed, cell, said):
    monkeypatch.setattr(MadeUp, "points", points)
    summary = summed_up(**changed)
    *_, row = summary.view.table.rows
    assert (row[0], row[3], row[-1]) == ("weight_norm", cell, said)
    assert f"({said})" in summary.view.evidence
    assert summary.view.evidence in whole(summary).replace("&#43;", "+")


def test_the_record_holds_every_number():
    record = summed_up().record
    options = record["options"]
    assert (options["epochs"], options["epochs_compared"], options["last"]) == (20, 20, 5)
    assert record["random_play"] == {"mean": 2.0, "standard_error": pytest.approx(3**-0.5), "n": 3}
    plain = record["arms"]["plain"]
    assert plain["lr"] == 1e-4
    assert record["arms"]["weight_norm"]["lr"] == 3e-4
    assert plain["end"] == {"mean": 1.5, "standard_error": pytest.approx(0.5), "n": 2}
    assert record["arms"]["weight_norm"]["update_time_vs_plain"] == pytest.approx(1.5)
    run = plain["runs"][1]
    assert run["steps"] == list(range(100, 2_001, 100))
    assert run["updates"] == [0] + [25] * 19
    assert run["loss"] == [None] + [0.5] * 19
    assert run["scores"] == [[1.0, 3.0]] * 20


def test_the_end_is_the_mean_of_the_last_quarter(monkeypatch):
    monkeypatch.setattr(MadeUp, "points", staticmethod(lambda arm, seed, steps: [steps, steps + 2.0]))
    arm = summed_up(seeds=1).record["arms"]["plain"]
    assert arm["end"]["mean"] == 1_801
    assert arm["highest"]["mean"] == 2_001


@pytest.mark.parametrize(("game", "beside"), [("Seaquest", "7,375"), ("Pong", None)])
def test_the_papers_table_is_beside_its_games(game, beside):
    summary = summed_up(game=game)
    assert (summary.view.paper is None) == (beside is None)
    assert beside is None or summary.view.paper.rows[1][2] == beside
    assert ("Beside the paper" in whole(summary)) == (beside is not None)


@pytest.mark.parametrize(
    ("game", "budget", "drawn"), [("SpaceInvaders", 3_000_000, 2), ("SpaceInvaders", 2_000, 0), ("Pong", 3_000_000, 0)]
)
def test_figure_5_is_drawn_as_far_as_the_budget_goes(game, budget, drawn):
    score, loss = summed_up(game=game, budget=budget, memory=1_000).view.curves.axes
    assert sum("the paper's" in line.get_label() for line in score.lines) == drawn
    assert len(loss.lines) == 2
    assert "random play" in [line.get_label() for line in score.lines]


def test_an_agent_that_diverges_is_told_and_the_others_go_on(monkeypatch):
    bad = staticmethod(
        lambda arm, seed, steps: float("nan") if (arm, seed) == ("weight_norm", 1) and steps > 500 else 0.5
    )
    monkeypatch.setattr(MadeUp, "loss", bad)
    summary = summed_up()
    runs = summary.record["arms"]["weight_norm"]["runs"]
    assert [run["diverged"] for run in runs] == [False, True]
    assert len(runs[1]["steps"]) == 6
    assert summary.record["finished"]
    assert summary.record["options"]["epochs_compared"] == 20
    assert "plain 1.5 ± 0.5 (reference); weight_norm diverged (diverged)" in whole(summary)


def test_where_all_diverge_the_report_says_so(monkeypatch):
    monkeypatch.setattr(MadeUp, "loss", staticmethod(lambda *_: float("inf")))
    summary = summed_up()
    assert summary.record["finished"]
    assert "plain diverged (reference); weight_norm diverged (diverged)" in whole(summary)


@pytest.mark.parametrize("epochs", [0, 1, 3])
def test_a_report_is_left_however_little_has_run(epochs):
    summary = summed_up(epochs)
    assert not summary.record["finished"]
    assert f"interrupted after {epochs} of 20 epochs" in whole(summary)
    assert ("No evidence" in summary.view.evidence) == (epochs == 0)


@pytest.mark.parametrize("epochs", [0, 3, 30])
def test_interrupted_it_goes_on_with_the_epoch_that_was_not_done(tmp_path, monkeypatch, epochs, capsys):
    request = asked(memory=1_000)
    monkeypatch.setattr(MadeUp, "points", staticmethod(lambda arm, seed, steps: [steps, seed]))
    monkeypatch.setattr(MadeUp, "left", epochs)
    assert command.compare_and_report(request, tmp_path, "cpu", None, 5) == 130
    monkeypatch.setattr(MadeUp, "left", 10**9)
    assert f"--resume {tmp_path}" in capsys.readouterr().err
    assert (tmp_path / NAME).exists()
    assert command.resume_and_report(tmp_path, "cpu", None, 5) == 0
    assert "play their last steps again" in capsys.readouterr().err
    assert not (tmp_path / NAME).exists()
    record = json.loads((tmp_path / "results.json").read_text())
    expected = summed_up(memory=1_000).record
    for name, arm in record["arms"].items():
        for run, theirs in zip(arm["runs"], expected["arms"][name]["runs"], strict=True):
            assert {**run, "seconds": 0} == {**theirs, "seconds": 0}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--game", "Brekout"], "the emulator has no game 'Brekout'; did you mean Breakout?"),
        (["--memory", "900000000"], "900,000,000 transitions for each of 2 players take"),
        (["--arms", "plain,mean_only"], "dqn compares plain and weight_norm; leave mean_only out of --arms"),
        (["--lr", "0.1,0.2"], "dqn compares arms at one learning rate each"),
        (["--g-lr", "1,sqrt"], "give one --lr, one --g-lr, or none"),
        (["--epochs", "3", "--form", "module"], "that means nothing to dqn; leave --epochs, --form out"),
        (["--budget", "10"], "'--budget': 10 is not in the range x>=1000"),
        (["--glimpses", "3"], "--glimpses is an option of draw, not of dqn; leave it out"),
    ],
)
def test_a_mistake_is_told_in_one_line(arguments, words, capsys):
    assert cli.run(["compare", "dqn", *arguments]) == 2
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert words in err


def test_a_missing_extra_is_told_in_one_line():
    code = "import sys; sys.modules['ale_py'] = None; from weightnorm.__main__ import main; main()"
    done = subprocess.run([sys.executable, "-c", code, "compare", "dqn"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "weightnorm: ale_py not installed; pip install 'weightnorm[atari]'\n"


@pytest.mark.slow
def test_a_real_game_from_end_to_end(tmp_path):
    """Train both arms on Breakout, pause, resume, report."""

    def compare(*arguments):
        line = [sys.executable, "-m", "weightnorm", "compare", *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        return subprocess.run(line, capture_output=True, text=True, check=True, env=environment)

    budget = ["--budget", "1200", "--episodes", "2", "--max-frames", "400"]
    paused = compare("dqn", "--game", "breakout", *budget, "--max-minutes", "0.4", "--out", tmp_path)
    assert "1,200 transitions for each of 2 players take 0.07 GB" in paused.stderr
    assert "interrupted after" in paused.stdout
    resumed = compare("--resume", tmp_path)
    assert "play their last steps again" in resumed.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"results.json", "curves.png", "report.html"}
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["finished"]
    for arm in record["arms"].values():
        (run,) = arm["runs"]
        assert run["steps"][-1] == 1_200
        assert sum(run["updates"]) == (1_200 - record["options"]["learning_starts"]) // 4
        assert all(len(scores) == 2 for scores in run["scores"])
        assert len(run["scores"]) == record["options"]["epochs"]
