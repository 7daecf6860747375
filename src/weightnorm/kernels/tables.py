"""What a step's kernels read, built for the tensors of one device: addresses, layouts, options."""

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightnorm.axes import Axis
from weightnorm.kernels import columns
from weightnorm.kernels.layout import Layout, is_dense, rows_of

_SPARES = 16  # pinned buffers kept ready: CUDA graphs that may be recorded between two eager steps
_RULE_OPTIONS = {"momentum": 0.0, "dampening": 0.0, "nesterov": False, "eps": 0.0, "weight_decay": 0.0}


@dataclass
class Member:
    """A tensor that kernels step on.

    Attributes:
        weight: the weight, or a plain parameter; dense.
        axis: where its vectors lie; None: it is plain.
        group: the index of its param group.
        parts: its state by column of the table, zero-dimensional counts included.
        v_length: the ``‖v‖`` that a fresh scale sets; 0: ``‖w‖``.
        v_decay: multiplies the weight decay of v, or of a plain parameter.
        g_rate: multiplies the learning rate of g.
        rule: ``sgd``, ``adam``, ``amsgrad`` or ``adamax``.
        stochastic: round the narrow weight at random instead of keeping a master.
        layout: of weight and gradient; set when the tables are built.
        copied: a buffer for the gradient in the weight's layout, where no table can describe it as it is.
    """

    weight: Tensor
    axis: Axis | None
    group: int
    parts: dict[int, Tensor]
    v_length: float
    v_decay: float
    g_rate: float
    rule: str
    stochastic: bool
    layout: Layout = field(init=False)
    grad_dtype: torch.dtype = field(init=False)
    grad_aligned: bool = field(init=False)
    copied: Tensor | None = field(init=False, default=None)

    def lay_out(self, gradient: Tensor) -> None:
        """Find the rows of the weight and of a gradient with these strides."""
        self.grad_dtype = gradient.dtype
        self.grad_aligned = gradient.data_ptr() % 16 == 0
        layout, self.copied = rows_of(self.weight, gradient, self.axis) if is_dense(gradient) else None, None
        if layout is None:
            self.copied = torch.empty_like(self.weight, dtype=gradient.dtype)
            self.grad_aligned = True
            layout = rows_of(self.weight, self.copied, self.axis)
        assert layout is not None
        self.layout = layout

    def addresses(self) -> list[int]:
        """Return the tensor's row of the int64 table."""
        at, row = self.layout, [0] * columns.ADDRESSES
        row[columns.WEIGHT] = self.weight.data_ptr()
        for column, part in self.parts.items():
            row[column] = part.data_ptr()
        row[columns.GROUP], row[columns.NORMALIZED] = self.group, int(self.axis is not None)
        strides = (*at.row, *at.column, *at.grad_row, *at.grad_column)
        row[columns.NUMEL :] = [self.weight.numel(), at.rows, at.length, at.row_split, at.split, *strides]
        return row

    def facts(self) -> list[float]:
        """Return the tensor's row of the table of facts."""
        return [self.v_length, self.v_decay, self.g_rate]


class Tables:
    """The tables that stay as they are while no tensor moves.

    Args:
        members: the tensors, laid out.
        device: where they are.
    """

    def __init__(self, members: list[Member], device: torch.device):
        self.addresses = torch.tensor([member.addresses() for member in members]).to(device)
        self.facts = torch.tensor([member.facts() for member in members], dtype=torch.float64).to(device)
        self.moves = torch.empty(len(members), columns.MOVES, dtype=torch.float64, device=device)


def option_row(rule: str, group: dict[str, Any]) -> list[float]:
    """Return a param group's row of the table of options; a learning rate on a device is filled in there, unread."""
    at = _RULE_OPTIONS | group
    if rule == "sgd":
        keep1, keep2 = (at["dampening"] if at["momentum"] else 0.0), at["momentum"]
    else:
        keep1, keep2 = at["betas"]
    lr = math.nan if is_on_device(at["lr"]) else at["lr"]  # equal to itself in lists, and to no number
    # torch's AdamW *is* its Adam with this option, and a group may set it.
    decoupled = at["weight_decay"] if at.get("decoupled_weight_decay") else 0.0
    row = [lr, keep1, _log(keep1), keep2, _log(keep2), at["nesterov"], at["eps"], at["weight_decay"] - decoupled]
    return [*map(float, row), float(decoupled), -1.0 if at.get("maximize") else 1.0]


def is_on_device(lr: Any) -> bool:
    """Say whether a learning rate is a tensor that the host would have to wait for."""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def _log(x: float) -> float:
    return math.log(x) if x > 0 else -math.inf


class Upload:
    """A small table on a device, made anew when what it holds has changed, and never rewritten.

    While a CUDA graph is recorded a table is the graph's own: its copy is recorded too, from pinned memory that stays
    as it is while this object lives. None can be pinned at that time, so some is kept ready.

    Args:
        device: where the table goes.
        dtype: of the table.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype):
        self._device, self._dtype = device, dtype
        self._rows: list[Any] | None = None
        self._table = torch.empty(0)
        self._spare: list[Tensor] = []
        self._recorded: list[Tensor] = []

    def __call__(self, rows: list[Any]) -> Tensor:
        """Return ``rows`` on the device, without waiting for them to get there."""
        recording = is_recording(self._device)
        if rows != self._rows and recording:
            return self._record(rows)
        if rows != self._rows:
            self._rows, self._table = rows, self._send(torch.tensor(rows, dtype=self._dtype))
        if recording and not any(kept is self._table for kept in self._recorded):
            self._recorded.append(self._table)
        return self._table

    def _send(self, host: Tensor) -> Tensor:
        if self._device.type == "cpu":
            return host
        while len(self._spare) < _SPARES:
            self._spare.append(torch.empty_like(host, pin_memory=True))
        return host.pin_memory().to(self._device, non_blocking=True)

    def _record(self, rows: list[Any]) -> Tensor:
        if not self._spare:
            raise ValueError(
                f"more than {_SPARES} steps were recorded in CUDA graphs without an eager one in between; "
                "take an eager step before"
            )
        pinned = self._spare.pop()
        pinned.copy_(torch.tensor(rows, dtype=self._dtype))
        table = torch.empty_like(pinned, device=self._device, pin_memory=False)
        table.copy_(pinned, non_blocking=True)
        self._recorded += [pinned, table]
        return table


def is_recording(device: torch.device) -> bool:
    """Say whether a CUDA graph is being recorded on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
