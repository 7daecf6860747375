"""What the trained models draw, an image file an arm, for tasks whose models draw something."""

import io

import matplotlib.image
from torch import Tensor
from torch.nn.functional import pad

from weightnorm.compare.loop import Comparison
from weightnorm.compare.table import Record


def pictures(comparison: Comparison, results: Record) -> dict[str, bytes]:
    """Return what every arm draws at its best setting with the first seed: name of a PNG -> its content.

    Args:
        comparison: the runs.
        results: what ``results.results`` said of them.
    """
    drawn = {}
    for run in comparison.runs:
        arm = results["arms"][run.arm.name]
        if run.epochs and run.seed == 0 and run.setting == (arm["lr"], arm["g_lr"]) and not run.diverged:
            for title, images in run.pictures().items():
                drawn[f"{title}-{run.arm.name}"] = png(images)
    return drawn


def png(images: Tensor) -> bytes:
    """Return images as one, with a thin line between them.

    Args:
        images: (rows, columns, C, H, W) in [0, 1]; C is 1 or 3.
    """
    framed = pad(images.float().cpu(), (1, 1, 1, 1), value=0.5)
    whole = framed.permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1).clamp(0, 1)
    file = io.BytesIO()
    matplotlib.image.imsave(file, whole.expand(-1, -1, 3).numpy(), format="png")
    return file.getvalue()
