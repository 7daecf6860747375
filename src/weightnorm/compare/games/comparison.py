"""All agents of a comparison."""

from dataclasses import dataclass, field

import torch

from weightnorm.compare.arms import Arm
from weightnorm.compare.games.run import GameRun
from weightnorm.compare.loop import Options, Turns
from weightnorm.compare.run import Setting
from weightnorm.tasks.dqn.settings import Settings
from weightnorm.tasks.dqn.training import Player


@dataclass
class GamesComparison(Turns[GameRun]):
    """All runs of a comparison.

    Attributes:
        game: what is learned.
        settings: how long everything takes.
        options: arms, learning rates and seeds.
        device: where the networks are.
        episodes: how many games score an agent after each epoch.
        max_frames: a game that scores it is cut off after so many.
        runs: those made so far.
    """

    game: str
    settings: Settings
    options: Options
    device: torch.device
    episodes: int
    max_frames: int
    runs: list[GameRun] = field(default_factory=list)

    def make(self, arm: Arm, setting: Setting, seed: int) -> GameRun:
        """Return a new run."""
        player = Player(self.game, arm.name, self.settings, seed, *setting, device=str(self.device))
        return GameRun(player, arm, setting, seed, self.episodes, self.max_frames)
