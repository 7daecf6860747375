"""Feed-forward nets for data-dependent initialisation, one a row, and what is measured on them.

NumPy in float64; no line is shared with the package.
"""

import copy
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import nn

import weightnorm as wn
from architectures import HifiGan, Tcn

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Linear, nn.Bilinear, *CONVOLUTIONS)


class Noise(nn.Module):
    """The authors' input noise: drawn anew in every training pass."""

    def forward(self, x):
        return x + 0.15 * torch.randn_like(x) if self.training else x


class Residual(nn.Module):
    """A skip around two layers, as in a pre-activation ResNet: what the sum is depends on both being set."""

    def __init__(self, width):
        super().__init__()
        self.second = nn.Conv2d(width, width, 3, padding=1)  # made first, run last: order of execution is what counts
        self.first = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        return x + self.second(self.first(x.relu()).relu())


class UNet(nn.Module):
    """A branch that skips ahead and is concatenated."""

    def __init__(self):
        super().__init__()
        self.down = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2)
        self.out = nn.Conv2d(7, 2, 1)

    def forward(self, x):
        return self.out(torch.cat([x, self.up(self.down(x).relu())], 1))


class Looped(nn.Module):
    """One layer run three times; its first call decides."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x):
        for _ in range(3):
            x = self.body(x).tanh()
        return self.head(x)


class Pair(nn.Module):
    """Two inputs, by name."""

    def __init__(self):
        super().__init__()
        self.both, self.head = nn.Bilinear(3, 4, 5), nn.Linear(5, 2)

    def forward(self, left, right):
        return self.head(self.both(left, right).relu())


class PreActivation(nn.Module):
    """A block of a pre-activation ResNet without norms; the first of a stage halves the image."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, padding=1)
        self.second = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x):
        return self.shortcut(x) + self.second(self.first(x.relu()).relu())


class ViT(nn.Module):
    """Patches and a block of a vision transformer, its attention written with Linear layers, as timm's is."""

    def __init__(self, width=12, heads=3):
        super().__init__()
        self.heads = heads
        self.patches = nn.Conv2d(3, width, 4, 4)
        self.norms = nn.ModuleList([nn.LayerNorm(width), nn.LayerNorm(width)])
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.1), nn.Linear(4 * width, width))

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        q, k, v = self.qkv(self.norms[0](x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        heads = nn.functional.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(heads.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norms[1](x))


class ConvPool(nn.Sequential):
    """The paper's network for CIFAR-10 (section 5.1), noise and dropout in it; channels / 8."""

    def __init__(self, narrow=8):
        a, b = 96 // narrow, 192 // narrow
        layers = [Noise()]
        for widths in ((3, a, a, a), (a, b, b, b)):
            for inputs, outputs in pairwise(widths):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
            layers += [nn.MaxPool2d(2), nn.Dropout()]
        for kernel in (3, 1, 1):
            layers += [nn.Conv2d(b, b, kernel), nn.LeakyReLU(0.1)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 10))


class Several(nn.Linear):
    """Puts out a tuple, its bias beside it, as tensor-parallel layers do."""

    def forward(self, x):
        return super().forward(x), self.bias


class First(nn.Module):
    """Takes the first of several."""

    def forward(self, several):
        return several[0]


def conv_net():
    return nn.Sequential(
        *(Noise(), nn.Conv2d(3, 8, 3), nn.LeakyReLU(0.1), nn.Conv2d(8, 12, 3, groups=4), nn.LeakyReLU(0.1)),
        *(nn.MaxPool2d(2), nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 10)),
    )


def mean_only_net():
    layers = [nn.Conv2d(3, 8, 3, bias=False), wn.MeanOnlyBatchNorm(8), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers, nn.Conv2d(8, 6, 3, bias=False), wn.MeanOnlyBatchNorm(6), nn.Flatten(2))


def x_of(*shape):
    """A batch away from zero mean and unit spread, so that the first layer has something to correct."""
    return 2 * torch.randn(shape) + 1


def mlp():
    return nn.Sequential(nn.Linear(7, 9), nn.ReLU(), nn.Linear(9, 4))


def chain(*layers):
    """Return a maker of a net; a ReLU between each two layers."""
    return lambda: nn.Sequential(*[part for layer in layers for part in (copy.deepcopy(layer), nn.ReLU())][:-1])


# To try another architecture, add a row: how to make the net, and its batch. Odd and unequal sizes, so that an axis
# taken for another one has the wrong length.
CASES = {
    "conv net, noise and dropout": (conv_net, lambda: x_of(16, 3, 10, 10)),
    "mlp": (mlp, lambda: x_of(64, 7)),
    "mlp on (N, T, C)": (mlp, lambda: x_of(8, 5, 7)),
    "mlp in float64": (lambda: mlp().double(), lambda: x_of(64, 7).double()),
    "conv 1d, dilated": (chain(nn.Conv1d(2, 5, 3, dilation=2), nn.Conv1d(5, 3, 1)), lambda: x_of(9, 2, 12)),
    "conv 3d": (chain(nn.Conv3d(2, 4, 3, padding=1), nn.Conv3d(4, 3, 1)), lambda: x_of(3, 2, 4, 5, 6)),
    "no batch axis": (chain(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 2, 1)), lambda: x_of(3, 12, 12)),
    "transposed": (chain(nn.ConvTranspose2d(3, 6, 3), nn.ConvTranspose2d(6, 4, 2)), lambda: x_of(6, 3, 5, 5)),
    "transposed, grouped": (
        chain(nn.ConvTranspose1d(6, 9, 4, groups=3, stride=2), nn.Conv1d(9, 2, 1)),
        lambda: x_of(8, 6, 7),
    ),
    "transposed, depthwise": (chain(nn.ConvTranspose3d(4, 4, 2, groups=4)), lambda: x_of(3, 4, 3, 3, 3)),
    "shared layer": (Looped, lambda: x_of(40, 6)),
    "residual": (chain(nn.Conv2d(3, 6, 3), Residual(6), Residual(6), nn.Conv2d(6, 2, 1)), lambda: x_of(6, 3, 9, 9)),
    "u-net, a tuple": (UNet, lambda: (x_of(6, 3, 8, 8),)),
    "bilinear, a dict": (Pair, lambda: {"left": x_of(50, 3), "right": x_of(50, 4)}),
    "transformer block": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), lambda: x_of(6, 7, 8)),
    "batch norm behind": (chain(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1)), lambda: x_of(6, 3, 9, 9)),
    "batch norm": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 2, 1)),
        lambda: x_of(6, 3, 9, 9),
    ),
    "mean-only batch norm": (mean_only_net, lambda: x_of(6, 3, 9, 9)),
    "the paper's net": (ConvPool, lambda: x_of(8, 3, 32, 32)),
    "pre-activation resnet": (
        lambda: nn.Sequential(nn.Conv2d(3, 6, 3), PreActivation(6, 6, 1), PreActivation(6, 8, 2)),
        lambda: x_of(6, 3, 16, 16),
    ),
    "vision transformer": (ViT, lambda: x_of(9, 3, 16, 16)),
    "tcn": (partial(Tcn, channels=5, levels=3), lambda: x_of(6, 1, 40)),
    "hifi-gan": (HifiGan, lambda: x_of(2, 80, 9)),
    "a tuple out": (lambda: nn.Sequential(Several(7, 5), First(), nn.ReLU(), nn.Linear(5, 2)), lambda: x_of(64, 7)),
    "module form": (lambda: wn.weight_norm(conv_net()), lambda: x_of(16, 3, 10, 10)),
}


def made(name):
    make, batch = CASES[name]
    return make(), batch()


def called(net, batch):
    """Run a net on a batch as ``data_init`` takes it."""
    return net(**batch) if isinstance(batch, dict) else net(*batch) if isinstance(batch, tuple) else net(batch)


def units_of(layer, t):
    """Return an output as a float64 matrix, a unit a row."""
    t = t.detach().double().numpy()
    if isinstance(layer, CONVOLUTIONS):
        spatial = layer.weight.ndim - 2
        return np.moveaxis(t, t.ndim - spatial - 1, 0).reshape(layer.out_channels, -1)
    return t.reshape(-1, t.shape[-1]).T


def pre_activations(net, batch):
    """Return what each layer's first call puts out, by layer, in a pass that draws the noise that comes next."""
    seen = {}

    def keep(layer, args, t):
        seen.setdefault(layer, units_of(layer, t[0] if isinstance(t, tuple) else t))

    hooks = [layer.register_forward_hook(keep) for layer in net.modules() if isinstance(layer, LAYERS)]
    with torch.no_grad(), torch.random.fork_rng([]):
        called(net, batch)
    for hook in hooks:
        hook.remove()
    return seen


def before(kind, net):
    """Return the layers of a Sequential that stand right before a module of a kind."""
    parts = list(net) if isinstance(net, nn.Sequential) else []
    return {one for one, following in pairwise(parts) if isinstance(following, kind)}


def deviation(net, batch, std=1.0):
    """Return how far the worst unit is from mean 0 (where it has a bias), and from the standard deviation wanted.

    What feeds a batch norm stays as it is, and does not count.
    """
    alone = before(nn.modules.batchnorm._BatchNorm, net)
    seen = {layer: t for layer, t in pre_activations(net, batch).items() if layer not in alone}
    means = [abs(t.mean(1)).max() for layer, t in seen.items() if layer.bias is not None]
    return max(means, default=0.0), max(abs(t.std(1) - std).max() for t in seen.values())


def snapshot(net):
    return copy.deepcopy(net.state_dict()), [module.training for module in net.modules()], torch.get_rng_state()


def assert_unchanged(net, before, but=()):
    """Check that what ``snapshot`` saw is there, bit for bit, but for the tensors so named."""
    tensors, flags, random = before
    for name, tensor in net.state_dict().items():
        assert name in but or torch.equal(tensor, tensors[name]), name
    assert [module.training for module in net.modules()] == flags
    assert torch.equal(torch.get_rng_state(), random)
