"""The adapter against the emulator in its own next-step mode, stepped beside it."""

import importlib

import numpy as np
import pytest
from ale_py.vector_env import AtariVectorEnv

import weightnorm.tasks.dqn
from weightnorm.errors import UserError
from weightnorm.tasks.dqn.environment import AtariVecEnv, find_game, games, random_frames


def made(game="Breakout", copies=1, seed=3, **options):
    env = AtariVecEnv(game, copies, **options)
    env.seed(seed)
    return env


def steps_beside_the_emulator(env, rom, steps, **options):
    """Yield what the adapter and the emulator return of the same steps of one game, the latter's resets left out."""
    raw = AtariVectorEnv(rom, 1, num_threads=1, noop_max=31, use_fire_reset=False, reward_clipping=False, **options)
    actions = np.random.default_rng(0).integers(env.action_space.n, size=(steps, 1))
    frames, info = raw.reset(seed=np.array([3]))
    assert np.array_equal(env.reset(), frames)
    lives = info["lives"][0]
    for action in actions:
        frames, rewards, ended, cut, info = raw.step(action)
        last, lost, lives = frames.copy(), info["lives"][0] < lives, info["lives"][0]
        if ended[0] or cut[0]:
            frames, _, _, _, info = raw.step(action)  # only resets
            lives = info["lives"][0]
        yield env.step(action), (frames, last, rewards[0], ended[0], cut[0], lost)


@pytest.mark.parametrize(
    ("game", "rom", "steps"), [("Breakout", "breakout", 500), ("SpaceInvaders", "space_invaders", 900)]
)
@pytest.mark.parametrize("training", [True, False])
def test_it_shows_what_the_emulator_shows(game, rom, steps, training):
    env, games_over, lives_lost, points = made(game, training=training), 0, 0, set()
    for got, (frames, last, reward, ended, _, lost) in steps_beside_the_emulator(env, rom, steps):
        assert np.array_equal(got[0], frames)
        assert got[1] == (np.clip(reward, -1, 1) if training else reward)
        done = ended or (lost and training)
        assert got[2] == done
        assert got[3][0]["TimeLimit.truncated"] is False
        if done:
            assert np.array_equal(got[3][0]["terminal_observation"], last[0])
        else:
            assert "terminal_observation" not in got[3][0]
        games_over, lives_lost, points = games_over + ended, lives_lost + (lost and not ended), points | {int(reward)}
    assert games_over >= 1
    assert lives_lost >= 3
    assert len(points) > 1


@pytest.mark.parametrize("training", [True, False])
def test_a_game_is_cut_off(training):
    env, cuts = made(training=training, max_frames=90), 0
    for got, (frames, last, _, ended, cut, _) in steps_beside_the_emulator(
        env, "breakout", 120, max_num_frames_per_episode=90
    ):
        assert np.array_equal(got[0], frames)
        assert got[2] == (ended or cut)
        assert got[3][0]["TimeLimit.truncated"] == cut
        if cut:
            assert np.array_equal(got[3][0]["terminal_observation"], last[0])
        cuts += cut
    assert cuts >= 4


def test_copies_play_side_by_side_and_each_as_if_alone():
    env, actions = made(copies=3), np.random.default_rng(1).integers(4, size=(150, 3))
    together = [env.reset(), *(env.step(action) for action in actions)]
    for copy in range(3):
        alone = made(seed=3 + copy)
        assert np.array_equal(alone.reset()[0], together[0][copy])
        for action, (frames, rewards, dones, infos) in zip(actions, together[1:], strict=True):
            got = alone.step(action[copy : copy + 1])
            assert np.array_equal(got[0][0], frames[copy])
            assert (got[1][0], got[2][0]) == (rewards[copy], dones[copy])
            if dones[copy]:
                assert np.array_equal(got[3][0]["terminal_observation"], infos[copy]["terminal_observation"])


def test_seeds_decide_the_game_and_serve_once():
    def waited(env):
        env.reset()
        return env.emulator.step(np.array([0, 0]))[4]["episode_frame_number"].tolist()

    env = made(copies=2, seed=7)
    first, second = waited(env), waited(env)
    assert waited(made(copies=2, seed=7)) == first
    assert first[0] != first[1]
    assert first != second


def test_what_was_seen_stays():
    env = made()
    frames = env.reset()
    before = frames.copy()
    for _ in range(20):
        env.step(np.array([2]))
    assert np.array_equal(frames, before)


def test_a_game_begins_with_up_to_thirty_frames_of_nothing():
    env = made()
    env.reset()
    waited = {int(env.emulator.reset()[1]["episode_frame_number"][0]) for _ in range(250)}
    assert waited == set(range(31))


def test_random_play_shows_different_frames_and_the_same_ones_to_a_seed():
    frames = random_frames("SpaceInvaders", 150, seed=1)
    assert frames.shape == (150, 4, 84, 84)
    assert frames.dtype == np.uint8
    assert len({frame.tobytes() for frame in frames}) > 100  # a game stands still at first
    assert np.array_equal(frames, random_frames("SpaceInvaders", 150, seed=1))
    assert not np.array_equal(frames, random_frames("SpaceInvaders", 150, seed=2))


def test_games_are_the_emulators_that_one_can_play():
    assert {"Breakout", "Enduro", "Seaquest", "SpaceInvaders"} <= games().keys()
    assert games()["SpaceInvaders"] == "space_invaders"
    assert not {"combat", "joust", "maze_craze", "warlords"} & set(
        games().values()
    )  # of two players: they end the process


@pytest.mark.parametrize("name", ["SpaceInvaders", "space_invaders", "space invaders", "Space-Invaders"])
def test_a_game_is_found_however_it_is_spelt(name):
    assert find_game(name) == "SpaceInvaders"


@pytest.mark.parametrize(
    ("name", "near"), [("Sequest", "Seaquest"), ("SpaceInvader", "SpaceInvaders"), ("?", "Breakout")]
)
def test_an_unknown_game_is_refused_with_those_that_are_near(name, near):
    for asked in (find_game, AtariVecEnv):
        with pytest.raises(
            UserError, match=rf"no game '{'[?]' if name == '?' else name}'; did you mean .*{near}"
        ) as refusal:
            asked(name)
        assert "\n" not in str(refusal.value)


def test_a_missing_library_is_told_of_in_a_line(monkeypatch):
    monkeypatch.setattr("weightnorm.extras.find_spec", lambda name: None if name == "ale_py" else name)
    with pytest.raises(UserError, match=r"^ale_py not installed; pip install 'weightnorm\[atari\]'$"):
        importlib.reload(weightnorm.tasks.dqn)
