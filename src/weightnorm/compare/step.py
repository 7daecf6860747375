"""A training step, as it is written, or on a GPU recorded in a CUDA graph and replayed, so that the host keeps up."""

from collections.abc import Callable

import torch
from torch import Tensor

Take = Callable[..., Tensor]
"""Takes a step on the tensors of a batch; returns what it measured."""
Record = Callable[[Callable[[], Tensor]], Callable[[], Tensor]]
"""Records something that returns a tensor; what comes back does it again, and returns that tensor, filled anew."""

WARM_UP = 3  # steps as they are written, in which everything is made that stays


class Recorded:
    """A step that is recorded after a few that run as they are written; all of them train.

    Args:
        take: the step. Whatever it reads and writes must stay where it is in memory.
        record: records it.

    Example:
        >>> step = Recorded(lambda x: 2 * x, record=lambda run: run)
        >>> [step(torch.tensor(float(i))).item() for i in range(6)]
        [0.0, 2.0, 4.0, 6.0, 8.0, 10.0]
    """

    def __init__(self, take: Take, record: Record | None = None):
        self._take, self._record = take, record or record_graph
        self._taken = 0
        self._inputs: list[Tensor] = []
        self._replay: Callable[[], Tensor] | None = None

    def __call__(self, *batch: Tensor) -> Tensor:
        """Take a step; batches have the same shapes."""
        self._taken += 1
        if self._taken <= WARM_UP:
            return beside(lambda: self._take(*batch)) if batch[0].is_cuda else self._take(*batch)
        if self._replay is None:
            self._inputs = [tensor.clone() for tensor in batch]
            self._replay = self._record(lambda: self._take(*self._inputs))
        for own, tensor in zip(self._inputs, batch, strict=True):
            own.copy_(tensor)
        return self._replay().clone()


def beside(run: Callable[[], Tensor]) -> Tensor:
    """Run something on a stream of its own, as what is to be recorded must have run before."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        result = run()
    torch.cuda.current_stream().wait_stream(stream)
    return result


def record_graph(run: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """Record in a CUDA graph; nothing is run yet."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()

    def replay() -> Tensor:
        graph.replay()
        return result

    return replay
