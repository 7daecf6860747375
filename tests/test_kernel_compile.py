"""Every kernel compiles to machine code for the GPUs in use, stays in registers, and loads 16 bytes at a time."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = [("cuda", "80"), ("cuda", "90"), ("cuda", "100"), ("hip", "gfx942")]
IN_REGISTERS = ("tiles of", "compose")  # whole rows in every rule, and all that composes: no local memory
MANY_WARPS_A_ROW = ("tiles of 512", "tiles of 1024", "tiles of 2048", "tiles of 4096", "walk")
NOT_ALIGNED = ("unaligned", "strided", "across", "walk across", "float64", "split float64")
NOT_ALIGNED += tuple(f"compose {name}" for name in ("rows of 3", "one element", "float64", "unaligned", "mixed"))


@pytest.mark.slow
@pytest.mark.parametrize(("backend", "architecture"), TARGETS)
def test_every_kernel_compiles_without_spills_and_with_wide_loads(backend, architecture):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    program = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run(
        [sys.executable, program, backend, architecture],
        env=environment | {"TRITON_DEFAULT_FP_FUSION": "1"}, capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(done.stdout.splitlines()[-1])
    assert len(results) >= 80
    assert {"compose HiFi-GAN: many forward", "compose HiFi-GAN: many backward"} <= results.keys()
    for name, found in results.items():
        if any(kind in name for kind in IN_REGISTERS):
            assert found["spills"] == 0, name
        if not name.startswith(NOT_ALIGNED) and "clock" not in name and "split_lengths" not in name:
            assert found["wide loads"] > 0, name
        if backend == "cuda" and name.startswith(MANY_WARPS_A_ROW):
            assert found["guarded"], name  # all threads of a row have read g's state before one of them writes it
