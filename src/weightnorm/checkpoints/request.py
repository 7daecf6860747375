"""What is asked of a conversion: the arguments of ``convert_state_dict``, checked."""

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from torch import nn

from weightnorm.axes import Axis
from weightnorm.checkpoints.known import KnownWeights, unwrapped
from weightnorm.checkpoints.lengths import Lengths, along
from weightnorm.checkpoints.spelling import SPELLINGS, Spelling, Stored
from weightnorm.formula import Dim

Said = Dim | Literal["auto"]


@dataclass(frozen=True)
class Request:
    """What is wanted of a state dict; the arguments of ``convert_state_dict``."""

    to: Spelling
    known: KnownWeights | None
    dim: Said
    keys: tuple[str, ...] | None

    def means(self, name: str) -> bool:
        """Say whether the weight of this plain name is to be touched."""
        matches = (fnmatchcase(unwrapped(name), pattern) or fnmatchcase(name, pattern) for pattern in self.keys or ())
        known = self.known.get(name) if self.known else None
        return (self.keys is None or any(matches)) and (known is None or known.lengths is not None)

    def lengths(self, stored: Stored) -> Lengths | None:
        """Return where the user says a weight's lengths lie; None where nothing is said."""
        assert stored.v is not None
        known = self.known.get(stored.name) if self.known else None
        if known and known.shape != tuple(stored.v.shape):
            raise ValueError(f"it has shape {tuple(stored.v.shape)}, and in the model {known.shape}")
        if self.dim != "auto":
            return along(Axis(self.dim), stored.v)
        return known.lengths if known else None


def request_of(to: Spelling, model: nn.Module | None, dim: Said, keys: str | Sequence[str] | None) -> Request:
    """Return the arguments of ``convert_state_dict``, checked."""
    if to not in SPELLINGS:
        raise ValueError(f"to must be one of {', '.join(SPELLINGS)}; got {to!r}")
    if not (dim is None or dim == "auto" or isinstance(dim, int | tuple)):
        raise ValueError(f"dim must be an axis, None (the whole tensor) or 'auto'; got {dim!r}")
    patterns = (keys,) if isinstance(keys, str) else None if keys is None else tuple(keys)
    return Request(to, KnownWeights(model) if model is not None else None, dim, patterns)


def refuse_nothing(request: Request) -> None:
    """Complain that no weight was found, unless plain ones were asked for and plain ones are there.

    Raises:
        ValueError: saying what is missing.
    """
    if request.keys is not None:
        raise ValueError(
            f"keys={', '.join(request.keys)} match no weight; they are patterns of names such as conv.weight"
        )
    if request.to != "plain" and request.known is not None:
        raise ValueError("no weight that the model normalises is in the state dict; are the names the model's own?")
    if request.to != "plain":
        raise ValueError("plain weights do not say which of them to normalise; pass model=, or keys= and dim=")
