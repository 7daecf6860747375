"""One device's fused step: keeps the tables true to where tensors are, and hands them to the kernels."""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from weightnorm.kernels import columns
from weightnorm.kernels.tables import Member, Tables, Upload, is_on_device, is_recording, option_row

Launcher = Callable[[Tables, Tensor, Tensor, Tensor, Tensor], None]
MakeLauncher = Callable[[list[Member], torch.device], Launcher]


class FusedStep:
    """Steps all tensors of one device that have, or had, a gradient.

    Tables are made again when, and only when, an address has changed: all of them for a weight or its state, the
    gradients' alone for a gradient. While a CUDA graph is recorded the gradients' addresses go into a table of the
    graph's own, which is never rewritten; weights and state must stay where they are from then on.

    Args:
        members: the tensors.
        gradients: one for each, as examples of dtype and layout.
        make_launcher: makes what launches the kernels: ``triton_step.TritonStep`` or its like.
    """

    def __init__(self, members: list[Member], gradients: Sequence[Tensor], make_launcher: MakeLauncher):
        self._members = members
        self._device = members[0].weight.device
        for member, gradient in zip(members, gradients, strict=True):
            member.lay_out(gradient)
        self._launch = make_launcher(members, self._device)
        self._tables = Tables(members, self._device)
        self._grads, self._options = Upload(self._device, torch.int64), Upload(self._device, torch.float64)
        self._kept = [member.weight for member in members] + list(_parts(members))
        self._at = _addresses(self._kept)
        self._kinds = [(gradient.dtype, gradient.stride()) for gradient in gradients]
        self._grads_at: list[int] = []
        self._aligned = [member.grad_aligned and member.copied is None for member in members]
        self._copied = [index for index, member in enumerate(members) if member.copied is not None]
        self._unscaled = torch.ones((), device=self._device)
        self._all_finite = torch.zeros((), device=self._device)
        self.recorded = False

    def fits(self, gradients: Sequence[Tensor | None]) -> bool:
        """Say whether the tables still hold: no tensor has moved, and gradients have the layouts they had."""
        if _addresses(self._kept) != self._at:
            return False
        # Every step of every training comes through here: one pass over the gradients, the unusual only on suspicion.
        try:
            kinds = [g if g is None else (g.dtype, g.stride()) for g in gradients]
        except RuntimeError:  # sparse tensors have no strides
            return False
        if kinds != self._kinds and any(
            kind is not None and kind != known for kind, known in zip(kinds, self._kinds, strict=True)
        ):
            return False
        at = [0 if g is None else g.data_ptr() for g in gradients]
        if at == self._grads_at:
            return True
        if any(address % 16 for address, is_aligned in zip(at, self._aligned, strict=True) if is_aligned):
            return False
        self._grads_at = at
        return True

    def run(
        self,
        gradients: Sequence[Tensor | None],
        groups: Sequence[dict[str, Any]],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Step every tensor that has a gradient.

        Args:
            gradients: one for each member, or None; the tables ``fits`` them.
            groups: the param groups that members name by index.
            grad_scale: by which the loss was multiplied; None: 1.
            found_inf: not 0: skip the step; None: 0.
        """
        self.recorded |= is_recording(self._device)
        self._launch(
            self._tables,
            self._grads(self._described(gradients)),
            self._options_now(groups),
            self._unscaled if grad_scale is None else grad_scale.to(self._device),
            self._all_finite if found_inf is None else found_inf.to(self._device),
        )
        # Autograd tells by this that a graph from before the step would give wrong gradients.
        increment_version([member.weight for member, g in zip(self._members, gradients, strict=True) if g is not None])

    def _described(self, gradients: Sequence[Tensor | None]) -> list[int]:
        """Return where the gradients are, those in layouts that no table can describe after copying them."""
        at = self._grads_at
        for index in self._copied:
            gradient, copied = gradients[index], self._members[index].copied
            if gradient is not None and copied is not None:
                at = [*at[:index], copied.copy_(gradient).data_ptr(), *at[index + 1 :]]
        return at

    def _options_now(self, groups: Sequence[dict[str, Any]]) -> Tensor:
        options = self._options([option_row(self._members[0].rule, group) for group in groups])
        for index, group in enumerate(groups):
            if is_on_device(group["lr"]):
                options[index, columns.OPTION_RATE].copy_(group["lr"].reshape(()))
        return options


def _parts(members: list[Member]) -> chain[Tensor]:
    return chain.from_iterable(member.parts.values() for member in members)


def _addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))
