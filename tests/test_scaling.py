"""Scaling the output units of a layer, whatever holds its weight."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

import weightnorm as wn
from weightnorm.scaling import scale_units, weight_in_module_form


def torch_hook(layer, dim=0):
    with warnings.catch_warnings(action="ignore", category=FutureWarning):
        return nn.utils.weight_norm(layer, dim=dim)


FORMS = {
    "plain": lambda layer: layer,
    "ours": wn.weight_norm,
    "ours, log g": partial(wn.weight_norm, log_g=True),
    "ours, axis 0": partial(wn.weight_norm, dim=0),
    "ours, whole tensor": partial(wn.weight_norm, dim=None),
    "torch": parametrizations.weight_norm,
    "torch, whole tensor": partial(parametrizations.weight_norm, dim=-1),
    "torch's hook": torch_hook,
}
LAYERS = {
    "linear": (partial(nn.Linear, 5, 4), (3, 5), -1),
    "conv": (partial(nn.Conv2d, 6, 4, 3, groups=2), (2, 6, 5, 5), 1),
    "transposed": (partial(nn.ConvTranspose1d, 6, 4, 3), (2, 6, 5), 1),
    "grouped transposed": (partial(nn.ConvTranspose1d, 6, 4, 3, groups=2), (2, 6, 5), 1),
}
PER_UNIT = {"plain", "ours", "ours, log g"}  # of every layer; torch's axis 0 is that of linear and conv


@pytest.mark.parametrize("factor", [[2.0, 0.5, 3.0, 1.0], [2.0, -0.5, 0.0, 1.0]], ids=["positive", "any sign"])
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", FORMS)
def test_each_output_takes_its_factor(form, layer, factor):
    make, shape, axis = LAYERS[layer]
    x, by = torch.randn(shape).double(), torch.tensor(factor).double()
    module = FORMS[form](make(bias=False).double())
    expected = module(x).movedim(axis, -1) * by
    scale_units(module, by)
    torch.testing.assert_close(module(x).movedim(axis, -1), expected)
    torch.testing.assert_close(module.forward(x).movedim(axis, -1), expected)  # the hook's weight is up to date


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_the_length_of_v_stays_and_v_itself_where_g_has_the_units(form, layer):
    module = FORMS[form](LAYERS[layer][0](bias=False).double())
    found = weight_in_module_form(module)
    before = found.v.detach().clone()
    scale_units(module, torch.tensor([2.0, 0.5, 3.0, 1.0]).double())
    norm = partial(
        torch.linalg.vector_norm, dim=[i for i, size in enumerate(found.g.shape[-before.ndim :]) if size == 1]
    )
    if found.axis.groups == 1:
        torch.testing.assert_close(norm(found.v), norm(before))
    if form in PER_UNIT or ("transposed" not in layer and "whole" not in form):
        assert torch.equal(found.v, before)
