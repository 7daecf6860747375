"""Nets that people train with weight norm, rebuilt from their published shapes; channels divided to be quick.

Their authors initialise some before they wrap them, here in ``__init__``, and some after, here in ``initialise``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F


def same(inputs, outputs, kernel, dilation=1):
    """Return a convolution that keeps the length."""
    return nn.Conv1d(inputs, outputs, kernel, dilation=dilation, padding=dilation * (kernel - 1) // 2)


class Branch(nn.Module):
    """HiFi-GAN's residual block: for each dilation a dilated convolution and a plain one."""

    def __init__(self, channels, kernel):
        super().__init__()
        self.convs1 = nn.ModuleList(same(channels, channels, kernel, dilation) for dilation in (1, 3, 5))
        self.convs2 = nn.ModuleList(same(channels, channels, kernel) for _ in range(3))

    def forward(self, x):
        for dilated, plain in zip(self.convs1, self.convs2, strict=True):
            x = x + plain(F.leaky_relu(dilated(F.leaky_relu(x, 0.1)), 0.1))
        return x


class HifiGan(nn.Module):
    """The generator of HiFi-GAN V1: 256 samples for a frame of 80 mels. Channels / 16."""

    def __init__(self, mels=80, channels=512 // 16, rates=(8, 8, 2, 2)):
        super().__init__()
        widths = [channels // 2**i for i in range(len(rates) + 1)]
        stages = list(zip(widths[:-1], widths[1:], rates, strict=True))
        self.conv_pre = same(mels, channels, 7)
        self.ups = nn.ModuleList(nn.ConvTranspose1d(a, b, 2 * r, r, padding=r // 2) for a, b, r in stages)
        self.resblocks = nn.ModuleList(Branch(b, kernel) for _, b, _ in stages for kernel in (3, 7, 11))
        self.conv_post = same(widths[-1], 1, 7)

    def forward(self, mel):
        x = self.conv_pre(mel)
        for i, up in enumerate(self.ups):
            x = up(F.leaky_relu(x, 0.1))
            x = sum(branch(x) for branch in self.resblocks[3 * i : 3 * i + 3]) / 3
        return self.conv_post(F.leaky_relu(x)).tanh()

    def initialise(self):
        for part in (self.ups, self.resblocks, self.conv_post):
            part.apply(_normal_data)


def _normal_data(layer):
    if isinstance(layer, nn.Conv1d | nn.ConvTranspose1d):
        layer.weight.data.normal_(0.0, 0.01)


class Snake(nn.Module):
    """DAC's activation. Its parameter has three axes and is no weight."""

    def __init__(self, channels):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))

    def forward(self, x):
        return x + (self.alpha * x).sin().square() / (self.alpha + 1e-9)


class Residual(nn.Sequential):
    def forward(self, x):
        return x + super().forward(x)


class DacEncoder(nn.Sequential):
    """The encoder of DAC at 44 kHz: 512 samples become a frame. Channels / 8."""

    def __init__(self, channels=64 // 8, strides=(2, 4, 8, 8)):
        layers = [same(1, channels, 7)]
        for i, stride in enumerate(strides):
            c = channels * 2**i
            units = [Residual(Snake(c), same(c, c, 7, dilation), Snake(c), same(c, c, 1)) for dilation in (1, 3, 9)]
            layers += [*units, Snake(c), nn.Conv1d(c, 2 * c, 2 * stride, stride, padding=stride // 2)]
        super().__init__(*layers, Snake(2 * c), same(2 * c, 2 * c, 3))

    def initialise(self):
        for layer in self.modules():
            if isinstance(layer, nn.Conv1d):
                nn.init.trunc_normal_(layer.weight, std=0.02)
                nn.init.constant_(layer.bias, 0)


class PosConv(nn.Module):
    """The positional embedding of wav2vec 2.0: a kernel of 128 in 16 groups. Channels / 16."""

    def __init__(self, channels=768 // 16, kernel=128):
        super().__init__()
        self.conv = nn.Conv1d(channels, channels, kernel, padding=kernel // 2, groups=16)
        nn.init.normal_(self.conv.weight, std=math.sqrt(4 / (kernel * channels)))
        nn.init.constant_(self.conv.bias, 0)

    def forward(self, x):
        return x + F.gelu(self.conv(x.mT)[..., :-1]).mT


class WaveGlowLayer(nn.Module):
    """The net of one of WaveGlow's coupling layers. Channels and mels / 16."""

    def __init__(self, audio=4, mels=640 // 16, channels=256 // 16, depth=8):
        super().__init__()
        self.start = same(audio, channels, 1)
        self.cond_layer = same(mels, 2 * channels * depth, 1)
        self.in_layers = nn.ModuleList(same(channels, 2 * channels, 3, 2**i) for i in range(depth))
        widths = [2 * channels] * (depth - 1) + [channels]
        self.res_skip_layers = nn.ModuleList(same(channels, width, 1) for width in widths)
        self.end = same(channels, 2 * audio, 1)
        nn.init.zeros_(self.end.weight)
        nn.init.zeros_(self.end.bias)

    def forward(self, audio, mel):
        x, skips = self.start(audio), 0
        channels = x.shape[1]
        conditions = self.cond_layer(mel).chunk(len(self.in_layers), dim=1)
        for inner, res_skip, condition in zip(self.in_layers, self.res_skip_layers, conditions, strict=True):
            value, gate = (inner(x) + condition).chunk(2, dim=1)
            out = res_skip(value.tanh() * gate.sigmoid())
            skips = skips + out[:, -channels:]
            if out.shape[1] > channels:  # all but the last
                x = x + out[:, :channels]
        return self.end(skips)


class Sdf(nn.Module):
    """The signed distance field of NeuS: 9 linear layers; encoded points enter the first and the fifth. Width / 4."""

    def __init__(self, width=256 // 4, octaves=6):
        super().__init__()
        self.octaves, encoded = octaves, 3 + 6 * octaves
        outputs = [width] * 3 + [width - encoded] + [width] * 4 + [1 + width]
        self.lins = nn.ModuleList(nn.Linear(a, b) for a, b in zip([encoded] + [width] * 8, outputs, strict=True))
        for lin in self.lins:  # so that it starts as the distance from a sphere
            nn.init.normal_(lin.weight, std=math.sqrt(2 / lin.out_features))
            nn.init.zeros_(lin.bias)
        nn.init.zeros_(self.lins[0].weight[:, 3:])
        nn.init.zeros_(self.lins[4].weight[:, 3 - encoded :])
        nn.init.normal_(self.lins[8].weight, math.sqrt(math.pi / width), 1e-4)
        nn.init.constant_(self.lins[8].bias, -0.5)

    def forward(self, points):
        waves = [wave(points * 2**i) for i in range(self.octaves) for wave in (torch.sin, torch.cos)]
        x = encoded = torch.cat([points, *waves], dim=1)
        for i, lin in enumerate(self.lins):
            x = lin(torch.cat([x, encoded], dim=1) / math.sqrt(2) if i == 4 else x)
            x = F.softplus(x, beta=100) if i < 8 else x
        return x


class CausalBlock(nn.Module):
    """A block of a TCN. Its convolutions are registered twice, so a checkpoint holds each under two names."""

    def __init__(self, inputs, outputs, kernel, dilation):
        super().__init__()
        self.padding = nn.ConstantPad1d(((kernel - 1) * dilation, 0), 0.0)
        self.conv1 = nn.Conv1d(inputs, outputs, kernel, dilation=dilation)
        self.conv2 = nn.Conv1d(outputs, outputs, kernel, dilation=dilation)
        self.net = nn.Sequential(self.padding, self.conv1, nn.ReLU(), self.padding, self.conv2, nn.ReLU())
        self.downsample = nn.Identity() if inputs == outputs else nn.Conv1d(inputs, outputs, 1)

    def forward(self, x):
        return (self.net(x) + self.downsample(x)).relu()


class Tcn(nn.Module):
    """The temporal convolutional net for sequential MNIST: 8 blocks of 25 channels, kernel 7. As published."""

    def __init__(self, channels=25, levels=8):
        super().__init__()
        self.blocks = nn.Sequential(*(CausalBlock(channels if i else 1, channels, 7, 2**i) for i in range(levels)))
        self.linear = nn.Linear(channels, 10)

    def forward(self, x):
        return self.linear(self.blocks(x)[..., -1])

    def initialise(self):
        for block in self.blocks:
            block.conv1.weight.data.normal_(0, 0.01)
            block.conv2.weight.data.normal_(0, 0.01)


class Lstm(nn.Module):
    """Two layers of LSTM in both directions with projections: three weights each."""

    def __init__(self, inputs=6, hidden=8, outputs=5):
        super().__init__()
        self.lstm = nn.LSTM(inputs, hidden, num_layers=2, bidirectional=True, proj_size=outputs)

    def forward(self, x):
        return self.lstm(x)[0]

    def initialise(self):
        for name in self.lstm._flat_weights_names:
            if name.startswith("weight_hh"):
                nn.init.orthogonal_(getattr(self.lstm, name))


def squared_error(model, inputs, target):
    return (model(*inputs) - target).square().sum()


def eikonal(model, inputs, target):
    """Fit values, and slopes of length 1 (the gradient of a gradient)."""
    (points,) = inputs
    points = points.detach().requires_grad_()
    out = model(points)
    (slope,) = torch.autograd.grad(out[:, 0].sum(), points, create_graph=True)
    return (out - target).square().mean() + (slope.norm(dim=1) - 1).square().mean()


@dataclass(frozen=True)
class Architecture:
    """A net, and how its authors normalise it.

    Attributes:
        build: makes it, plain.
        inputs: the shapes of its inputs.
        weights: how many weights they normalise.
        dim: the axis along which their checkpoints have g.
        plain: weights that stay plain, as patterns of names.
        loss: of the model, its inputs and a target.
    """

    build: Callable[[], nn.Module]
    inputs: tuple[tuple[int, ...], ...]
    weights: int
    dim: int = 0
    plain: tuple[str, ...] = ()
    loss: Callable[..., torch.Tensor] = squared_error


ARCHITECTURES = {
    "hifi-gan": Architecture(HifiGan, ((2, 80, 4),), 78),
    "dac": Architecture(DacEncoder, ((2, 1, 1024),), 30),
    # Longer than its kernel, of which every position is to get a gradient.
    "wav2vec2": Architecture(PosConv, ((1, 130, 48),), 1, dim=2),
    "waveglow": Architecture(WaveGlowLayer, ((2, 4, 40), (2, 40, 40)), 18, plain=("end.weight",)),
    "sdf": Architecture(Sdf, ((32, 3),), 9, loss=eikonal),
    "tcn": Architecture(Tcn, ((4, 1, 50),), 16, plain=("*downsample.weight", "linear.weight")),
    "lstm": Architecture(Lstm, ((4, 3, 6),), 12),
}
# Compilers and exporters are slow with many layers; these have every kind of layer too.
BRIEF = ARCHITECTURES | {
    "hifi-gan": replace(ARCHITECTURES["hifi-gan"], build=partial(HifiGan, rates=(8,)), weights=21),
    "dac": replace(ARCHITECTURES["dac"], build=partial(DacEncoder, strides=(2, 4)), weights=16),
    "waveglow": replace(ARCHITECTURES["waveglow"], build=partial(WaveGlowLayer, depth=3), weights=8),
    "tcn": replace(ARCHITECTURES["tcn"], build=partial(Tcn, levels=3), weights=6),
}
