"""How far a result may lie from its reference: the one table that every test takes its tolerance from.

Keyed by backend, precision and metric. The metrics:

``max_abs``
    Largest absolute difference of one forward pass, for values of order 1.
``trajectory_max_abs``
    Largest absolute difference of the final latents after all denoising steps, where the differences of single passes
    are fed back and grow.
"""

TOLERANCES = {
    # Same kernels, other shapes: a matrix product over some of the rows may sum in another order.
    ("torch", "fp32", "max_abs"): 1e-5,
    # Other kernels, fused differently.
    ("onnxruntime", "fp32", "max_abs"): 2e-5,
    ("onnxruntime", "fp32", "trajectory_max_abs"): 1e-3,
}


def tolerance(backend: str, precision: str, metric: str) -> float:
    """The table's entry; a KeyError means that the table lacks a line."""
    return TOLERANCES[backend, precision, metric]
