"""Every test starts from the same random state; tables of tensors made at collection do too."""

import pytest
import torch

torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
