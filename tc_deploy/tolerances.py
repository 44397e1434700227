"""How far a result may lie from its reference: the one table that validation and every test take their tolerance from.

Keyed by backend, precision and metric. The metrics of tests:

``max_abs``
    Largest absolute difference of one forward pass, for values of order 1.
``extrapolated_max_abs``
    The same, where the pass read caches extrapolated with weights of up to 3, which multiply their rounding.
``large_angle_max_abs``
    ``max_abs`` of a pass that takes the sine of a thousand times a guidance strength, whose last bit is 2e-4 of an
    angle. Measured on a tiny FLUX at strengths of 0, 2 and 3.5: 5e-6, 1e-5 and 4e-5.
``trajectory_max_abs``
    Largest absolute difference of the final latents after all denoising steps, where the differences of single passes
    are fed back and grow.
``trajectory_max_rel``
    The same, relative to the largest of the latents: a random model may drive them to any size.
``least_snr_db``
    How far above its error to fp32 a half-precision pass must lie.
``psnr_db``
    A PSNR in dB, against one computed by hand.
``metric``
    Any other metric of order 1, against its definition: computed in fp64 from fp32 values.

The metrics of ``tc-deploy validate``, against PyTorch in fp32 or another engine:

``output_max_rel``
    Largest absolute difference of an output, in units of its standard deviation.
``output_sqnr_db``, ``output_cosine``
    Least signal-to-quantisation-noise ratio and least cosine of an output.
``drift_rel_l2``
    Largest relative L2 difference of the latents after any step of a sampling run.
``image_psnr_db``
    Least PSNR of the final pictures or latents.
"""

from __future__ import annotations

LARGEST_PSNR_DB = 140.0
"""What results count as that agree better than fp32 can tell, so that equal ones have a finite figure."""

ENGINES = ("onnxruntime", "openvino", "tensorrt", "tensorrt-rtx", "torch")
"""The engine kinds that validation judges; TensorRT's figures are expectations, it has not run on a GPU."""

_VALIDATION = {
    # Rounding in another order of summation reaches 1e-6 to 2e-5 a pass; a wrong sign, gate, index or cache shows as
    # 1e-2 and more.
    "fp32": {"output_max_rel": 1e-4, "output_sqnr_db": 90.0, "output_cosine": 0.999999},
    # 11 bits of mantissa.
    "fp16": {"output_max_rel": 0.05, "output_sqnr_db": 45.0, "output_cosine": 0.9999},
    # 8 bits. The digits' deepest attention reaches 23 dB with OpenVINO.
    "bf16": {"output_max_rel": 0.5, "output_sqnr_db": 20.0, "output_cosine": 0.99},
}
_TRAJECTORIES = {
    "fp32": {"drift_rel_l2": 1e-4, "image_psnr_db": 80.0},
    "fp16": {"drift_rel_l2": 0.02, "image_psnr_db": 40.0},
    "bf16": {"drift_rel_l2": 0.1, "image_psnr_db": 25.0},
}

_EXPORT = {"fp32": 1e-4, "fp16": 2e-2, "bf16": 2e-1}
"""Of a graph right after export: rounding in another order of summation reaches 1e-6 to 2e-5, and a wrong sign, gate,
index or cache shows as 1e-2 and more; in half precision an engine rounds at other places than PyTorch."""

TOLERANCES = {
    **{("export", precision, "output_max_rel"): value for precision, value in _EXPORT.items()},
    # Same kernels, other shapes: a matrix product over some of the rows may sum in another order.
    ("torch", "fp32", "max_abs"): 1e-5,
    ("torch", "fp32", "extrapolated_max_abs"): 1e-4,
    # Against ONNX Runtime.
    ("torch", "fp32", "trajectory_max_rel"): 5e-5,
    ("torch", "fp32", "psnr_db"): 1e-4,
    ("torch", "fp32", "metric"): 1e-6,
    # Other kernels, fused differently.
    ("onnxruntime", "fp32", "max_abs"): 2e-5,
    ("onnxruntime", "fp32", "large_angle_max_abs"): 1e-4,
    ("onnxruntime", "fp32", "trajectory_max_abs"): 1e-3,
    ("onnxruntime", "fp32", "trajectory_max_rel"): 5e-5,
    # Between two runs in the same precision: half a unit in the last place is 5e-4 in fp16 and 4e-3 in bf16.
    ("onnxruntime", "fp16", "max_abs"): 1e-2,
    ("onnxruntime", "fp16", "trajectory_max_rel"): 1e-2,
    ("onnxruntime", "fp16", "least_snr_db"): 55.0,
    ("openvino", "bf16", "max_abs"): 1e-1,
    ("openvino", "bf16", "least_snr_db"): 35.0,
    # Against ONNX Runtime.
    ("openvino", "fp32", "max_abs"): 2e-5,
    ("openvino", "fp32", "trajectory_max_rel"): 5e-5,
    ("openvino", "bf16", "trajectory_max_rel"): 0.2,
    **{
        (engine, precision, metric): value
        for engine in ENGINES
        for table in (_VALIDATION, _TRAJECTORIES)
        for precision, metrics in table.items()
        for metric, value in metrics.items()
    },
}


def tolerance(backend: str, precision: str, metric: str) -> float:
    """The table's entry; a KeyError means that the table lacks a line."""
    return TOLERANCES[backend, precision, metric]
