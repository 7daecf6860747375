"""The fused step: one pass over a weight, its gradient and its state, on a GPU (Triton) or a CPU (numba)."""
