"""What is written to a computed weight reaches its layer, whatever the idiom; and never where it should not."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import weightnorm as wn

WRITES = {
    "nn.init.normal_": lambda layer: nn.init.normal_(layer.weight),
    "nn.init.kaiming_uniform_": lambda layer: nn.init.kaiming_uniform_(layer.weight),
    "nn.init.xavier_normal_": lambda layer: nn.init.xavier_normal_(layer.weight),
    "nn.init.trunc_normal_": lambda layer: nn.init.trunc_normal_(layer.weight),
    "nn.init.orthogonal_": lambda layer: nn.init.orthogonal_(layer.weight),
    "nn.init.eye_": lambda layer: nn.init.eye_(layer.weight),
    "nn.init.sparse_": lambda layer: nn.init.sparse_(layer.weight, 0.5),
    "nn.init of a part": lambda layer: nn.init.constant_(layer.weight[:, 2:], 0.25),
    ".data.normal_": lambda layer: layer.weight.data.normal_(0.0, 0.01),
    ".data.mul_": lambda layer: layer.weight.data.mul_(3),
    ".data.clamp_": lambda layer: layer.weight.data.clamp_(-0.1, 0.1),
    ".data[0]": lambda layer: layer.weight.data[0].fill_(2.0),
    ".data.T": lambda layer: layer.weight.data.T[1].fill_(2.0),
    ".data = ": lambda layer: setattr(layer.weight, "data", torch.full_like(layer.weight, 3.0)),
    "detach().copy_": lambda layer: layer.weight.detach().copy_(torch.ones(3, 4)),
    "reset_parameters": lambda layer: layer.reset_parameters(),
    "no_grad fill_": torch.no_grad()(lambda layer: layer.weight.fill_(0.7)),
    "no_grad []": torch.no_grad()(lambda layer: layer.weight.__setitem__((0, slice(None)), 0.7)),
    "no_grad chunk": torch.no_grad()(lambda layer: layer.weight.chunk(3)[1].fill_(0.7)),
    "no_grad foreach": torch.no_grad()(lambda layer: torch._foreach_mul_([layer.weight], 2.0)),
    "no_grad out=": torch.no_grad()(lambda layer: torch.mul(torch.ones(3, 4), 2.0, out=layer.weight)),
    "inference_mode": torch.inference_mode()(lambda layer: nn.init.constant_(layer.weight, 0.3)),
    "out= of itself": lambda layer: torch.mul(layer.weight.data, 3, out=layer.weight.data),
    "apply_": lambda layer: layer.weight.data.apply_(lambda x: 2 * x),
    "twice": lambda layer: layer.weight.data.normal_().clamp_(-0.2, 0.2).mul_(0.5),
}


@pytest.mark.parametrize("write", WRITES)
def test_a_write_does_to_the_layer_what_it_does_to_a_plain_one(write):
    plain, layer = nn.Linear(4, 3), nn.Linear(4, 3)
    layer.load_state_dict(plain.state_dict())
    wn.weight_norm(layer)
    before = layer.weight.detach().clone()
    for one in (plain, layer):
        torch.manual_seed(1)
        WRITES[write](one)
    assert not torch.equal(layer.weight, before)
    torch.testing.assert_close(layer.weight.detach().as_subclass(torch.Tensor), plain.weight.detach())
    fresh = wn.remove_weight_norm(copy.deepcopy(layer))
    torch.testing.assert_close(fresh.weight, plain.weight)


def test_a_hifi_gan_initialises_as_its_authors_meant():
    def init_weights(m, mean=0.0, std=0.01):
        if "Conv" in m.__class__.__name__:
            m.weight.data.normal_(mean, std)

    model = nn.Sequential(wn.weight_norm(nn.Conv1d(64, 64, 7)), wn.weight_norm(nn.ConvTranspose1d(64, 32, 4)))
    model.apply(init_weights)
    wn.fold(model)
    for layer in model:
        assert abs(layer.weight.std().item() - 0.01) < 5e-4


def test_reading_leaves_the_layer_as_it_is():
    layer = wn.weight_norm(nn.Linear(4, 3))
    state = copy.deepcopy(layer.state_dict())
    w = layer.weight
    (w.detach().clone().zero_(), w.norm(), w.T @ w, w.abs().sum(), w.cpu(), w.numel(), repr(w), torch.cat([w, w]))
    w.clone().data.zero_()
    for key, value in layer.state_dict().items():
        assert torch.equal(value, state[key])


def test_a_write_that_autograd_records_is_refused():
    layer = wn.weight_norm(nn.Linear(4, 3))
    for write in (lambda w: w.mul_(2), lambda w: w[0].mul_(2)):
        with pytest.raises(ValueError, match="while autograd records"):
            write(layer.weight)
    assert layer.weight.clone().mul_(2).requires_grad  # how to compute with it


def test_a_write_to_an_old_weight_changes_nothing_and_warns():
    layer = wn.weight_norm(nn.Linear(4, 3))
    old = layer.weight.data
    layer(torch.ones(1, 4)).sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    moved = layer.weight.detach().clone()
    with pytest.warns(UserWarning, match="had moved on"):
        old.zero_()
    assert torch.equal(layer.weight, moved)


def test_no_warning_where_nothing_is_wrong():
    layer = wn.weight_norm(nn.Linear(4, 3))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kept = layer.weight.detach()
        for _ in range(3):
            layer(torch.ones(1, 4)).sum().backward()
            optimizer.step()
        (layer.weight - kept).norm()


def test_saved_weights_are_plain_tensors():
    layer, file = wn.weight_norm(nn.Linear(4, 3)), io.BytesIO()
    torch.save({"weight": layer.weight.detach(), "data": layer.weight.data, "part": layer.weight.data[:2]}, file)
    file.seek(0)
    loaded = torch.load(file)  # weights_only
    assert {type(value) for value in loaded.values()} == {torch.Tensor}
    assert type(copy.deepcopy(layer.weight.detach())) is torch.Tensor


def test_a_parameter_made_of_it_is_one_of_its_own():
    layer = wn.weight_norm(nn.Linear(4, 3))
    before = layer.weight.detach().clone()
    for source in (layer.weight, layer.weight.data, layer.weight.detach()[:2]):
        parameter = nn.Parameter(source)
        assert type(parameter) is nn.Parameter
        assert parameter.is_leaf
        parameter.sum().backward()
        torch.optim.SGD([parameter], lr=0.1).step()
        copy.deepcopy(parameter)
    torch.testing.assert_close(layer.weight.detach(), before)


def test_torchs_own_removal_works_on_it():
    layer, x = wn.weight_norm(nn.Linear(4, 3)), torch.randn(2, 4)
    before = layer(x)
    nn.utils.parametrize.remove_parametrizations(layer, "weight")
    assert type(layer.weight) is nn.Parameter
    torch.testing.assert_close(layer(x), before)
    layer.load_state_dict(nn.Linear(4, 3).state_dict())


def test_an_own_layer_that_initialises_itself_in_its_forward_does():
    class Lazily(nn.Linear):
        def forward(self, x):
            self.weight.data.fill_(0.5)
            return super().forward(x)

    layer = wn.weight_norm(Lazily(4, 3, bias=False))
    assert (layer(torch.ones(1, 4)) == 2).all()


def test_a_weight_set_to_zero_can_learn_again():
    layer = wn.weight_norm(nn.Linear(4, 3))
    nn.init.zeros_(layer.weight)
    assert (layer.weight == 0).all()
    layer(torch.ones(1, 4)).sum().backward()
    assert (layer.parametrizations.weight.original0.grad != 0).all()
