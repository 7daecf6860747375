"""What a comparison of any kind is asked for, and how a checkpoint finds its kind again."""

from collections.abc import Mapping
from typing import Any, ClassVar, Protocol

from weightnorm.compare.loop import Turns
from weightnorm.compare.view import Summary


class Asked(Protocol):
    """What was asked for: a frozen dataclass of plain types.

    Attributes:
        kind: what ``request_of`` knows it by.
        deterministic: on a GPU, let cuDNN take none but its deterministic algorithms; else the fastest it finds.
    """

    kind: ClassVar[str]
    __dataclass_fields__: ClassVar[dict[str, Any]]

    @property
    def deterministic(self) -> bool:
        """See above."""

    def needs(self, resumed: bool = False) -> str:
        """Say in a line what it takes, or to go on with it; empty: nothing to speak of. Refuse what there is not."""

    def comparison(self, device: str) -> Turns[Any]:
        """Return what is to be trained."""

    def summary(self, comparison: Any, command: str) -> Summary:
        """Sum up a comparison, finished or not."""


def request_of(kind: str, fields: Mapping[str, Any]) -> Asked:
    """Return a request that was saved.

    Args:
        kind: its.
        fields: its fields.
    """
    if kind == "games":
        from weightnorm.compare.games.request import GamesRequest  # it needs an extra

        return GamesRequest(**fields)
    from weightnorm.compare.request import Request

    return Request(**fields)
