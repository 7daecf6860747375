"""What was asked of a comparison of agents, and what becomes of it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from weightnorm.compare.arms import ARMS
from weightnorm.compare.games.comparison import GamesComparison
from weightnorm.compare.games.record import games_record
from weightnorm.compare.games.view import games_view
from weightnorm.compare.loop import Options
from weightnorm.compare.view import Summary
from weightnorm.errors import UserError
from weightnorm.tasks.dqn.environment import find_game
from weightnorm.tasks.dqn.memory import check_fits, fitting
from weightnorm.tasks.dqn.settings import RATES, Settings


@dataclass(frozen=True)
class GamesRequest:
    """What was asked for, in plain types.

    Attributes:
        game: one of the emulator's.
        arms: "plain", "weight_norm" or both.
        lr: learning rate of every arm; None: each has the paper's.
        g_lr: factor on that of lengths.
        seeds: how many.
        budget: steps of training.
        memory: transitions that each agent keeps.
        episodes: how many games score an agent after each epoch.
        max_frames: a game that scores it is cut off after so many.
    """

    kind: ClassVar[str] = "games"
    deterministic: ClassVar[bool] = False

    game: str
    arms: Sequence[str]
    lr: float | None
    g_lr: float | str
    seeds: int
    budget: int
    memory: int
    episodes: int
    max_frames: int

    @classmethod
    def settled(cls, *, game: str, memory: int | None, **asked: Any) -> "GamesRequest":
        """Return a request whose every field is decided, here and now.

        Args:
            game: as ``find_game`` understands it.
            memory: None: as many as the budget wants, or as fit in half of the free memory.
            **asked: the rest.

        Raises:
            UserError: if there is no such game or arm, or the budget is too small.
        """
        if strange := [name for name in asked["arms"] if name not in RATES]:
            raise UserError(f"dqn compares {' and '.join(RATES)}; leave {', '.join(strange)} out of --arms")
        wanted = Settings.scaled(asked["budget"]).memory
        players = len(asked["arms"]) * asked["seeds"]
        return cls(game=find_game(game), memory=fitting(wanted, players) if memory is None else memory, **asked)

    def needs(self, resumed: bool = False) -> str:
        """Say in a line how much memory it will take.

        Raises:
            UserError: if there is less.
        """
        line = check_fits(self.memory, len(self.arms) * self.seeds)
        return f"{line}; agents play their last steps again to fill it" if resumed else line

    def comparison(self, device: str) -> GamesComparison:
        """Return what is to be trained.

        Args:
            device: where, as torch spells it.
        """
        settings = Settings.scaled(self.budget, self.memory)
        epochs = -(-settings.budget // settings.evaluation)
        asked = self.episodes, self.max_frames
        return GamesComparison(self.game, settings, self._options(epochs), torch.device(device), *asked)

    def summary(self, comparison: GamesComparison, command: str) -> Summary:
        """Sum up a comparison, finished or not.

        Args:
            comparison: that of this request.
            command: what was typed.
        """
        record = games_record(comparison, command)
        return Summary(record, games_view(record))

    def _options(self, epochs: int) -> Options:
        arms = [ARMS[name] for name in self.arms]
        return Options(arms, epochs, (self.lr,) if self.lr else (), (self.g_lr,), self.seeds, rates=RATES)
