"""Both arms from end to end, on a network and games of the paper's size and a budget of seconds."""

import random
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

import weightnorm as wn
from weightnorm.errors import UserError
from weightnorm.tasks.dqn import playing, settings, training
from weightnorm.tasks.dqn.agent import OPTIMIZERS
from weightnorm.tasks.dqn.environment import AtariVecEnv, random_frames
from weightnorm.tasks.dqn.settings import Settings
from weightnorm.tasks.dqn.training import Player

SETTINGS = Settings(budget=400, learning_starts=40, exploration=200, target_interval=80, evaluation=80, memory=160)
ARMS = list(OPTIMIZERS)
seen = cache(random_frames)


@pytest.fixture(autouse=True)
def small(monkeypatch):
    monkeypatch.setattr(settings, "INIT_FRAMES", 120)
    monkeypatch.setattr(settings, "BATCH", 8)
    monkeypatch.setattr(training, "random_frames", seen)


def made(arm, seed=0, **changed):
    return Player("Breakout", arm, Settings(**(vars(SETTINGS) | changed)), seed)


def weights(network):
    return torch.cat([tensor.flatten() for tensor in network.state_dict().values()])


def same(one, other):
    """Say whether two states are equal, tensors and all."""
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    return torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


def test_the_network_is_the_papers():
    network = made("plain").model.q_net
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.ReLU | nn.Flatten)]
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.ReLU] * 3 + [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear]
    shapes = [(layer.weight.shape, getattr(layer, "stride", None)) for layer in layers if hasattr(layer, "weight")]
    assert shapes == [
        ((32, 4, 8, 8), (4, 4)),
        ((64, 32, 4, 4), (2, 2)),
        ((64, 64, 3, 3), (1, 1)),
        ((512, 64 * 7 * 7), None),
        ((4, 512), None),  # one for each action
    ]
    pixels = torch.from_numpy(random_frames("Breakout", 2, seed=0))
    by_hand = nn.Sequential(*layers)(pixels.float() / 255)
    assert torch.equal(network(pixels), by_hand)


def test_arms_begin_with_the_same_network_standardised_and_its_target_in_sync():
    plain, weight_norm = made("plain").model, made("weight_norm").model
    assert torch.equal(weights(plain.policy), weights(weight_norm.policy))
    assert torch.equal(weights(plain.q_net), weights(plain.q_net_target))
    values = plain.q_net(torch.from_numpy(seen("Breakout", settings.INIT_FRAMES, 0)))
    torch.testing.assert_close(values.mean(0), torch.zeros(4), atol=1e-4, rtol=0)
    torch.testing.assert_close(values.std(0, correction=0), torch.ones(4), atol=1e-3, rtol=0)
    assert not torch.equal(weights(plain.q_net), weights(made("plain", seed=1).model.q_net))


@pytest.mark.parametrize(
    ("arm", "cls", "rate"), [("plain", torch.optim.Adamax, 1e-4), ("weight_norm", wn.Adamax, 3e-4)]
)
def test_the_optimizer_entered_by_its_argument(arm, cls, rate):
    player = made(arm)
    player.train(60)
    optimizer = player.model.policy.optimizer
    assert type(optimizer) is cls
    (group,) = optimizer.param_groups
    assert (group["lr"], group["betas"]) == (rate, (0.5, 0.999))
    assert [id(tensor) for tensor in group["params"]] == [id(tensor) for tensor in player.model.q_net.parameters()]
    if arm == "weight_norm":
        assert group["v_std"] == 0.05
        scaled = [
            optimizer.state[tensor]["scale"].shape for tensor in group["params"] if "scale" in optimizer.state[tensor]
        ]
        assert [shape.numel() for shape in scaled] == [32, 64, 64, 512, 4]
    other = Player("Breakout", arm, SETTINGS, lr=0.5)
    assert other.model.policy.optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("arm", ARMS)
def test_training_in_pieces_is_training_at_once_whatever_runs_in_between(arm):
    whole, pieces = made(arm), made(arm)
    whole.train(160)
    for piece in (40, 36, 84):
        pieces.train(piece)
        pieces.evaluate(1, max_frames=80)
        np.random.rand(3), torch.rand(3), random.random()
    assert pieces.steps == whole.steps == 160
    assert len(whole.losses) == (160 - 40) // 4
    assert pieces.losses == whole.losses
    assert len(set(whole.losses)) > 20
    assert np.isfinite(whole.losses).all()
    assert torch.equal(weights(pieces.model.policy), weights(whole.model.policy))


def test_arms_part_at_the_first_update():
    plain, weight_norm = made("plain"), made("weight_norm")
    for player in (plain, weight_norm):
        player.train(48)
    assert plain.losses[0] == weight_norm.losses[0]
    assert plain.losses[1] != weight_norm.losses[1]


def test_schedules_follow_the_budget():
    player, epsilons, renewed = made("plain"), [], []
    for _ in range(60):
        before = weights(player.model.q_net_target)
        player.train(4)
        epsilons.append(player.model.exploration_rate)
        renewed.append(not torch.equal(before, weights(player.model.q_net_target)))
    np.testing.assert_allclose(epsilons, np.maximum(1 - 0.9 * np.arange(4, 244, 4) / 200, 0.1))
    assert [4 * (turn + 1) for turn, changed in enumerate(renewed) if changed] == [80, 160, 240]


def test_the_programs_random_state_stays():
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    player = made("weight_norm")
    player.train(60)
    player.evaluate(1, max_frames=80)
    assert random.getstate() == before[0]
    assert np.random.get_state()[1].tolist() == before[1]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_games_are_played_apart_for_points_and_the_same_ones_until_training_goes_on(monkeypatch):
    played = []

    class Watched(AtariVecEnv):
        def step_wait(self):
            played.append((self.num_envs, *super().step_wait()))
            return played[-1][1:]

    player = Player("SpaceInvaders", "plain", SETTINGS)
    assert player.model.env.step_wait  # trained in a game of its own
    monkeypatch.setattr(playing, "AtariVecEnv", Watched)
    scores = player.evaluate(3, max_frames=600)
    assert len(scores) == 3
    rewards = np.array([rewards for _, _, rewards, _, _ in played])
    ended = np.array([ended for *_, ended, _ in played])
    assert rewards.max() > 1  # points
    firsts = [rewards[: 1 + int(np.argmax(ended[:, copy])), copy].sum() for copy in range(3)]
    assert sorted(scores) == sorted(firsts)
    assert len(played) >= 140  # lost lives did not end them
    assert player.evaluate(3, max_frames=600) == scores
    assert len(player.evaluate(10, max_frames=40)) == 10
    assert played[-1][0] == 8


@pytest.fixture(params=ARMS)
def saved(request, tmp_path):
    player = made(request.param)
    player.train(200)
    torch.save(player.state_dict(), tmp_path / "player.pt")
    return player, torch.load(tmp_path / "player.pt", weights_only=True)


def test_what_was_saved_is_restored_and_the_memory_is_full_again(saved):
    player, state = saved
    restored = made(player.arm)
    restored.load_state_dict(state)
    assert same(restored.model.policy.state_dict(), player.model.policy.state_dict())
    assert not torch.equal(weights(restored.model.q_net), weights(restored.model.q_net_target))
    assert same(restored.model.policy.optimizer.state_dict(), player.model.policy.optimizer.state_dict())
    assert restored.steps == player.steps == 200
    assert restored.model._n_updates == player.model._n_updates == 40
    assert restored.model._n_calls == player.model._n_calls
    assert restored.model.exploration_rate == player.model.exploration_rate
    memory = restored.model.replay_buffer
    assert memory.full  # 160 of 160
    assert (memory.observations.reshape(160, -1).max(1) > 0).all()
    assert restored.losses == []


def test_players_that_load_a_state_go_on_alike(saved):
    player, state = saved
    first, second = made(player.arm), made(player.arm, seed=0)
    second.train(60)  # forgotten
    for restored in (first, second):
        restored.load_state_dict(state)
        restored.train(80)
    assert first.losses == second.losses
    assert len(first.losses) == 20
    assert torch.equal(weights(first.model.policy), weights(second.model.policy))
    assert first.evaluate(1, max_frames=80) == second.evaluate(1, max_frames=80)


def test_a_memory_that_was_not_full_is_refilled_as_far(tmp_path):
    player = made("plain")
    player.train(72)
    restored = made("plain")
    restored.load_state_dict(player.state_dict())
    assert restored.model.replay_buffer.pos == 72
    assert not restored.model.replay_buffer.full


def test_an_unknown_game_is_refused():
    with pytest.raises(UserError, match="no game 'Brekout'; did you mean Breakout"):
        Player("Brekout", "plain", SETTINGS)
