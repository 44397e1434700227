"""``tc-deploy build``: an exported bundle to engines."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tc_deploy.backends import registry
from tc_deploy.backends.compiled_at_load import MOST_THREADS, WEIGHTS_MODES
from tc_deploy.backends.onnxruntime.providers import PROVIDERS
from tc_deploy.backends.registry import BACKENDS, DEFAULT
from tc_deploy.cli.config import config_option
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MODEL_PATH, MOST, PATH, json_option
from tc_deploy.cli.progress import progress_bar
from tc_deploy.errors import UsageError
from tc_deploy.precisions import PRECISIONS

SIZE = click.IntRange(1, MOST)
_TENSORRT = ("tensorrt", "tensorrt-rtx")
TAKEN_BY = {
    "threads": ("onnxruntime", "openvino"),
    "unfused": ("onnxruntime",),
    "provider": ("onnxruntime",),
    "weights": ("onnxruntime", "openvino"),
    "compile": ("torch",),
    "model": ("torch",),
    "device": ("torch",),
    "precision": ("openvino",),
    "compute_capability": ("tensorrt-rtx",),
    "batch_profile": _TENSORRT,
    "workspace_mib": _TENSORRT,
    "optimization_level": _TENSORRT,
    "hardware_compatibility": ("tensorrt",),
    "version_compatible": ("tensorrt",),
    "strip_weights": ("tensorrt",),
    "use_cuda_graph": _TENSORRT,
}
"""The engine kinds that take an option."""


def _list(context: click.Context, parameter: click.Parameter, value: str | None) -> list[str] | None:  # noqa: ARG001
    return None if value is None else value.split(",")


@click.command(cls=GroupedCommand)
@click.argument("bundle", type=PATH)
@option("--backend", default=DEFAULT, show_default=True, help=f"Engine kind: {', '.join(BACKENDS)}.")
@option(
    "--threads",
    type=click.IntRange(0, MOST_THREADS),
    help="onnxruntime, openvino: CPU threads; 0: all.",
)
@option(
    "--unfused",
    advanced=True,
    is_flag=True,
    default=None,
    help="onnxruntime: fuse no operators, to tell a fusion's fault from an operator's; slow.",
)
@option(
    "--provider",
    type=click.Choice(list(PROVIDERS)),
    metavar="NAME",
    help=f"onnxruntime: what computes: {', '.join(PROVIDERS)}; cpu if not given.",
)
@option(
    "--weights",
    type=click.Choice(WEIGHTS_MODES),
    help="onnxruntime, openvino: one copy for all graphs, or one each, faster if small.",
)
@option(
    "--compile/--no-compile",
    "compile",
    advanced=True,
    default=None,
    help="torch: compile the steps; minutes.",
)
@option("--model", advanced=True, type=MODEL_PATH, help="torch: the checkpoint, where it is not where the plan says.")
@option(
    "--device",
    advanced=True,
    type=click.Choice(["cpu", "cuda"]),
    help="torch: where; without it on the first visible GPU, or the CPU where there is none.",
)
@option(
    "--precision",
    type=click.Choice([record.openvino for record in PRECISIONS.values()]),
    help="openvino: what to compute in.",
)
@option(
    "--compute-capability",
    callback=_list,
    metavar="LIST",
    help="tensorrt-rtx: the GPUs to build for, like 8.6,8.9,12.0; without it Ampere and later.",
)
@option(
    "--batch-profile",
    type=(SIZE, SIZE, SIZE),
    metavar="LEAST BEST MOST",
    help="tensorrt, tensorrt-rtx: samples per batch; 1 1 8 if not given.",
)
@option(
    "--workspace-mib",
    advanced=True,
    type=click.IntRange(1, MOST),
    help="tensorrt, tensorrt-rtx: limit of an engine's scratch memory.",
)
@option(
    "--optimization-level",
    advanced=True,
    type=click.IntRange(0, 5),
    help="tensorrt, tensorrt-rtx: 0 builds fastest, 5 searches longest.",
)
@option(
    "--hardware-compatibility",
    advanced=True,
    type=click.Choice(["ampere-plus", "same-compute-capability"]),
    metavar="GPUS",
    help="tensorrt: run on ampere-plus or same-compute-capability too.",
)
@option("--version-compatible", advanced=True, is_flag=True, default=None, help="tensorrt: for its later versions too.")
@option(
    "--strip-weights",
    advanced=True,
    is_flag=True,
    default=None,
    help="tensorrt: engines without weights, which loading takes from the bundle.",
)
@option(
    "--use-cuda-graph/--no-cuda-graph",
    "use_cuda_graph",
    advanced=True,
    default=None,
    help="tensorrt, tensorrt-rtx: capture runs once and replay them (the default), or not.",
)
@config_option
@json_option
def command(bundle: Path, backend: str, as_json: bool, **options: Any) -> None:
    """Build engines from BUNDLE (engines/NAME), into a folder there that is named after the engine kind."""
    from tc_deploy.backends.build import build_target
    from tc_deploy.bundle import canonical_json
    from tc_deploy.inspect import inspect_path

    registry.backend(backend)
    given = {
        name: str(value) if isinstance(value, Path) else value for name, value in options.items() if value is not None
    }
    for name in given:
        if backend not in TAKEN_BY[name]:
            kinds = " or ".join(f"--backend {kind}" for kind in TAKEN_BY[name])
            raise UsageError(f"--{name.replace('_', '-')} is no option of {backend}; add {kinds}, or leave it out")
    with progress_bar() as report:
        target = build_target(bundle, backend, given, report)
    if as_json:
        facts = inspect_path(bundle)["targets"][backend]
        click.echo(canonical_json({"path": str(bundle / backend), "backend": backend, **facts}), nl=False)
        return
    click.echo(
        f"{bundle / backend}: built with {target.backend} {target.backend_version}, computes in {target.computes_in},"
        f" {target.options_in_words}"
    )
