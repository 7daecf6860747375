"""Every test starts from the same random state; tables of tensors made at collection do too."""

import os

import pytest
import torch

from weightnorm.optim.backends import AUTO

os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported: they run on the CPU here

torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture(params=["torch", "numba"])
def each_backend(request, monkeypatch):
    """Run the test once with each backend behind ``auto``; those that need torch's say so."""
    monkeypatch.setitem(AUTO, "cpu", request.param)
    return request.param
