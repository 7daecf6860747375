"""The catalogue: which models' weights are stepped on, and which models are trained on which batches.

Everything is a module, so that each optimizer finds the output axes by itself, as it does for its users. Where only the
shapes matter a module has layers and no forward.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
from models import ConvPool, Gpt2, HifiGan, ResNet50, Tiny
from torch import Tensor, nn
from torch.nn import functional as F

Build = Callable[[], nn.Module]
ROW_LENGTHS = (96, 288, 768, 1024, 1600, 2304, 3072, 4096, 6400, 8192, 14336, 28672, 65536, 131072)


class Snake(nn.Module):
    """DAC's activation, for its parameter: one slope a channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.alpha = nn.Parameter(torch.ones(1, channels, 1))


def conv_stack(shapes: Iterable[tuple[int, int, tuple[int, ...], int]]) -> nn.ModuleList:
    """Return convolutions of these inputs, outputs, kernels and groups."""
    kinds = {1: nn.Conv1d, 2: nn.Conv2d}
    return nn.ModuleList(kinds[len(kernel)](i, o, kernel, groups=groups) for i, o, kernel, groups in shapes)


def period_discriminator() -> nn.ModuleList:
    """One of HiFi-GAN's five, each looking at every p-th sample."""
    widths = (1, 32, 128, 512, 1024, 1024)
    convolutions = [(i, o, (5, 1), 1) for i, o in pairwise(widths)]
    return conv_stack([*convolutions, (1024, 1, (3, 1), 1)])


def scale_discriminator() -> nn.ModuleList:
    """One of HiFi-GAN's two that are weight-normalised."""
    grouped = [(128, 128, 4), (128, 256, 16), (256, 512, 16), (512, 1024, 16), (1024, 1024, 16)]
    middle = [(i, o, (41,), groups) for i, o, groups in grouped]
    return conv_stack([(1, 128, (15,), 1), *middle, (1024, 1024, (5,), 1), (1024, 1, (3,), 1)])


def hifigan_and_discriminators() -> nn.ModuleList:
    """Everything of a HiFi-GAN that carries weight norm: the scale discriminator with spectral norm is left out."""
    periods, scales = (period_discriminator() for _ in range(5)), (scale_discriminator() for _ in range(2))
    return nn.ModuleList([HifiGan(), *periods, *scales])


def dac_units(channels: int) -> list[nn.Module]:
    """Three residual units of DAC."""
    kernels = [7, 1] * 3
    return [layer for kernel in kernels for layer in (Snake(channels), nn.Conv1d(channels, channels, kernel))]


def dac() -> nn.ModuleList:
    """DAC at 44 kHz: encoder, nine codebooks, decoder."""
    layers: list[nn.Module] = [nn.Conv1d(1, 64, 7)]
    for channels, kernel in ((64, 4), (128, 8), (256, 16), (512, 16)):
        layers += [*dac_units(channels), Snake(channels), nn.Conv1d(channels, 2 * channels, kernel)]
    layers += [Snake(1024), nn.Conv1d(1024, 1024, 3)]
    for _ in range(9):
        layers += [nn.Conv1d(1024, 8, 1), nn.Embedding(1024, 8), nn.Conv1d(8, 1024, 1)]
    layers.append(nn.Conv1d(1024, 1536, 7))
    for channels, kernel in ((1536, 16), (768, 16), (384, 8), (192, 4)):
        layers += [Snake(channels), nn.ConvTranspose1d(channels, channels // 2, kernel), *dac_units(channels // 2)]
    return nn.ModuleList([*layers, Snake(96), nn.Conv1d(96, 1, 7)])


def llama_layer(width: int = 4096, hidden: int = 14336, heads: int = 1024) -> nn.ModuleList:
    """One layer in the manner of Llama 3 8B: attention with grouped heads, a gated MLP, two norms, no biases."""
    attention, mlp = [width, heads, heads, width], [(width, hidden), (width, hidden), (hidden, width)]
    layers = [nn.Linear(width, out, bias=False) for out in attention]
    layers += [nn.Linear(inward, out, bias=False) for inward, out in mlp]
    return nn.ModuleList([*layers, nn.RMSNorm(width), nn.RMSNorm(width)])


def gpt2_xl() -> Gpt2:
    """The largest GPT-2."""
    return Gpt2(width=1600, layers=48, heads=25)


def one_matrix(length: int, weights: int) -> nn.Linear:
    """One weight with rows of this length, and about this many elements."""
    return nn.Linear(length, max(1, weights // length), bias=False)


STEPPED: dict[str, tuple[str, Build]] = {
    "hifigan": ("HiFi-GAN V1 generator", HifiGan),
    "hifigan-gan": ("HiFi-GAN V1, generator and discriminators", hifigan_and_discriminators),
    "dac": ("DAC 44k", dac),
    "convpool": ("ConvPool-CNN-C", ConvPool),
    "resnet50": ("ResNet-50", ResNet50),
    "gpt2-small": ("GPT-2 small", Gpt2),
    "llama-layer": ("Llama-style layer, rows of 4096 and 14336", llama_layer),
    "gpt2-xl": ("GPT-2 XL", gpt2_xl),
    "tiny": ("tiny", Tiny),
}


@dataclass(frozen=True)
class Training:
    """A model and what it is trained on.

    Attributes:
        title: for the report, with the shape of a batch.
        build: makes the model.
        size: examples of a batch.
        batch: makes a batch of so many examples, on the default device.
        loss: of the model's output and the targets.
    """

    title: str
    build: Build
    size: int
    batch: Callable[[int], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def next_token_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy over all places of all texts."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def images(classes: int, side: int, size: int) -> tuple[Tensor, Tensor]:
    """Return random images and labels."""
    return torch.randn(size, 3, side, side), torch.randint(classes, (size,))


def speech(size: int) -> tuple[Tensor, Tensor]:
    """Return 32 mel frames and the 8192 samples that they are to become, as HiFi-GAN is trained."""
    return torch.randn(size, 80, 32), torch.rand(size, 1, 8192) * 2 - 1


def text(length: int, size: int) -> tuple[Tensor, Tensor]:
    """Return random tokens and those that follow them."""
    tokens = torch.randint(50257, (size, length + 1))
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


class Bound(nn.Module):
    """A generative model of the paper's, to the loss of each image."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        return sum(self.model(x))


def digits(size: int) -> tuple[Tensor, Tensor]:
    """Return random black and white images, and nothing to predict."""
    return torch.bernoulli(torch.full((size, 1, 28, 28), 0.2)), torch.zeros(size)


def draw() -> nn.Module:
    """Return DRAW as the paper trained it."""
    from weightnorm.tasks.draw.network import Draw

    return Bound(Draw())


def vae() -> nn.Module:
    """Return the paper's variational autoencoder of MNIST."""
    from weightnorm.tasks.vae.resnet import ConvolutionalVAE

    with torch.device("cpu"):  # where its masks can be computed
        model = Bound(ConvolutionalVAE())
    return model.to(torch.get_default_device())


def tiny_batch(size: int) -> tuple[Tensor, Tensor]:
    """Return inputs and labels for ``Tiny``."""
    return torch.randn(size, 8, 16), torch.randint(10, (size,))


TRAINED: dict[str, Training] = {
    "hifigan": Training("HiFi-GAN V1 generator, {} x 8192 samples", HifiGan, 16, speech, F.l1_loss),
    "convpool": Training("ConvPool-CNN-C, {} images", ConvPool, 100, partial(images, 10, 32), F.cross_entropy),
    "gpt2-small": Training("GPT-2 small, {} x 1024 tokens", Gpt2, 8, partial(text, 1024), next_token_loss),
    "gpt2-xl": Training("GPT-2 XL, {} x 1024 tokens", gpt2_xl, 1, partial(text, 1024), next_token_loss),
    "resnet50": Training(
        "ResNet-50, {} images of 224 x 224", ResNet50, 64, partial(images, 1000, 224), F.cross_entropy
    ),
    "draw": Training("DRAW, 64 glimpses at {} digits", draw, 100, digits, lambda losses, _: losses.mean()),
    "vae": Training("convolutional VAE, {} digits", vae, 100, digits, lambda losses, _: losses.mean()),
    "tiny": Training("tiny, {} examples", Tiny, 4, tiny_batch, F.cross_entropy),
}
