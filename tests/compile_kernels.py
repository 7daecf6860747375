"""Compile every kernel to machine code for one kind of GPU, none being there, and print what came out as JSON.

Run by ``test_kernel_compile.py`` in a process of its own, not under Triton's interpreter: backend, architecture.
"""

import dataclasses
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from compile_compose import composed
from weightnorm.kernels import triton_kernels, triton_step
from weightnorm.kernels.triton_step import Shape

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16
ADAM = Shape("adam", True, F32, F32, F32, False, False, False, False, 4, "tiles", 1, 1024)
POINTERS = {
    "table": "*i64",
    "grads": "*i64",
    "moves": "*fp64",
    "facts": "*fp64",
    "options": "*fp64",
    "programs": "*i32",
}
POINTERS |= {"seed": "*i64", "grad_scale": "*fp32", "found_inf": "*fp32", "count": "i32"}


def shapes():
    """Return the shapes to compile, by name: each tile in use, and each thing that changes a kernel's code."""
    of_rows = {4: 128, 16: 32, 128: 4, 256: 2, 512: 1, 1024: 1, 2048: 1, 4096: 1}
    found = {f"tiles of {block}": dataclasses.replace(ADAM, rows=rows, block=block) for block, rows in of_rows.items()}
    for name, changes in {
        "sgd": dict(rule="sgd"),
        "sgd without momentum": dict(rule="sgd", first=False),
        "amsgrad": dict(rule="amsgrad"),
        "adamax": dict(rule="adamax"),
        "bfloat16": dict(weight=BF16, gradient=BF16, master=True, vector=8),
        "bfloat16 rounded at random": dict(weight=BF16, gradient=BF16, stochastic=True, vector=8),
        "bfloat16 plain": dict(weight=BF16, gradient=BF16, state=BF16, vector=8),
        "float16": dict(weight=F16, gradient=F16, master=True, vector=8),
        "bfloat16 gradients": dict(gradient=BF16, vector=8),
        "float64": dict(weight=F64, gradient=F64, state=F64, vector=2),
        "unaligned": dict(vector=1),
        "strided": dict(strided=True, vector=1),
        "across": dict(strided=True, across=True, vector=1, rows=8, block=128),
        "walk": dict(path="walk", block=8192),
        "walk across": dict(path="walk", strided=True, across=True, vector=1, rows=8, block=256),
        "walk bfloat16": dict(path="walk", block=8192, weight=BF16, gradient=BF16, master=True, vector=8),
        "split": dict(path="split", block=8192),
        "split amsgrad": dict(path="split", block=8192, rule="amsgrad"),
        "split bfloat16": dict(path="split", block=8192, weight=BF16, gradient=BF16, stochastic=True, vector=8),
        "split float64": dict(path="split", block=4096, weight=F64, gradient=F64, state=F64, vector=2),
    }.items():
        found[name] = dataclasses.replace(ADAM, **changes)
    found["sgd, tiles of 4096"] = dataclasses.replace(ADAM, rule="sgd", block=4096)
    found["adamax, tiles of 4096"] = dataclasses.replace(ADAM, rule="adamax", block=4096)
    return found


def compiled(kernel, constants, warps, target):
    """Return a kernel compiled for these constants."""
    sums = "*fp64" if constants.get("A") == triton.language.float64 else "*fp32"
    names = POINTERS | {"before": sums, "after": sums}
    signature = {name: "constexpr" if name in constants else names[name] for name in kernel.arg_names}
    places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=places)
    return triton.compile(source, target=target, options={"num_warps": warps})


def report(binary, target):
    """Return what a kernel uses: what it spills, its loads of 16 bytes, and whether a barrier guards the state of g."""
    if target.backend == "hip":
        assembly = binary.asm["amdgcn"]
        spills = sum(map(int, re.findall(r"\.[vs]gpr_spill_count: +(\d+)", assembly)))
        return {"spills": spills, "wide loads": len(re.findall(r"(?:global|buffer|flat)_load_dwordx4", assembly))}
    ptx = binary.asm["ptx"]
    return {
        "spills": sum(map(int, re.findall(r"(\d+) bytes spill", usage_of(ptx)))),
        "wide loads": len(re.findall(r"ld\.global\S*\.v4\.b32", ptx)),
        "guarded": ptx.find("bar.sync", 0, ptx.find("st.global")) > 0 and ptx.rfind("bar.sync") > ptx.rfind("sqrt"),
    }


def usage_of(ptx):
    """Return the assembler's account of the registers and the memory that a kernel takes."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    architecture = re.search(r"\.target (\w+)", ptx).group(1)
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        for assembler in ("ptxas", "ptxas-blackwell"):  # each knows targets that the other does not
            command = [tools / assembler, "-v", f"--gpu-name={architecture}", file.name, "-o", os.devnull]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode == 0:
                return done.stderr
    raise RuntimeError(done.stderr)


def main(backend, architecture):
    """Compile everything for one target."""
    target = GPUTarget(
        backend, int(architecture) if architecture.isdigit() else architecture, 32 if backend == "cuda" else 64
    )
    results = {}
    for name, shape in shapes().items():
        warps = triton_step.warps_of(shape, is_amd=backend == "hip")
        kernels = ["split_sums", "split_steps", "split_lengths"] if shape.path == "split" else [shape.path]
        for kernel in (getattr(triton_kernels, kernel) for kernel in kernels):
            for more in [{"LAST": False}, {"LAST": True}] if "LAST" in kernel.arg_names else [{}]:
                binary = compiled(kernel, shape.constants(kernel) | more, warps, target)
                results[" ".join([f"{name}: {kernel.__name__}", *map(str, more.values())])] = report(binary, target)
    for rule in ("sgd", "adam"):
        constants = {"RULE": rule, "BLOCK": 128}
        results[f"{rule}: clock"] = report(compiled(triton_kernels.clock, constants, 4, target), target)
    binaries = composed(target)
    print(json.dumps(results | {name: report(binary, target) for name, binary in binaries.items()}))


if __name__ == "__main__":
    main(*sys.argv[1:])
