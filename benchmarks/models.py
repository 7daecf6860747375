"""The models that are trained, in plain torch and as published: short, and with nothing that a training step lacks."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

SLOPE = 0.1  # of HiFi-GAN's and the paper's leaky ReLUs


class ResBlock(nn.Module):
    """HiFi-GAN's: three pairs of convolutions, the first of each dilated by 1, 3 and 5."""

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        pad = kernel // 2
        self.wide = nn.ModuleList(nn.Conv1d(channels, channels, kernel, dilation=d, padding=pad * d) for d in (1, 3, 5))
        self.narrow = nn.ModuleList(nn.Conv1d(channels, channels, kernel, padding=pad) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        for wide, narrow in zip(self.wide, self.narrow, strict=True):
            x = x + narrow(F.leaky_relu(wide(F.leaky_relu(x, SLOPE)), SLOPE))
        return x


class HifiGan(nn.Module):
    """The generator of HiFi-GAN V1: 80 mel bands in, 256 samples a frame out."""

    def __init__(self, channels: int = 512, kernels: tuple[int, ...] = (3, 7, 11)):
        super().__init__()
        widths = [channels // 2**i for i in range(5)]
        self.first = nn.Conv1d(80, channels, 7, padding=3)
        self.ups = nn.ModuleList(
            nn.ConvTranspose1d(wide, narrow, 2 * up, up, padding=up // 2)
            for wide, narrow, up in zip(widths, widths[1:], (8, 8, 2, 2), strict=False)
        )
        self.blocks = nn.ModuleList(nn.ModuleList(ResBlock(width, k) for k in kernels) for width in widths[1:])
        self.last = nn.Conv1d(widths[-1], 1, 7, padding=3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for up, blocks in zip(self.ups, self.blocks, strict=True):
            x = up(F.leaky_relu(x, SLOPE))
            x = sum(block(x) for block in blocks) / len(blocks)
        return torch.tanh(self.last(F.leaky_relu(x)))


class Attention(nn.Module):
    """GPT-2's causal self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1))
        return self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(-2))


class Block(nn.Module):
    """GPT-2's layer."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Gpt2(nn.Module):
    """GPT-2 with the head tied to the embedding; no dropout."""

    def __init__(self, width: int = 768, layers: int = 12, heads: int = 12, words: int = 50257, length: int = 1024):
        super().__init__()
        self.words, self.places = nn.Embedding(words, width), nn.Embedding(length, width)
        self.layers = nn.Sequential(*(Block(width, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.words(tokens) + self.places(torch.arange(tokens.shape[1], device=tokens.device))
        return self.head(self.norm(self.layers(x)))


class Noise(nn.Module):
    """Gaussian noise on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.15 * torch.randn_like(x)


class ConvPool(nn.Sequential):
    """The paper's ConvPool-CNN-C (section 5.1): noise, nine convolutions, two poolings, dropout, one dense layer."""

    def __init__(self):
        convolutions = [(3, 96, 3, 1), (96, 96, 3, 1), (96, 96, 3, 1), (96, 192, 3, 1), (192, 192, 3, 1)]
        convolutions += [(192, 192, 3, 1), (192, 192, 3, 0), (192, 192, 1, 0), (192, 192, 1, 0)]
        layers: list[nn.Module] = [Noise()]
        for index, (inward, outward, kernel, pad) in enumerate(convolutions):
            layers += [nn.Conv2d(inward, outward, kernel, padding=pad), nn.LeakyReLU(SLOPE)]
            if index in (2, 5):
                layers += [nn.MaxPool2d(2), nn.Dropout()]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(192, 10))


def conv_norm(inward: int, outward: int, kernel: int, stride: int = 1) -> nn.Sequential:
    """Return a convolution without a bias and the batch norm behind it."""
    convolution = nn.Conv2d(inward, outward, kernel, stride, kernel // 2, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outward))


class Bottleneck(nn.Module):
    """ResNet-50's block."""

    def __init__(self, inward: int, width: int, stride: int):
        super().__init__()
        self.one, self.two = conv_norm(inward, width, 1), conv_norm(width, width, 3, stride)
        self.three = conv_norm(width, 4 * width, 1)
        changes = stride != 1 or inward != 4 * width
        self.short = conv_norm(inward, 4 * width, 1, stride) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.short(x) + self.three(F.relu(self.two(F.relu(self.one(x))))))


class ResNet50(nn.Sequential):
    """ResNet-50 for images of 224 x 224."""

    def __init__(self):
        layers: list[nn.Module] = [conv_norm(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
        inward = 64
        for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
            for index in range(count):
                layers.append(Bottleneck(inward, width, stride if index == 0 else 1))
                inward = 4 * width
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


class Tiny(nn.Sequential):
    """Every kind of layer in a few thousand weights: to try the benchmarks themselves."""

    def __init__(self):
        super().__init__(
            nn.Conv1d(8, 16, 3, padding=1),
            nn.LeakyReLU(SLOPE),
            nn.ConvTranspose1d(16, 8, 4, 2, padding=1),
            nn.LayerNorm(32),
            nn.Flatten(),
            nn.Linear(256, 10),
        )
