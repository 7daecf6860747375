"""The paper's equations in float64 NumPy, re-derived here: no line is shared with the package.

A weight is a matrix of rows here, one row an output unit; tests bring other layouts into that form themselves.
"""

import numpy as np


def w_of(v, g):
    """Eq. 2, row by row; a row of zeros has no direction and stays zero."""
    out = np.zeros_like(v)
    for row in range(len(v)):
        norm = np.sqrt(np.dot(v[row], v[row]))
        if norm > 0:
            out[row] = g[row] / norm * v[row]
    return out


def gradients(grad_w, v, g):
    """Eq. 4 for v, with the projection written as a matrix, and eq. 3's first half for g."""
    grad_v, grad_g = np.zeros_like(v), np.zeros_like(g)
    for row in range(len(v)):
        norm = np.sqrt(np.dot(v[row], v[row]))
        if norm > 0:
            unit = v[row] / norm
            projection = np.eye(v.shape[1]) - np.outer(unit, unit)
            grad_v[row] = g[row] / norm * (projection @ grad_w[row])
            grad_g[row] = unit @ grad_w[row]
    return grad_v, grad_g


def sgd(w, grad_of_w, steps, lr, momentum=0.0):
    """Stored (v, g) trained by gradient descent from v = w, g = ‖w‖; returns w after every step."""
    v, g = w.copy(), np.sqrt((w * w).sum(1))
    velocity_v, velocity_g = np.zeros_like(v), np.zeros_like(g)
    path = []
    for _ in range(steps):
        grad_v, grad_g = gradients(grad_of_w(w_of(v, g)), v, g)
        velocity_v, velocity_g = momentum * velocity_v + grad_v, momentum * velocity_g + grad_g
        v, g = v - lr * velocity_v, g - lr * velocity_g
        path.append(w_of(v, g))
    return path


def moved(w, scale, step_v, step_g):
    """Where steps on v = w/scale and g = sign(scale)‖w‖ take w and the scale: by eq. 2, from stored v and g."""
    v, g = w / scale[:, None], np.sign(scale) * np.sqrt((w * w).sum(1))
    v, g = v + step_v, g + step_g
    return w_of(v, g), g / np.sqrt((v * v).sum(1))
