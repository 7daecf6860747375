"""The example, as a user runs it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLE = Path(__file__).parents[1] / "examples" / "rl_one_line.py"


@pytest.mark.slow
def test_the_example_learns_to_balance_the_pole():
    ran = subprocess.run([sys.executable, EXAMPLE], capture_output=True, text=True, check=True)
    (mean,) = re.findall(r"^mean return (\d+) ± \d+ of 500$", ran.stdout, re.MULTILINE)
    assert int(mean) >= 400
