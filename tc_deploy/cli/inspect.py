"""``tc-deploy inspect``: what a plan or a bundle is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from tc_deploy.bundle import canonical_json
from tc_deploy.cli.help import GroupedCommand, option
from tc_deploy.cli.options import MOST, PATH, json_option
from tc_deploy.errors import counted
from tc_deploy.inspect import departure, inspect_path
from tc_deploy.plan import RANDOM

SHOWN_LETTERS = 60
"""Of a prompt."""
LARGEST_SHOWN = 3
"""Buffers; JSON has all of them."""


@click.command(cls=GroupedCommand)
@click.argument("path", type=PATH)
@option(
    "--batch-size",
    type=click.IntRange(1, MOST),
    help="Pictures that run together, for the device memory of engines/NAME.",
)
@json_option
def command(path: Path, batch_size: int | None, as_json: bool) -> None:
    """Show what PATH (calibration/NAME or engines/NAME) is: schedule, keep counts, cost, sizes, memory, hashes."""
    facts = inspect_path(path, batch_size)
    if as_json:
        click.echo(canonical_json(facts), nl=False)
        return
    if facts["kind"] == "bundle":
        _show_bundle(facts)
    _show_plan(facts.get("plan", facts))


def _show_bundle(facts: dict[str, Any]) -> None:
    batch = "any" if facts["batch_size"] is None else facts["batch_size"]
    precision = " with ".join([facts["precision"], *(f"{block} in fp32" for block in facts["fp32_blocks"])])
    _line("bundle", f"{facts['path']}, {precision}, batch {batch}, made by {facts['made_by']}")
    _line("latents", _latents(facts))
    _line("sampled", f"on {facts['sampled_on']}")
    for name, graph in facts["graphs"].items():
        size = facts["files"][graph["file"]]["size_bytes"]
        inputs, outputs = counted(graph["inputs"], "input"), counted(graph["outputs"], "output")
        error = departure(name, graph["max_abs_error"], facts["init_noise_sigma"])
        if graph["snr_to_fp32_db"] is not None:
            error += f", {graph['snr_to_fp32_db']:.1f} dB above its error to fp32"
        _line(name, f"{inputs}, {outputs}, {_size(size)}, {error}")
    if (moved := facts["prologue"]) is not None:
        _line(
            "prologue",
            f"{moved['parameters']:,} parameters, {_size(moved['weights_bytes'])}, have left the steps' graphs,"
            f" {moved['share_of_weights']:.1%} of the full step's; a step reads {_size(moved['bytes_per_step'])} for"
            f" them, and a run holds {_size(moved['table_bytes'])}, for each picture",
        )
    text = facts["text"] or {"components": [], "tokenizers": []}
    for part in ([facts["decoder"]] if facts["decoder"] else []) + text["components"]:
        _line("part", f"{part['name']}, {part['model_class']}, sha256 {part['weights_sha256'][:16]}")
    for tokenizer in text["tokenizers"]:
        _line("prompts", f"{tokenizer['file']}, padded or cut to {counted(tokenizer['tokens'], 'token')}")
    for name, record in facts["files"].items():
        _line("file", f"{name}, {_size(record['size_bytes'])}, sha256 {record['sha256'][:16]}")
    for name, target in facts["targets"].items():
        _line("engines", _target_line(name, target))
        for graph, engine in target.get("engines", {}).items():
            _line("", f"{graph}: {_engine_line(engine)}")
    if not facts["targets"]:
        _line("engines", f"none yet: tc-deploy build {facts['path']}")
    _show_memory(facts["memory"])


def _latents(facts: dict[str, Any]) -> str:
    shape = " x ".join(map(str, facts["latent_shape"]))
    if facts["pixels"]:
        return f"{shape}, pictures, as no autoencoder stood beside the checkpoint"
    return f"{shape}, {'decoded' if facts['decoder'] else 'to be decoded elsewhere: no decoder was exported'}"


def _show_memory(memory: dict[str, Any]) -> None:
    whole = f"{_size(memory['size_bytes'])} of buffers for a batch of {memory['batch_size']}"
    _line("memory", f"{whole}, beside what the engines hold; on the device from load to close")
    for kind, part in memory["by_kind"].items():
        _line("", f"{kind}: {counted(part['buffers'], 'buffer')}, {_size(part['size_bytes'])}")
    largest = sorted(memory["buffers"], key=lambda buffer: -buffer["size_bytes"])[:LARGEST_SHOWN]
    for buffer in largest:
        shape = " x ".join(map(str, buffer["shape"]))
        _line("", f"largest: {buffer['name']}, {buffer['dtype']} {shape}, {_size(buffer['size_bytes'])}")


def _target_line(name: str, target: dict[str, Any]) -> str:
    if not target["usable"]:
        return f"{name}: {target['why']}"
    gpu = [] if target["gpu"] is None else [f"for {target['gpu']['name']}"]
    return ", ".join([f"{name} {target['version']}", target["precision"], *gpu, target["options_in_words"]])


def _engine_line(engine: dict[str, Any]) -> str:
    axes = [f"{axis} {least} to {largest}" for axis, (least, _, largest) in engine["axes"].items()]
    *others, last = engine["graphs"]
    held = [f"{', '.join(others)} and {last} in one"] if others else []
    parts = [
        *held,
        _size(engine["size_bytes"]),
        *axes,
        f"{engine['layers']} layers",
        f"built in {engine['build_s']:.1f} s",
    ]
    return ", ".join([*parts, f"peak {engine['peak_memory_mib']} MiB", f"{len(engine['warnings'])} warnings"])


def _show_plan(plan: dict[str, Any]) -> None:
    model = plan["model"]
    _line("plan", f"sha256 {plan['plan_sha256'][:16]}, by {plan['origin']}, seed {plan['seed']}")
    _line(
        "model", f"{model['model_class']}, {model['blocks']} blocks, {model['tokens']} tokens, width {model['width']}"
    )
    _line("weights", f"{model['source']}, sha256 {model['weights_sha256'][:16]}")
    guidance = "no guidance" if plan["guidance_scale"] is None else f"guidance {plan['guidance_scale']:g}"
    _line("sampler", f"{plan['scheduler']}, {plan['steps']} steps, {guidance}")
    if plan["conditions"] is not None:
        _line("prompts", _prompts(plan["conditions"]))
    _line("schedule", plan["schedule"])
    rule = (
        f"phase start {plan['phase_start']}, K = ({plan['cache_interval_early']}, {plan['cache_interval_late']}), "
        if "phase_start" in plan
        else ""
    )
    _line("", f"{rule}{plan['steps_full']} full", nl=False)
    click.echo(f" + {plan['steps_cached']} cached steps")
    _line("cache", f"reuse {plan['reuse']}, attention {plan['attention']}, forecast order {plan['forecast_order']}")
    if plan["forecast_fitted_on"] is not None:
        _line("", f"forecast weights fitted on {plan['forecast_fitted_on']} samples, for this sampler and guidance,")
        _line("", plan["fit_target_in_words"])
    for phase, counts in plan["keep_counts"].items():
        _line(phase, f"tokens kept per block: {' '.join(map(str, counts))} (of {model['tokens']})")
    _line("cost", f"{plan['cost_in_full_steps']:.1f} full steps of {plan['steps']}", nl=False)
    click.echo(f" ({100 * plan['cost_ratio']:.1f} % of the FLOPs; a full step is {plan['full_gflops']:g} GFLOPs a row)")
    if plan["measured_in_words"] is not None:
        _line("measured", plan["measured_in_words"])
    if plan["remark"] is not None:
        _line("remark", plan["remark"])


def _shortened(text: str) -> str:
    """A prompt on a line."""
    return repr(text if len(text) <= SHOWN_LETTERS else f"{text[:SHOWN_LETTERS]}…")


def _prompts(conditions: Any) -> str:
    if conditions == RANDOM:
        return "random conditions, so what was measured says nothing about real prompts"
    if "file" not in conditions:
        texts = conditions["prompts"]
        more = f" and {len(texts) - 1} more" if len(texts) > 1 else ""
        away = f", away from {_shortened(conditions['negative_prompt'])}" if conditions["negative_prompt"] else ""
        return f"{_shortened(texts[0])}{more}{away}"
    return f"{conditions['prompts']} of {conditions['file']}, sha256 {conditions['sha256'][:16]}"


def _line(name: str, text: str, *, nl: bool = True) -> None:
    click.echo(f"{name:<10}{text}", nl=nl)


def _size(size_bytes: int) -> str:
    if size_bytes < 2**10:
        return f"{size_bytes} B"
    return f"{size_bytes / 2**20:.1f} MiB" if size_bytes >= 2**20 else f"{size_bytes / 2**10:.1f} KiB"
