"""A DQN agent in training: in pieces, scored in between, saved and restored."""

import random
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from stable_baselines3 import DQN

from weightnorm.tasks.dqn import settings as paper
from weightnorm.tasks.dqn.agent import Losses, Schedule, agent, initialise
from weightnorm.tasks.dqn.environment import AtariVecEnv, find_game, random_frames
from weightnorm.tasks.dqn.playing import scores
from weightnorm.tasks.dqn.settings import Settings

_EVALUATION, _REFILL = 1, 2  # games of their own, apart from those of training


class Player:
    """An agent that learns one game, with a random state of its own: what runs in between changes nothing.

    Both arms begin with the same network: v ~ N(0, 0.05²), initialised on frames of random play (section 3).

    Args:
        game: its name, as ``find_game`` understands it.
        arm: one of ``agent.OPTIMIZERS``.
        settings: how long everything takes.
        seed: decides initial weights, games and exploration.
        lr: learning rate; None: the paper's for the arm.
        g_lr: multiplies it for lengths, as in ``wn.Adamax``; None: the optimizer's default, or there are none.
        device: where the network is.

    Attributes:
        model: stable-baselines3's agent.
        losses: of every update since the player was made, or loaded.

    Raises:
        UserError: if the emulator has no such game.

    Source: Salimans & Kingma 2016, section 5.4.
    """

    def __init__(
        self,
        game: str,
        arm: str,
        settings: Settings,
        seed: int = 0,
        lr: float | None = None,
        g_lr: float | str | None = None,
        device: str = "cpu",
    ):
        self.game, self.arm, self.settings, self.seed = find_game(game), arm, settings, seed
        self.device = torch.device(device)
        self.losses: list[float] = []
        self._schedule = Schedule(settings.budget)
        self._random: dict[str, Any] = {}
        frames = torch.from_numpy(random_frames(game, paper.INIT_FRAMES, seed))
        with self._own_random_state():
            self.model = agent(AtariVecEnv(game), arm, settings, seed, lr or paper.RATES[arm], g_lr, self.device)
            initialise(self.model, frames.to(device))
        self.model.set_logger(Losses(self.losses))

    @property
    def steps(self) -> int:
        """Return for how many steps it has trained."""
        return self.model.num_timesteps

    @property
    def seconds_of_updates(self) -> float:
        """Return what all updates took since the player was made, playing apart."""
        return self._schedule.seconds

    def train(self, steps: int) -> None:
        """Play and learn for so many steps more, rounded up to whole updates."""
        with self._own_random_state():
            self.model.learn(steps, self._schedule, log_interval=sys.maxsize, reset_num_timesteps=False)

    def evaluate(self, episodes: int, max_frames: int = paper.MAX_FRAMES) -> list[float]:
        """Play whole games, apart from training, with ε = 0.05; before it trains on, the same ones at every call.

        Args:
            episodes: how many games.
            max_frames: a game is cut off after so many.

        Returns:
            The points of each.
        """
        return scores(
            self.model.policy, self.game, episodes, max_frames, paper.TEST_EPSILON, self._seed_of(_EVALUATION)
        )

    def state_dict(self) -> dict[str, Any]:
        """Return all that changes in training, but for ``losses``, the replay memory and the game in progress."""
        return {
            "steps": self.steps,
            "updates": self.model._n_updates,
            "policy": self.model.policy.state_dict(),  # the target network's too
            "optimizer": self.model.policy.optimizer.state_dict(),
            "random": self._random,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from a ``state_dict``, with a new game.

        The replay memory is filled again with as many transitions as it held: the last steps are played once more, each
        with the ε that it had, by the restored network. All players that load a state go on alike; not quite as the
        one that left it.
        """
        self.model.policy.load_state_dict(state["policy"])
        self.model.policy.optimizer.load_state_dict(deepcopy(state["optimizer"]))  # it would keep the tensors
        self._random = dict(state["random"])
        self.model.num_timesteps = state["steps"]
        self._refill()
        self.model.policy.load_state_dict(state["policy"])  # the target network was renewed meanwhile
        self.model._n_updates = state["updates"]
        self.losses.clear()

    def _refill(self) -> None:
        model, every = self.model, paper.UPDATE_EVERY
        held = min(self.steps, self.settings.memory) // every * every
        assert model.env is not None
        assert model.replay_buffer is not None
        model.replay_buffer.reset()
        model.env.seed(self._seed_of(_REFILL))
        model._last_obs = None  # begin a new game
        model.num_timesteps = model._n_calls = self.steps - held
        model.exploration_rate = model.exploration_schedule(1 - self.steps / self.settings.budget)
        model.gradient_steps = 0
        self.train(held)
        model.gradient_steps = 1

    def _seed_of(self, purpose: int) -> int:
        return int(np.random.SeedSequence((self.seed, self.steps, purpose)).generate_state(1)[0])

    @contextmanager
    def _own_random_state(self) -> Iterator[None]:
        """Put this player's random state in place of the program's, and back."""
        before = random.getstate(), np.random.get_state()
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            if self._random:
                _set_random_state(self.model, self._random)
            try:
                yield
            finally:
                self._random = _random_state(self.model)
                random.setstate(before[0])
                np.random.set_state(before[1])


def _random_state(model: DQN) -> dict[str, Any]:
    """Return what exploration and the choice of transitions are drawn from, in plain types; nothing else draws."""
    state: Any = np.random.get_state(legacy=False)
    drawn = {**state, "state": {**state["state"], "key": state["state"]["key"].tolist()}}
    return {"numpy": drawn, "actions": model.action_space.np_random.bit_generator.state}


def _set_random_state(model: DQN, state: Mapping[str, Any]) -> None:
    np.random.set_state(dict(state["numpy"]))
    model.action_space.np_random.bit_generator.state = state["actions"]
