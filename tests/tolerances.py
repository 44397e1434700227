"""How far a result may lie from its reference: the one table that every test takes its tolerance from.

Keyed by backend, precision and metric. The metrics:

``max_abs``
    Largest absolute difference of one forward pass, for values of order 1.
``extrapolated_max_abs``
    The same, where the pass read caches extrapolated with weights of up to 3, which multiply their rounding.
``trajectory_max_abs``
    Largest absolute difference of the final latents after all denoising steps, where the differences of single passes
    are fed back and grow.
``trajectory_max_rel``
    The same, relative to the largest of the latents: a random model may drive them to any size.
``psnr_db``
    A PSNR in dB, against one computed by hand.
``metric``
    Any other metric of order 1, against its definition: computed in fp64 from fp32 values.
"""

TOLERANCES = {
    # Same kernels, other shapes: a matrix product over some of the rows may sum in another order.
    ("torch", "fp32", "max_abs"): 1e-5,
    ("torch", "fp32", "extrapolated_max_abs"): 1e-4,
    ("torch", "fp32", "psnr_db"): 1e-4,
    ("torch", "fp32", "metric"): 1e-6,
    # Other kernels, fused differently.
    ("onnxruntime", "fp32", "max_abs"): 2e-5,
    ("onnxruntime", "fp32", "trajectory_max_abs"): 1e-3,
    ("onnxruntime", "fp32", "trajectory_max_rel"): 5e-5,
    # Against ONNX Runtime.
    ("openvino", "fp32", "max_abs"): 2e-5,
    ("openvino", "fp32", "trajectory_max_rel"): 5e-5,
    ("openvino", "bf16", "trajectory_max_rel"): 0.2,
}


def tolerance(backend: str, precision: str, metric: str) -> float:
    """The table's entry; a KeyError means that the table lacks a line."""
    return TOLERANCES[backend, precision, metric]
