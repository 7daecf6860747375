"""One agent in training: an arm, its learning rates and a seed."""

import copy
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean
from typing import Any

from weightnorm.compare.arms import Arm
from weightnorm.compare.run import Setting
from weightnorm.tasks.dqn.training import Player


@dataclass(frozen=True)
class GameEpoch:
    """What one epoch of play measured.

    Attributes:
        steps: of training, at its end.
        loss: mean of its updates' losses, before each; None: there were none.
        updates: how many.
        scores: the points of the games that scored the agent after it.
        seconds: what training took, scoring apart.
        seconds_of_updates: the share of that in which the network learned.
    """

    steps: int
    loss: float | None
    updates: int
    scores: list[float]
    seconds: float
    seconds_of_updates: float

    @property
    def score(self) -> float:
        """Return the mean of its scores."""
        return fmean(self.scores)


@dataclass
class GameRun:
    """An agent in training, with random states of its own.

    Attributes:
        player: the agent.
        arm: how its weights are trained.
        setting: its learning rates.
        seed: decides initial weights, games and exploration; the same in every arm.
        episodes: how many games score it.
        max_frames: a game that scores it is cut off after so many.
        epochs: what was measured so far.
    """

    player: Player
    arm: Arm
    setting: Setting
    seed: int
    episodes: int
    max_frames: int
    epochs: list[GameEpoch] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._interrupted: dict[str, Any] | None = None

    @property
    def diverged(self) -> bool:
        """Say whether the loss is no longer a finite number."""
        return bool(self.epochs) and not math.isfinite(self.epochs[-1].loss or 0.0)

    @property
    def latest(self) -> str:
        """Return how well it does, for a progress bar."""
        return f"score {self.epochs[-1].score:.1f}"

    def train_epoch(self) -> None:
        """Train one more epoch, score the agent and record both; interrupted, what is saved is the state before."""
        if self._interrupted:
            self.player.load_state_dict(self._interrupted)
        before = copy.deepcopy(self.player.state_dict())
        try:
            epoch = self._epoch()
        except BaseException:
            self._interrupted = before  # to go back at once would be to fill the replay memory again
            raise
        self._interrupted = None
        self.epochs.append(epoch)

    def _epoch(self) -> GameEpoch:
        player = self.player
        player.losses.clear()
        updates, start = player.seconds_of_updates, time.perf_counter()
        player.train(min(player.settings.evaluation, player.settings.budget - player.steps))
        return GameEpoch(
            seconds=time.perf_counter() - start,
            seconds_of_updates=player.seconds_of_updates - updates,
            steps=player.steps,
            loss=fmean(player.losses) if player.losses else None,
            updates=len(player.losses),
            scores=player.evaluate(self.episodes, self.max_frames),
        )

    def saved(self) -> dict[str, Any]:
        """Return the run in plain types and tensors."""
        state = self._interrupted or self.player.state_dict()
        return {"epochs": [asdict(epoch) for epoch in self.epochs], "state": state}

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from what ``saved`` returned; the replay memory is filled again."""
        self.epochs = [GameEpoch(**epoch) for epoch in saved["epochs"]]
        self.player.load_state_dict(saved["state"])
