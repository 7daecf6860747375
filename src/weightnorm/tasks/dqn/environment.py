"""Atari games as stable-baselines3 wants them: an adapter for the emulator's own vector environment.

The emulator does all of Mnih et al.'s preprocessing itself. Its ``episodic_life`` would start a new game at every lost
life, so that nothing but first lives were ever seen; ``life_loss_info`` ends the episode and lets the game go on.
"""

import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any

import gymnasium
import numpy as np
from ale_py.vector_env import AtariVectorEnv
from gymnasium.spaces import Discrete
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from weightnorm.errors import UserError
from weightnorm.tasks.dqn.settings import MAX_FRAMES, NO_OPS

Indices = None | int | Iterable[int]


def games() -> dict[str, str]:
    """Return the emulator's games that one can play: name -> the emulator's own."""
    made = (spec for spec in gymnasium.registry.values() if spec.namespace == "ALE")
    return {spec.name: spec.kwargs["game"] for spec in made}


def find_game(name: str) -> str:
    """Return the name of a game as ``games`` has it.

    Args:
        name: the same; capitals, spaces, hyphens and underscores do not matter.

    Raises:
        UserError: if the emulator has no such game.
    """
    known = {game.lower(): game for game in games()}
    asked = re.sub(r"[\s_-]", "", name).lower()
    if asked not in known:
        close = [known[match] for match in get_close_matches(asked, known)] or ["SpaceInvaders", "Breakout"]
        raise UserError(f"the emulator has no game {name!r}; did you mean {' or '.join(close)}?")
    return known[asked]


class AtariVecEnv(VecEnv):
    """Copies of a game: 84 x 84 grey pixels of the last four steps, uint8 (N, 4, 84, 84), each step four frames long.

    Args:
        game: its name, as ``find_game`` understands it.
        copies: how many, N.
        training: a lost life ends the episode (the game goes on), and rewards are clipped to [-1, 1]. False: an
            episode is a game, and rewards are its points.
        max_frames: a game is cut off after so many.

    Raises:
        UserError: if the emulator has no such game.

    Source: Mnih et al. 2015, methods.
    """

    action_space: Discrete

    def __init__(self, game: str, copies: int = 1, *, training: bool = True, max_frames: int = MAX_FRAMES):
        self.emulator = AtariVectorEnv(
            games()[find_game(game)],
            copies,
            num_threads=1,
            autoreset_mode="SameStep",  # the library's
            max_num_frames_per_episode=max_frames,
            noop_max=NO_OPS + 1,  # the emulator draws below it
            use_fire_reset=False,
            life_loss_info=training,
            reward_clipping=training,
        )
        super().__init__(copies, self.emulator.single_observation_space, self.emulator.single_action_space)

    def reset(self) -> NDArray[np.uint8]:
        """Begin new games, from the seeds that ``seed`` has left, if it has."""
        seeds = [-1 if seed is None else seed % 2**31 for seed in self._seeds]  # -1: go on drawing
        self._reset_seeds()
        frames, info = self.emulator.reset(seed=np.array(seeds))
        self._begun = _begun(info)
        return frames

    def step_async(self, actions: NDArray[np.int64]) -> None:
        """Send an action to every copy."""
        self.emulator.send(actions)

    def step_wait(self) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """Return frames, rewards, whether the episode has ended, and where it has what its last frames were."""
        frames, rewards, terminated, truncated, info = self.emulator.recv()
        begun = _begun(info)
        restarted, self._begun = begun != self._begun, begun
        dones = terminated | truncated
        infos: list[dict[str, Any]] = [{"TimeLimit.truncated": bool(cut)} for cut in truncated]
        for copy in np.flatnonzero(dones):
            # After a lost life the game goes on from these very frames; the emulator's final_obs is of another step.
            last = info["final_obs"] if restarted[copy] else frames
            infos[copy]["terminal_observation"] = last[copy].copy()
        return frames, rewards.astype(np.float32), dones, infos

    def close(self) -> None:
        """Let go of the emulator."""
        self.emulator.close()

    def get_attr(self, attr_name: str, indices: Indices = None) -> list[Any]:
        """Say that nothing is rendered; copies have no other attributes."""
        if attr_name != "render_mode":
            raise AttributeError(attr_name)
        return [None for _ in self._get_indices(indices)]

    def set_attr(self, attr_name: str, value: Any, indices: Indices = None) -> None:
        """Refuse: copies have no attributes."""
        raise AttributeError(attr_name)

    def env_method(
        self, method_name: str, *method_args: Any, indices: Indices = None, **method_kwargs: Any
    ) -> list[Any]:
        """Refuse: copies have no methods."""
        raise AttributeError(method_name)

    def env_is_wrapped(self, wrapper_class: type[Any], indices: Indices = None) -> list[bool]:
        """Say that no copy is wrapped."""
        return [False for _ in self._get_indices(indices)]


def _begun(info: dict[str, NDArray[np.int32]]) -> NDArray[np.int32]:
    """Return the frame at which each game began, which only a new game changes."""
    return info["frame_number"] - info["episode_frame_number"]


def random_frames(game: str, count: int, seed: int) -> NDArray[np.uint8]:
    """Return what is seen in random play, uint8 (count, 4, 84, 84): every fourth step of four games."""
    env = AtariVecEnv(game, 4)
    env.seed(seed)
    seen, random = [env.reset()], np.random.default_rng(seed)
    while len(seen) * env.num_envs < count:
        for _ in range(4):
            env.step_async(random.integers(env.action_space.n, size=env.num_envs))
            frames, *_ = env.step_wait()
        seen.append(frames)
    env.close()
    return np.concatenate(seen)[:count]
