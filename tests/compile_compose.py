"""Compile what composes weights, as it comes to be launched, for one kind of GPU, none being there; no test itself."""

from functools import partial

import torch
import triton

from weightnorm.axes import Axis
from weightnorm.kernels import compose, compose_launches, triton_compose

KERNELS = triton_compose.one, triton_compose.sums, triton_compose.close, triton_compose.many


class Driver:
    """What Triton asks of a GPU, answered without one: all is done that leads to a launch, then nothing is launched."""

    class utils:
        load_binary = staticmethod(lambda *_: (1, 1, 0, 0, 1024))
        get_device_properties = staticmethod(lambda _: {"max_shared_mem": 1 << 16})
        unload_module = staticmethod(lambda _: None)

    def __init__(self, target):
        self.get_current_target = lambda: target
        self.get_current_device = lambda: 0
        self.get_current_stream = lambda device: 0
        self.launcher_cls = lambda source, metadata: lambda *arguments: None


def conv(*shape):
    return torch.empty(shape), Axis(0)


def transposed(*shape):
    return torch.empty(shape), Axis(1)


def weights():
    """Return weights by name: v, where its vectors lie, and the gradient if it has another layout."""
    image = torch.empty(256, 128, 3, 3)
    last = image.to(memory_format=torch.channels_last)
    return {
        "rows of 3": conv(512, 3),
        "rows of 96": conv(512, 96),
        "rows of 768": conv(768, 768),
        "rows of 4608": conv(512, 512, 3, 3),
        "rows of 16384": conv(512, 16384),
        "one row": conv(1, 768),
        "one element": conv(1, 1),
        "whole tensor": (torch.empty(1536, 1536), Axis(None)),
        "bfloat16": (torch.empty(768, 768, dtype=torch.bfloat16), Axis(0)),
        "float16": (torch.empty(768, 768, dtype=torch.float16), Axis(0)),
        "float64": (torch.empty(768, 768, dtype=torch.float64), Axis(0)),
        "wav2vec2": (torch.empty(768, 48, 128), Axis(2)),
        "columns": (torch.empty(64, 4096), Axis(1)),
        "columns walked along": (torch.empty(1024, 8192), Axis(1)),
        "transposed": transposed(512, 256, 16),
        "transposed channels last": (last, Axis(1)),
        "grouped": (torch.empty(256, 128, 4, 4), Axis(1, groups=4)),
        "channels last": (last, Axis(0)),
        "unaligned": conv(768, 27),
        "unaligned, long": conv(768, 27000 + 1),
        "mixed": (last, Axis(0), image),
        "mixed across": (image, Axis(1), last),
    }


def hifigan():
    """Return the weights of HiFi-GAN's generator, one of each kind."""
    stages = [(channels, kernel) for channels in (256, 128, 64, 32) for kernel in (3, 7, 11)]
    ups = [transposed(2 * channels, channels, kernel) for channels, kernel in ((256, 16), (128, 16), (64, 4), (32, 4))]
    return [conv(512, 80, 7), *(conv(channels, channels, kernel) for channels, kernel in stages), *ups, conv(1, 32, 7)]


def composed(target):
    """Compose weights and pull their gradients back, alone and together; return what was compiled for it, by name."""
    triton.runtime.driver.set_active(Driver(target))
    compose_launches.WARPS = 4 if target.backend == "hip" else 8
    binaries = {}
    for name, weight in {**{name: [weight] for name, weight in weights().items()}, "HiFi-GAN": hifigan()}.items():
        vs, axes, grads = zip(*((v, axis, *(grad or (v,))) for v, axis, *grad in weight), strict=True)
        gs = [torch.empty(v.numel() // axis.row_length(v)) for v, axis in zip(vs, axes, strict=True)]
        passes = partial(compose.forward, vs, gs, axes), partial(compose.backward, grads, vs, gs, axes)
        for way, run in zip(("forward", "backward"), passes, strict=True):
            for kernel in KERNELS:
                kernel.device_caches.clear()
            for _ in range(2):  # by Triton's own way, and by the short one
                run()
            for kernel in KERNELS:
                for binary in kernel.device_caches[0][0].values():
                    binaries[f"compose {name}: {kernel.__name__} {way}"] = binary
    return binaries
