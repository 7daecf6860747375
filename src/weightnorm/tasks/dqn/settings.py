"""The settings of the paper's experiment 5.4, DQN on Atari games, and what it reports.

[P] the paper's text; otherwise it follows Mnih et al. 2015, through [Q], the code it adapted (spragunr/deep_q_rl,
``run_nature``); [L] the optimizer in the authors' code. A step is one action: four frames of the game.

Ours differs where stable-baselines3 does, or torch: the loss is the batch's mean ([Q]: sum; Adamax does not see the
difference, but for its eps); Adamax corrects its first steps' bias ([L]: does not); ε falls from the first step on
([Q]: from the first update on); a game cut off after half an hour counts as ended.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from weightnorm.errors import UserError

NETWORK = "CnnPolicy"  # stable-baselines3's is Mnih et al.'s: conv 32 8x8/4, 64 4x4/2, 64 3x3/1, dense 512, dense |A|
RATES = {"plain": 0.0001, "weight_norm": 0.0003}  # of 0.0001, 0.0003, 0.001, 0.003 [P]
BETAS = (0.5, 0.999)  # Adamax's: "momentum 0.5" [P]; [L]
V_STD = 0.05  # v ~ N(0, 0.05²), in both arms [P]
INIT_FRAMES = 500  # of random play, for the data-dependent initialisation; for DQN nobody says, for CIFAR-10 [L]
BATCH = 64  # [P]
UPDATE_EVERY = 4  # steps [Q]
DISCOUNT = 0.99  # [Q]
EPSILON = (1.0, 0.1)  # share of random actions in training, at first and at last [Q]
TEST_EPSILON = 0.05  # [Q]
NO_OPS = 30  # at most so many frames of doing nothing begin a game [Q]
MAX_FRAMES = 108_000  # half an hour of play ends a game; [P] sets no limit, Mnih et al. five minutes

PAPER_BUDGET = 50_000_000  # 200 epochs of 250,000 steps [Q]


class Schedule(NamedTuple):
    """A schedule in steps: the paper's, or a share of the budget, whichever is less."""

    paper: int
    share: float

    def scaled(self, budget: int) -> int:
        """Return it for a budget, in whole updates."""
        steps = min(self.paper, round(self.share * budget))
        return max(steps // UPDATE_EVERY, 1) * UPDATE_EVERY


#                                  paper  share of budget           as in the paper from a budget of
LEARNING_STARTS = Schedule(50_000, 0.05)  # random play before the first update    1,000,000 [Q]
EXPLORATION = Schedule(1_000_000, 0.10)  # ε falls                                10,000,000 [Q]
TARGET_INTERVAL = Schedule(10_000, 0.01)  # the target network is renewed          1,000,000 [Q]
EVALUATION = Schedule(250_000, 0.05)  # an epoch: then the score is taken           5,000,000 [Q]
MEMORY = Schedule(1_000_000, 1.00)  # transitions to learn from                     1,000,000 [Q]

LEAST_BUDGET = 1_000


@dataclass(frozen=True)
class Settings:
    """How long everything takes, in steps.

    Attributes:
        budget: the whole training.
        learning_starts: random play before the first update.
        exploration: ε falls over so many, from the first on.
        target_interval: the target network is renewed after every so many.
        evaluation: the score is taken after every so many: an epoch.
        memory: how many transitions are kept.
    """

    budget: int
    learning_starts: int
    exploration: int
    target_interval: int
    evaluation: int
    memory: int

    @classmethod
    def scaled(cls, budget: int = PAPER_BUDGET, memory: int | None = None) -> "Settings":
        """Return the settings for a budget.

        Args:
            budget: steps of training.
            memory: how many transitions to keep; None: what the schedule says, 28 GB at the paper's budget.

        Raises:
            UserError: if the budget is too small to learn anything in.
        """
        if budget < LEAST_BUDGET:
            raise UserError(f"a budget of {budget:,} steps is too small; give {LEAST_BUDGET:,} or more")
        return cls(
            budget=budget,
            learning_starts=LEARNING_STARTS.scaled(budget),
            exploration=EXPLORATION.scaled(budget),
            target_interval=TARGET_INTERVAL.scaled(budget),
            evaluation=EVALUATION.scaled(budget),
            memory=memory or MEMORY.scaled(budget),
        )


class Reported(NamedTuple):
    """What the paper reports of a game: the highest of all epochs' mean scores an episode, one run each."""

    plain: int
    weight_norm: int
    mnih: int


PAPER: Mapping[str, Reported] = {  # [P]
    "Breakout": Reported(410, 403, 401),
    "Enduro": Reported(1_250, 1_448, 302),
    "Seaquest": Reported(7_188, 7_375, 5_286),
    "SpaceInvaders": Reported(1_779, 2_179, 1_975),
}
# Figure 5: epoch -> mean score in SpaceInvaders of the epochs around it, plain and weight norm; read off, to 5 points.
FIGURE_5: Mapping[int, tuple[int, int]] = {
    10: (402, 511),
    25: (763, 911),
    50: (1_109, 1_258),
    75: (1_169, 1_249),
    100: (1_298, 1_466),
    125: (1_480, 1_385),
    150: (1_523, 1_699),
    175: (1_575, 1_816),
    195: (1_590, 1_542),
}
