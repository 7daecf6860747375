"""How the paper draws initial weights."""

from torch import nn


def draw_normal(model: nn.Module, std: float) -> None:
    """Draw the weights of dense layers and convolutions from N(0, std²) and set their biases to 0 (section 3)."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=std)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
