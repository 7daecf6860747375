"""Nets with batch normalization, one a row: published structures at small widths, and what could mislead a tracer.

The residual nets, MobileNets and DenseNet are written as torchvision writes them, from their papers' tables; no line of
the package is shared.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.utils import prune

Sequential = nn.Sequential


class BasicBlock(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(width_in, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


class Bottleneck(nn.Module):
    def __init__(self, width_in, width, stride):
        super().__init__()
        inner = width // 4
        self.conv1, self.bn1 = nn.Conv2d(width_in, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv2, self.bn2 = nn.Conv2d(inner, inner, 3, stride, 1, bias=False), nn.BatchNorm2d(inner)
        self.conv3, self.bn3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or width_in != width:
            self.downsample = Sequential(nn.Conv2d(width_in, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self, block, depths=(2, 2), width=8):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        width_in = width
        for stage, depth in enumerate(depths, 1):
            blocks = []
            for i in range(depth):
                blocks.append(block(width_in, width, 2 if stage > 1 and i == 0 else 1))
                width_in = width
            setattr(self, f"layer{stage}", Sequential(*blocks))
            width *= 2
        self.stages = len(depths)
        self.avgpool = nn.AdaptiveAvgPool2d((1, 1))
        self.fc = nn.Linear(width_in, 5)

    def features(self, x):
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in range(1, self.stages + 1):
            x = getattr(self, f"layer{stage}")(x)
        return torch.flatten(self.avgpool(x), 1)

    def forward(self, x):
        return self.fc(self.features(x))


class ChoosyResNet(ResNet):
    """Control flow on the data in its own forward: only its blocks can be traced."""

    def forward(self, x):
        if x.mean() > 1e6:
            return x
        return super().forward(x)


class ChoosyBlock(BasicBlock):
    """A block with control flow: it can't be traced, the net around it can."""

    def forward(self, x):
        return super().forward(x) if x.shape[1] > 1 else x


def conv_norm(width_in, width, kernel=3, stride=1, groups=1, activation=nn.ReLU6, **norm):
    layers = [nn.Conv2d(width_in, width, kernel, stride, kernel // 2, groups=groups, bias=False)]
    layers += [nn.BatchNorm2d(width, **norm)] + ([activation(inplace=True)] if activation else [])
    return Sequential(*layers)


class InvertedResidual(nn.Module):
    def __init__(self, width_in, width, stride, expand):
        super().__init__()
        hidden = width_in * expand
        self.use_res_connect = stride == 1 and width_in == width
        layers = [conv_norm(width_in, hidden, 1)] if expand != 1 else []
        layers += [conv_norm(hidden, hidden, stride=stride, groups=hidden)]
        self.conv = Sequential(*layers, nn.Conv2d(hidden, width, 1, bias=False), nn.BatchNorm2d(width))

    def forward(self, x):
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNetV2(nn.Module):
    def __init__(self):
        super().__init__()
        rows = [(8, 4, 1, 1), (4, 6, 2, 6), (6, 6, 1, 6)]
        blocks = [InvertedResidual(*row) for row in rows]
        self.features = Sequential(conv_norm(3, 8, stride=2), *blocks, conv_norm(6, 12, 1))
        self.classifier = Sequential(nn.Dropout(0.2), nn.Linear(12, 5))

    def forward(self, x):
        x = nn.functional.adaptive_avg_pool2d(self.features(x), (1, 1))
        return self.classifier(torch.flatten(x, 1))


class SqueezeExcitation(nn.Module):
    def __init__(self, width, squeeze):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1, self.fc2 = nn.Conv2d(width, squeeze, 1), nn.Conv2d(squeeze, width, 1)
        self.activation, self.scale_activation = nn.ReLU(), nn.Hardsigmoid()

    def forward(self, x):
        return self.scale_activation(self.fc2(self.activation(self.fc1(self.avgpool(x))))) * x


class InvertedResidualV3(nn.Module):
    def __init__(self, width_in, expanded, width, kernel, stride, activation, squeeze):
        super().__init__()
        self.use_res_connect = stride == 1 and width_in == width
        norm = {"eps": 0.001, "momentum": 0.01}
        layers = [conv_norm(width_in, expanded, 1, activation=activation, **norm)] if expanded != width_in else []
        layers += [conv_norm(expanded, expanded, kernel, stride, expanded, activation, **norm)]
        layers += [SqueezeExcitation(expanded, 4)] if squeeze else []
        self.block = Sequential(*layers, conv_norm(expanded, width, 1, activation=None, **norm))

    def forward(self, x):
        out = self.block(x)
        if self.use_res_connect:
            out += x
        return out


class MobileNetV3(nn.Module):
    def __init__(self):
        super().__init__()
        relu, swish = nn.ReLU, nn.Hardswish
        rows = [(8, 8, 8, 3, 2, relu, True), (8, 16, 6, 3, 2, relu, False), (6, 18, 6, 5, 1, swish, True)]
        blocks = [InvertedResidualV3(*row) for row in rows]
        norm = {"eps": 0.001, "momentum": 0.01, "activation": swish}
        self.features = Sequential(conv_norm(3, 8, stride=2, **norm), *blocks, conv_norm(6, 12, 1, **norm))
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = Sequential(nn.Linear(12, 16), swish(inplace=True), nn.Dropout(0.2), nn.Linear(16, 5))

    def forward(self, x):
        return self.classifier(torch.flatten(self.avgpool(self.features(x)), 1))


class PreActBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2, self.conv2 = nn.BatchNorm2d(width), nn.Conv2d(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        out = self.conv1(self.bn1(x).relu())
        return x + self.conv2(self.bn2(out).relu())


class DenseLayer(nn.Module):
    def __init__(self, width_in, growth=4, bn_size=2):
        super().__init__()
        self.norm1, self.relu1 = nn.BatchNorm2d(width_in), nn.ReLU(inplace=True)
        self.conv1 = nn.Conv2d(width_in, bn_size * growth, 1, bias=False)
        self.norm2, self.relu2 = nn.BatchNorm2d(bn_size * growth), nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(bn_size * growth, growth, 3, padding=1, bias=False)

    def forward(self, features):
        x = self.conv1(self.relu1(self.norm1(torch.cat(features, 1))))
        return self.conv2(self.relu2(self.norm2(x)))


class DenseBlock(nn.ModuleDict):
    def __init__(self, width, layers=2):
        super().__init__({f"denselayer{i + 1}": DenseLayer(width + 4 * i) for i in range(layers)})

    def forward(self, x):
        features = [x]
        for layer in self.values():
            features.append(layer(features))
        return torch.cat(features, 1)


class Wired(nn.Module):
    """A net whose forward is a function of it and its input; the parts have names."""

    def __init__(self, wiring, **parts):
        super().__init__()
        self.wiring = wiring
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x):
        return self.wiring(self, x)


class WithOptions(nn.Module):
    """Its optional argument, off by default, comes between layer and norm in one pair and not in the other."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.conv2, self.bn2 = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, mask=None):
        x = self.bn1(self.conv1(x))
        x = self.conv2(x)
        if mask is not None:
            x = x * mask
        return self.bn2(x)


class Flagged(nn.Module):
    """Cannot be traced with its flag given."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, flatten=False):
        x = self.bn(self.conv(x))
        return x.flatten(1) if flatten else x


class Auxiliary(nn.Module):
    """A head that runs in training only; and a pair that training pulls apart."""

    def __init__(self):
        super().__init__()
        self.stem, self.aux = conv_norm(3, 4), conv_norm(4, 4)
        self.conv, self.bn = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        x = self.stem(x)
        if self.training:
            x = x + self.aux(x)
            return self.bn(self.conv(x).relu())
        return self.bn(self.conv(x))


class Recording(nn.Module):
    """Keeps what it sees, counts its calls, draws noise: running it leaves traces."""

    def __init__(self):
        super().__init__()
        self.block, self.seen = conv_norm(3, 4), []
        self.calls = 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.seen.append(x)
        self.last = x
        self.calls += 1
        self.count += 1
        return self.block(x) + 0 * torch.randn(())


def apart(net, x):
    """Call a layer by its forward, out of a tracer's sight, and once more as it should be."""
    return net.bn(net.conv(x)) + net.conv.forward(x)


@dataclass(frozen=True)
class Case:
    make: Any
    shape: tuple
    left: dict = field(default_factory=dict)  # names of norms that cannot be replaced, and what the reason must say


def block(**kwargs):
    return Sequential(nn.Conv2d(3, 4, 3, **kwargs), nn.BatchNorm2d(4))


def twice(net, x):
    return net.bn(net.conv(net.bn(net.conv(x))))


def two_norms(net, x):
    t = net.conv(x)
    return net.bn1(t) + net.bn2(t)


def two_layers(net, x):
    return net.bn(net.conv1(x)) + net.bn(net.conv2(x))


def through_mask(net, x):
    return net.bn(net.conv(x) * 2)


def twice_used(net, x):
    t = net.conv(x)
    return net.bn(t) + t


def tied():
    net = Sequential(nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3), nn.BatchNorm2d(3))
    net[2].weight = net[0].weight
    return net


def wired(wiring, channels=(3, 4), **more):
    return lambda: Wired(wiring, conv=nn.Conv2d(*channels, 3), bn=nn.BatchNorm2d(channels[1]), **more)


IMAGES = (2, 3, 32, 32)
SMALL = (3, 3, 9, 9)
# To try another architecture, add a row: how to make the net, the shape of its batch, what must be left and why.
NETS = {
    "resnet, basic": Case(lambda: ResNet(BasicBlock), IMAGES),
    "resnet, bottleneck": Case(lambda: ResNet(Bottleneck), IMAGES),
    "resnet that chooses": Case(
        lambda: ChoosyResNet(BasicBlock), IMAGES, {"bn1": r"fed by ChoosyResNet, which cannot be traced \(TraceError"}
    ),
    "resnet, blocks that choose": Case(
        lambda: ResNet(ChoosyBlock, depths=(1, 1)),
        IMAGES,
        {
            f"layer{stage}.0.bn{i}": rf"fed by layer{stage}\.0, which cannot be traced \(TraceError"
            for stage in (1, 2)
            for i in (1, 2)
        },
    ),
    "mobilenet v2": Case(MobileNetV2, IMAGES),
    "mobilenet v3": Case(MobileNetV3, IMAGES),
    "pre-activation resnet": Case(
        lambda: Sequential(nn.Conv2d(3, 4, 3), PreActBlock(4), PreActBlock(4), nn.BatchNorm2d(4)),
        SMALL,
        {
            "1.bn1": r"shares what 0 puts out with add",
            "2.bn1": r"is fed by add",
            "3": r"is fed by add",
        },
    ),
    "densenet": Case(
        lambda: Sequential(conv_norm(3, 4), DenseBlock(4)),
        SMALL,
        {f"1.denselayer{i}.norm1": "is fed by cat" for i in (1, 2)},
    ),
    "vgg, with biases": Case(lambda: Sequential(block(), nn.ReLU(), nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6)), SMALL),
    "mlp": Case(
        lambda: Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Linear(7, 3, False), nn.BatchNorm1d(3)),
        (6, 5),
    ),
    "conv 1d": Case(lambda: Sequential(nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)), (2, 3, 7)),
    "conv 3d": Case(lambda: Sequential(nn.Conv3d(3, 4, 3), nn.BatchNorm3d(4)), (2, 3, 5, 5, 5)),
    "synchronised": Case(lambda: nn.SyncBatchNorm.convert_sync_batchnorm(block()), SMALL),
    "transposed": Case(
        lambda: Sequential(nn.ConvTranspose2d(3, 4, 3), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 2, 2, groups=2)), SMALL
    ),
    "transposed, grouped": Case(
        lambda: Sequential(nn.ConvTranspose1d(6, 4, 3, groups=2, bias=False), nn.BatchNorm1d(4)), (2, 6, 7)
    ),
    "no affine": Case(lambda: Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)), SMALL),
    "no bias": Case(lambda: Sequential(nn.Conv2d(3, 4, 3), without_bias(nn.BatchNorm2d(4))), SMALL),
    "plain average": Case(lambda: Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, momentum=None)), SMALL),
    "block run twice": Case(wired(twice, (3, 3)), SMALL),
    "layer in a wrapper": Case(
        lambda: Wired(lambda net, x: net.bn(net.pad(x)), pad=Sequential(nn.Conv2d(3, 4, 3)), bn=nn.BatchNorm2d(4)),
        SMALL,
    ),
    "optional argument": Case(WithOptions, SMALL, {"bn2": "is fed by mul and conv2"}),
    "flag": Case(Flagged, SMALL),
    "only in training": Case(Auxiliary, SMALL, {"bn": "is fed by conv and relu"}),
    "leaves traces": Case(Recording, SMALL),
    "data parallel": Case(lambda: nn.DataParallel(block()), SMALL),
    "compiled": Case(lambda: torch.compile(block(), backend="eager"), SMALL),
    "compiled inside": Case(lambda: Sequential(conv_norm(3, 3), torch.compile(block(), backend="eager")), SMALL),
    # What cannot be matched, and why.
    "layer that feeds two norms": Case(
        lambda: Wired(two_norms, conv=nn.Conv2d(3, 4, 3), bn1=nn.BatchNorm2d(4), bn2=nn.BatchNorm2d(4)),
        SMALL,
        {"bn1": "shares what conv puts out with bn2", "bn2": "shares what conv puts out with bn1"},
    ),
    "norm behind two layers": Case(
        lambda: Wired(two_layers, conv1=nn.Conv2d(3, 4, 3), conv2=nn.Conv2d(3, 4, 3), bn=nn.BatchNorm2d(4)),
        SMALL,
        {"bn": "is fed by conv1 and conv2"},
    ),
    "output used twice": Case(wired(twice_used), SMALL, {"bn": "shares what conv puts out with add"}),
    "something between": Case(wired(through_mask), SMALL, {"bn": "is fed by mul"}),
    "output is seen": Case(
        wired(lambda net, x: [net.bn(t := net.conv(x)), t][0] + t.mean()), SMALL, {"bn": "shares.*with mean"}
    ),
    "on the input": Case(lambda: Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)), SMALL, {"0": "the input of Seq"}),
    "never called": Case(wired(lambda net, x: net.conv(x)), SMALL, {"bn": "is not called by any forward"}),
    "forward called": Case(wired(apart), SMALL, {"bn": "conv, whose parameters are used elsewhere too"}),
    "tied weights": Case(tied, SMALL, dict.fromkeys("13", "whose parameters are used elsewhere too")),
    "channels on another axis": Case(
        lambda: Sequential(nn.Linear(5, 7), nn.BatchNorm1d(4)), (6, 4, 5), {"1": "other channels than the 7 outputs"}
    ),
    "images through a linear layer": Case(
        lambda: Sequential(nn.Linear(9, 3), nn.BatchNorm2d(3)), SMALL, {"1": "other channels than the 3 outputs"}
    ),
    "spectral norm": Case(
        lambda: Sequential(nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)),
        SMALL,
        {"1": "0, which has parameters that are computed"},
    ),
    "pruned bias": Case(
        lambda: Sequential(prune.random_unstructured(nn.Conv2d(3, 4, 3), "bias", 1), nn.BatchNorm2d(4)),
        SMALL,
        {"1": "0, which has parameters that are computed"},
    ),
}


class StandardisedConv(nn.Conv2d):
    """Weight standardization: what scales its weight changes nothing."""

    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight / weight.std(), bias)


class ActiveNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Unlisted(nn.Module):
    """Calls its norm through a list of its own, where it could not be replaced."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.steps = [self.conv, self.bn]

    def forward(self, x):
        for step in self.steps:
            x = step(x)
        return x


class Sharing(nn.Module):
    """Control flow decides whether it calls a layer of a block by itself."""

    def __init__(self):
        super().__init__()
        self.block = block()
        self.conv = self.block[0]

    def forward(self, x):
        return self.conv(x) if x.mean() > 1e6 else self.block(x)


class Asking(nn.Module):
    """Looks at a parameter without using it; and torch.fx warns of its default."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, part=slice(None)):
        if self.conv.bias is None or part != slice(None):
            x = x[part]
        return self.bn(self.conv(x))


def hooked(which, kind="register_forward_hook"):
    net = block()
    getattr(net[which], kind)(lambda module, args, *out: None)
    return net


def parametrized_norm():
    net = block()
    nn.utils.parametrize.register_parametrization(net[1], "weight", nn.Softplus())
    return net


def overridden(which):
    net = block()
    net[which].forward = net[which].forward
    return net


def without_bias(norm):
    """Return a norm as torch's newer versions make it with ``bias=False``."""
    norm.bias = None
    return norm


NETS |= {
    "a layer of one's own": Case(
        lambda: Sequential(StandardisedConv(3, 4, 3), nn.BatchNorm2d(4)),
        SMALL,
        {"1": "comes after 0, which has a forward of its own"},
    ),
    "a norm of one's own": Case(
        lambda: Sequential(nn.Conv2d(3, 4, 3), ActiveNorm(4)), SMALL, {"1": "^has a forward of its own"}
    ),
    "forward replaced": Case(lambda: overridden(0), SMALL, {"1": "comes after 0, which has a forward of its own"}),
    "norm's forward replaced": Case(lambda: overridden(1), SMALL, {"1": "^has a forward of its own"}),
    "layer with a hook": Case(lambda: hooked(0), SMALL, {"1": "comes after 0, which has hooks"}),
    "layer with a hook before it": Case(lambda: hooked(0, "register_forward_pre_hook"), SMALL),
    "norm with a hook": Case(lambda: hooked(1), SMALL, {"1": "^has hooks"}),
    "norm with a hook before it": Case(lambda: hooked(1, "register_forward_pre_hook"), SMALL, {"1": "^has hooks"}),
    "norm with a hook behind it": Case(lambda: hooked(1, "register_full_backward_hook"), SMALL, {"1": "^has hooks"}),
    "layer of a closed box": Case(
        Sharing, SMALL, {"block.1": r"shares what block\.0 puts out with Sharing, which cannot be traced \(TraceError"}
    ),
    "parameter looked at": Case(Asking, SMALL),
    "norm with a parametrization": Case(parametrized_norm, SMALL, {"1": "^has parameters that are computed"}),
    "norm in a list of one's own": Case(Unlisted, SMALL, {"bn": r"cannot be traced \(NameError"}),
}


def build(case, dtype=torch.float64):
    """Return a net with statistics, gains and biases as training leaves them: gains of both signs, one zero."""
    net = case.make().to(dtype)
    with torch.no_grad():
        for norm in norms_of(net).values():
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.3, 2)
            norm.num_batches_tracked.fill_(7)
            for parameter in norm.parameters():
                parameter.normal_()
            if norm.affine and type(norm) is not ActiveNorm and isinstance(norm.weight, nn.Parameter):
                norm.weight[0] = 0
    return net.eval(), torch.randn(case.shape, dtype=dtype)


@torch.no_grad()
def outputs(net, x):
    return net(x)


def distance(one, other):
    return ((one - other).norm() / other.norm()).item()


def norms_of(net, kind=nn.modules.batchnorm._BatchNorm):
    return {name: module for name, module in net.named_modules() if isinstance(module, kind)}
