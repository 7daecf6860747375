"""How well games are played."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.policies import BasePolicy

from weightnorm.tasks.dqn.environment import AtariVecEnv

_COPIES = 8  # of a game, at most, that are played side by side
_RANDOM_GAMES = 40


def scores(
    policy: BasePolicy | None, game: str, episodes: int, max_frames: int, epsilon: float, seed: int
) -> list[float]:
    """Play whole games; return the points of each.

    Args:
        policy: says what is best; None: every action is random.
        game: its name.
        episodes: how many games.
        max_frames: a game is cut off after so many.
        epsilon: the share of random actions.
        seed: decides them, and the games.
    """
    env = AtariVecEnv(game, min(episodes, _COPIES), training=False, max_frames=max_frames)
    env.seed(seed)
    player = _EpsilonGreedy(policy, int(env.action_space.n), epsilon, seed)
    points, _ = evaluate_policy(player, env, episodes, return_episode_rewards=True, warn=False)
    env.close()
    return [float(score) for score in points]  # type: ignore[union-attr]


def random_scores(game: str, max_frames: int) -> list[float]:
    """Return the points of games in which every action is random, what no learning at all is worth; as ``scores``."""
    return scores(None, game, _RANDOM_GAMES, max_frames, epsilon=1.0, seed=0)


class _EpsilonGreedy:
    """What a policy finds best, but for a share of random actions, drawn for each copy of a game by itself."""

    def __init__(self, policy: BasePolicy | None, actions: int, epsilon: float, seed: int):
        self.policy, self.actions, self.epsilon = policy, actions, epsilon
        self._random = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[NDArray[Any], None]:
        """Return an action for each copy, as ``evaluate_policy`` asks for it."""
        others = self._random.integers(self.actions, size=len(observation))
        at_random = self._random.random(len(observation)) < self.epsilon
        if self.policy is None:
            return others, None
        best, _ = self.policy.predict(observation, deterministic=True)
        return np.where(at_random, others, best), None
