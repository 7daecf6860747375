"""A weight read from a weight-normalised layer writes through: what is done to it in place is done to the layer.

``nn.init.normal_(layer.weight)`` and ``layer.weight.data.normal_()`` are how models are initialised. The weight is
computed, so without this they would fill a temporary tensor and change nothing, silently.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_UNCOUNTED = ("apply_", "map_")  # writes that torch does not count
_GET_DATA, _SET_DATA = Tensor.data.__get__, Tensor.data.__set__  # type: ignore[attr-defined]


class Origin:
    """Where computed weights came from.

    Args:
        parametrization: turns a weight into ``(g, v)``.
        g: the lengths it was computed from.
        v: the direction it was computed from.
    """

    __slots__ = ("g", "grad_fn", "parametrization", "v", "versions", "written")

    def __init__(self, parametrization: Any, g: Tensor, v: Tensor):
        self.parametrization, self.g, self.v = parametrization, g, v
        self.versions = g._version, v._version
        self.written = 0  # the weight's own version when last looked at
        self.grad_fn: Any = None  # its node in the graph

    def adopt(self, w: Tensor) -> None:
        """Make ``w`` the layer's weight."""
        if (self.g._version, self.v._version) != self.versions:
            warnings.warn(
                "a weight of a weight-normalised layer was changed in place after the layer had moved on from it; the "
                "layer keeps its newer weight. Read layer.weight again before writing to it",
                stacklevel=4,
            )
            return
        with torch.no_grad():
            g, v = self.parametrization.right_inverse(w.as_subclass(Tensor))
            self.g.copy_(g)
            self.v.copy_(v)
        self.versions = self.g._version, self.v._version


class ComputedWeight(Tensor):
    """A plain tensor in all but this: changes in place, of itself or of a view, go to the layer it was read from.

    ``.data`` is ``.detach()`` here, since writes to the former would leave no trace. A change that autograd records is
    refused, as it is for the parameter of a plain layer.
    """

    _origin: Origin
    _whole: "Tensor | None" = None  # of a view: the weight it is a part of

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            out = args[0].detach() if func == _GET_DATA else func(*args, **(kwargs or {}))
            given = [*args, *kwargs.values()] if kwargs else args
            for weight in _computed(given) or _computed(given, nested=True):
                _settle(weight, func)
                _mark_aliases(weight, out)
        return out

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, _: bool) -> None:
        """Be a plain parameter: this is how ``nn.Parameter(layer.weight.data)`` marks what it has detached."""
        self.__class__ = nn.Parameter  # type: ignore[assignment]
        self.__dict__.clear()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().as_subclass(Tensor).__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        with torch._C.DisableTorchFunctionSubclass():
            return self.detach().clone().requires_grad_(self.requires_grad)


def writes_to(tensor: Tensor) -> int:
    """Return how often a tensor has been written to, as far as torch counts; it does not in inference mode."""
    return 0 if tensor.is_inference() else tensor._version


def writes_counted() -> AbstractContextManager[None]:
    """Return a context in which tensors are made that count the writes to them, as those of inference mode do not."""
    return _out_of_inference() if torch.is_inference_mode_enabled() else nullcontext()


@contextmanager
def _out_of_inference() -> Iterator[None]:
    with torch.inference_mode(False), torch.no_grad():
        yield


def written_through(w: Tensor, parametrization: Any, g: Tensor, v: Tensor) -> Tensor:
    """Return a weight just computed, in such a way that writes to it reach its layer, where writes are counted.

    Args:
        w: the weight.
        parametrization: turns a weight into ``(g, v)``.
        g: the lengths it was computed from.
        v: the direction it was computed from.
    """
    if type(w) is not Tensor or any(tensor.is_inference() for tensor in (w, g, v)):
        return w
    origin = Origin(parametrization, g, v)
    origin.written, origin.grad_fn = w._version, _node(w)
    w.__class__ = ComputedWeight  # last: each look at one goes through __torch_function__
    w._origin = origin  # type: ignore[attr-defined]
    return w


def _node(w: Tensor) -> Any:
    """Return what autograd knows of a weight; of its base, where it is a view: that of a view is made anew."""
    return w.grad_fn if w._base is None else w._base.grad_fn


def _computed(values: Iterable[Any], nested: bool = False) -> list[ComputedWeight]:
    """Return the computed weights among arguments; most often it is one of them, and nothing is in lists."""
    found = [value for value in values if type(value) is ComputedWeight]
    lists = [value for value in values if isinstance(value, list | tuple)] if nested else []
    return found + [weight for value in lists for weight in _computed(value, nested)]


def _settle(weight: ComputedWeight, func: Callable[..., Any]) -> None:
    """Let the layer adopt a weight that an operation has changed."""
    origin = weight._origin
    name = getattr(func, "__name__", "")
    if weight._version == origin.written and func != _SET_DATA and name not in _UNCOUNTED:
        return
    origin.written = weight._version
    if name.endswith("rnn_flatten_weight"):
        return  # cuDNN moves an RNN's weights in memory, their values stay
    whole = weight if weight._whole is None else weight._whole
    if _node(whole) is not origin.grad_fn:
        raise ValueError(
            "a weight of a weight-normalised layer is being changed in place while autograd records. Set it under "
            "torch.no_grad() or by layer.weight = ...; or compute with layer.weight.clone()"
        )
    origin.adopt(whole)


def _mark_aliases(weight: ComputedWeight, out: Any) -> None:
    """Make results that share the weight's memory write through too."""
    for result in out if isinstance(out, list | tuple) else (out,):
        if isinstance(result, Tensor) and type(result) is Tensor and torch._C._is_alias_of(result, weight):  # type: ignore[attr-defined]
            result.__class__ = ComputedWeight
            result._origin = weight._origin  # type: ignore[attr-defined]
            result._whole = weight if weight._whole is None else weight._whole  # type: ignore[attr-defined]
