"""Small nets in both forms, and one loop to train them, shared by the optimizer's tests."""

import copy

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm as torch_weight_norm


def conv_net():
    """A net with every axis case that torch's own weight_norm can express."""
    layers = [nn.Conv2d(3, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 4, 3), nn.Tanh(), nn.Flatten(), nn.Linear(256, 5)]
    return nn.Sequential(*layers)


def in_torch_module_form(net):
    """Return a copy with torch's parametrization on every weight, along the output axis."""
    net = copy.deepcopy(net)
    for layer in net:
        if hasattr(layer, "weight"):
            torch_weight_norm(layer, dim=1 if isinstance(layer, nn.ConvTranspose2d) else 0)
    return net


def batches(steps, dtype=torch.float64):
    """Return images and targets for ``conv_net``, step by step."""
    return [(torch.randn(8, 3, 8, 8, dtype=dtype), torch.randn(8, 5, dtype=dtype)) for _ in range(steps)]


def train(net, optimizer, data):
    """Take one step a batch."""
    for x, y in data:
        optimizer.zero_grad()
        (net(x) - y).square().mean().backward()
        optimizer.step()
    return net


def distance(net, other):
    """Return the largest relative difference of any layer's weight or bias."""
    return max(
        ((getattr(a, name) - getattr(b, name)).norm() / getattr(b, name).norm()).item()
        for a, b in zip(net, other, strict=True)
        if hasattr(a, "weight")
        for name in ("weight", "bias")
    )


class Lion(torch.optim.Optimizer):
    """A rule that torch does not have: the sign of an interpolated momentum."""

    def __init__(self, params, lr, betas=(0.9, 0.99), weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                step = (mean * group["betas"][0] + p.grad * (1 - group["betas"][0])).sign()
                p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(group["lr"] * step)
                mean.lerp_(p.grad, 1 - group["betas"][1])
