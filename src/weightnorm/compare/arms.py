"""The arms of a comparison. No torch here: the command line checks their names before it imports any."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Arm:
    """One way to train the network; everything that is not said here is the same in every arm.

    Attributes:
        name: what it is called.
        description: the same in a line.
        weight_norm: the optimizer steps on length and direction.
        norm: the layer after every convolution and dense layer, in place of their biases; None: none.
        init: "data": the experiment's, v ~ N(0, v_std²) and then, where it has one, the data-dependent
            initialisation; "normal": the draw alone; "torch": what torch gives each layer; "released": Glorot's draw,
            then the data-dependent initialisation, whose scale stays in the graph as a fixed factor of the weight.
    """

    name: str
    description: str
    weight_norm: bool = False
    norm: Literal["mean_only", "batch"] | None = None
    init: Literal["data", "normal", "torch", "released"] = "data"


PLAIN = "plain"  # the arm that the others are measured against

_TABLE = (
    Arm(PLAIN, "plain weights, initialised as those of the other arms"),
    Arm("plain_default_init", "plain weights, torch's default initialisation", init="torch"),
    Arm("weight_norm", "weight normalization in the optimizer", weight_norm=True),
    Arm("weight_norm_mean_only", "weight normalization and mean-only batch norm", weight_norm=True, norm="mean_only"),
    Arm("batch_norm", "plain weights and batch norm", norm="batch", init="normal"),
    Arm("mean_only", "plain weights and mean-only batch norm", norm="mean_only"),
    Arm("plain_released", "plain weights as in the paper's released code: times a fixed scale", init="released"),
)
ARMS = {arm.name: arm for arm in _TABLE}
