"""stable-baselines3's DQN agent, which weight normalization enters as one argument."""

import time
from collections.abc import Mapping
from typing import Any

import torch
from stable_baselines3 import DQN
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger

import weightnorm as wn
from weightnorm.tasks.dqn import settings as paper
from weightnorm.tasks.dqn.environment import AtariVecEnv
from weightnorm.tasks.dqn.settings import Settings
from weightnorm.tasks.drawing import draw_normal

# All that differs between the arms, besides the learning rate.
OPTIMIZERS: Mapping[str, dict[str, Any]] = {
    "plain": dict(optimizer_class=torch.optim.Adamax, optimizer_kwargs=dict(betas=paper.BETAS)),
    "weight_norm": dict(optimizer_class=wn.Adamax, optimizer_kwargs=dict(betas=paper.BETAS, v_std=paper.V_STD)),
}


def agent(
    env: AtariVecEnv, arm: str, settings: Settings, seed: int, lr: float, g_lr: float | str | None, device: torch.device
) -> DQN:
    """Return the library's agent for an arm of the experiment.

    Args:
        env: where it learns.
        arm: one of ``OPTIMIZERS``.
        settings: how long everything takes.
        seed: decides games and exploration.
        lr: learning rate.
        g_lr: multiplies it for lengths, as in ``wn.Adamax``; None: the optimizer's default, or there are none.
        device: where the network is.
    """
    optimizer = dict(OPTIMIZERS[arm])
    if g_lr is not None:
        optimizer["optimizer_kwargs"] = optimizer["optimizer_kwargs"] | {"g_lr": g_lr}
    return DQN(
        paper.NETWORK,
        env,
        lr,
        policy_kwargs=optimizer,
        buffer_size=settings.memory,
        optimize_memory_usage=True,
        replay_buffer_kwargs=dict(handle_timeout_termination=False),  # the library has it so with the other
        learning_starts=settings.learning_starts,
        batch_size=paper.BATCH,
        gamma=paper.DISCOUNT,
        train_freq=paper.UPDATE_EVERY,
        target_update_interval=settings.target_interval,
        exploration_fraction=settings.exploration / settings.budget,
        exploration_initial_eps=paper.EPSILON[0],
        exploration_final_eps=paper.EPSILON[1],
        max_grad_norm=float("inf"),
        seed=seed,
        device=device,
    )


def initialise(model: DQN, frames: torch.Tensor) -> None:
    """Draw the network's weights, set them by what the frames are, and let the target network have them too."""
    draw_normal(model.q_net, paper.V_STD)
    wn.data_init(model.q_net, frames)
    model.q_net_target.load_state_dict(model.q_net.state_dict())


class Schedule(BaseCallback):
    """Lets a training in pieces follow one schedule, for to the library each piece is the whole; times the updates.

    Args:
        budget: steps of the whole training.

    Attributes:
        seconds: what the updates took so far, playing apart.
    """

    def __init__(self, budget: int):
        super().__init__()
        self.budget, self.seconds = budget, 0.0
        self._played: float | None = None

    def _on_training_start(self) -> None:
        self.model._total_timesteps = self.budget

    def _on_step(self) -> bool:
        return True

    def _on_rollout_end(self) -> None:
        self._played = time.perf_counter()

    def _on_rollout_start(self) -> None:
        if self._played is not None:
            self.seconds += time.perf_counter() - self._played
            self._played = None

    _on_training_end = _on_rollout_start  # the last update of a piece


class Losses(Logger):
    """The library's log, of which the losses are kept."""

    def __init__(self, losses: list[float]):
        super().__init__(None, [])
        self.losses = losses

    def record(self, key: str, value: Any, exclude: str | tuple[str, ...] | None = None) -> None:
        """Keep a value if it is a loss."""
        if key == "train/loss":
            self.losses.append(float(value))
