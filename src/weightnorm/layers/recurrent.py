"""What torch's recurrent layers need beside a parametrization: they keep a list of their weights."""

from typing import Any

from torch import Tensor, nn


def register(module: nn.Module) -> None:
    """Keep a recurrent layer from holding on to weights after its forward, which has made the list anew."""
    if isinstance(module, nn.RNNBase):
        _let_go(module)
        if _let_go not in module._forward_hooks.values():
            module.register_forward_hook(_let_go)


def unregister(module: nn.Module) -> None:
    """Undo ``register``; the next forward makes the list of plain weights."""
    for key in [key for key, hook in module._forward_hooks.items() if hook is _let_go]:
        del module._forward_hooks[key]


def _let_go(module: Any, *_: Any) -> None:
    """Detach the list from the graph: neither deep copies nor memory could bear it."""
    module._flat_weights = [w.detach() if isinstance(w, Tensor) else w for w in module._flat_weights]
