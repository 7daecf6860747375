"""A policy to be scored."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from stable_baselines3.common.policies import BasePolicy


class EpsilonGreedy:
    """What a policy finds best, but for a share of random actions, drawn for each copy of a game by itself.

    Args:
        policy: the policy.
        actions: how many there are.
        epsilon: the share.
        seed: decides when, and which.
    """

    def __init__(self, policy: BasePolicy, actions: int, epsilon: float, seed: int):
        self.policy, self.actions, self.epsilon = policy, actions, epsilon
        self._random = np.random.default_rng(seed)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = True
    ) -> tuple[NDArray[Any], None]:
        """Return an action for each copy, as ``evaluate_policy`` asks for it."""
        best, _ = self.policy.predict(observation, deterministic=True)
        others = self._random.integers(self.actions, size=len(best))
        return np.where(self._random.random(len(best)) < self.epsilon, others, best), None
