"""Documents whose checksums are right and whose meaning is wrong, and headers that lie."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
from attacks.harness import (
    MANIFEST,
    PLAN,
    RUNTIME_TABLES,
    TABLES,
    TARGET,
    WEIGHTS,
    Damage,
    edit,
    read_json,
    record_of,
    seal,
    stamp,
    text,
    with_array,
    with_header,
    write_json,
)

BUILT = f"{TARGET}/{MANIFEST}"
TEN_GB = 10**10
DEEP = 100_000


def put(name: str, path: str, value: Any) -> Damage:
    """Put a value into a document, at a dotted path."""
    *way, last = path.split(".")

    def change(document: Any) -> None:
        place = document
        for key in way:
            place = place[int(key) if isinstance(place, list) else key]
        place[int(last) if isinstance(place, list) else last] = value

    return edit(name, change)


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda bundle: [damage(bundle) for damage in damages]


def first_key_twice(name: str) -> Damage:
    """The first key of a document once more, with another value behind it."""
    return text(name, lambda found: found.replace("{", '{"kind": "other", ', 1))


def without_graph(document: Any) -> None:
    del document["graphs"]["cached-1"]


def renamed_graph(document: Any) -> None:
    document["graphs"]["cached-9"] = document["graphs"].pop("cached-1")


def swapped_graphs(document: Any) -> None:
    graphs = document["graphs"]
    graphs["full"]["file"], graphs["cached-1"]["file"] = graphs["cached-1"]["file"], graphs["full"]["file"]


def million_steps(document: Any) -> None:
    document["schedule"]["steps"] = 10**6
    document["sampling"]["timesteps"] = [1.0] * 10**6


def reordered(bundle: Any) -> None:
    """The manifest in another order and without its spaces: it says the same."""
    document = read_json(bundle / MANIFEST)
    (bundle / MANIFEST).write_text(json.dumps(dict(reversed(document.items()))))
    stamp(bundle)


def measured(bundle: Any) -> None:
    """Praise that belongs to another plan."""
    plan = read_json(bundle / PLAN)
    plan["measured"] = {
        "plan_sha256": "0" * 64,
        "seeds": [1],
        "psnr_db": 99.0,
        "fewer_steps": 4,
        "fewer_steps_psnr_db": 1.0,
    }
    write_json(bundle / PLAN, plan)
    manifest = read_json(bundle / MANIFEST)
    manifest["files"][PLAN] = record_of(bundle / PLAN)
    write_json(bundle / MANIFEST, manifest)
    stamp(bundle)


def unstamped(bundle: Any) -> None:
    """A plan and a bundle that fit, under an engine that was built from others."""
    edit(PLAN, lambda plan: plan["sampling"].update(guidance_scale=3.0), sealed=False)(bundle)
    edit(MANIFEST, lambda document: document["solver"].update(guidance_scale=3.0), sealed=False)(bundle)
    target = (bundle / BUILT).read_bytes()
    seal(bundle)
    (bundle / BUILT).write_bytes(target)


def tensor_header(header: Any, **changes: Any) -> Any:
    name = min(key for key in header if key != "__metadata__")
    return header | {name: header[name] | changes}


def shape_like(array: Any, value: float) -> Any:
    array.flat[array.size // 2] = value
    return array


def _declare(bundle: Any, size_bytes: int | None) -> None:
    document = read_json(bundle / MANIFEST)
    record = document["files"][WEIGHTS]
    document["files"][WEIGHTS] = (
        record | {"sha256": "x" * 10**6} if size_bytes is None else record | {"size_bytes": size_bytes}
    )
    write_json(bundle / MANIFEST, document)
    stamp(bundle)


VALUES: dict[str, tuple[str, Damage]] = {
    "guidance-negative": ("guidance -7", put(MANIFEST, "solver.guidance_scale", -7.0)),
    "guidance-huge": ("guidance 1e39", put(MANIFEST, "solver.guidance_scale", 1e39)),
    "guidance-elsewhere": ("another guidance than the plan's", put(MANIFEST, "solver.guidance_scale", 2.5)),
    "guidance-gone": ("guided graphs, and no guidance", put(MANIFEST, "solver.guidance_scale", None)),
    "guidance-text": ("a number as a string", put(MANIFEST, "solver.guidance_scale", "2.0")),
    "sigma-huge": ("first noise of 1e39", put(MANIFEST, "solver.init_noise_sigma", 1e39)),
    "sigma-zero": ("first noise of 0", put(MANIFEST, "solver.init_noise_sigma", 0.0)),
    "history": ("a solver that looks back 3 steps", put(MANIFEST, "solver.history", 3)),
    "history-huge": ("a solver that looks back 10^9 steps", put(MANIFEST, "solver.history", 10**9)),
    "batch-fixed": ("a fixed batch where the graphs take any", put(MANIFEST, "batch_size", 3)),
    "batch-huge": ("a batch of 2^31", put(MANIFEST, "batch_size", 2**31)),
    "batch-10^30": ("a batch of 10^30", put(MANIFEST, "batch_size", 10**30)),
    "latents-huge": ("latents of (4, 10^6, 10^6)", put(MANIFEST, "latent_shape", [4, 10**6, 10**6])),
    "latents-many-axes": ("latents of 70 axes", put(MANIFEST, "latent_shape", [1] * 70)),
    "latents-other": ("latents of other channels", put(MANIFEST, "latent_shape", [3, 8, 8])),
    "latents-empty": ("latents without axes", put(MANIFEST, "latent_shape", [])),
    "tensor-shape": ("an input of 10^9 rows", put(MANIFEST, "graphs.full.inputs.0.shape", ["model_batch", 10**9])),
    "tensor-negative": ("an input of -1 rows", put(MANIFEST, "graphs.full.inputs.0.shape", [-1, 4, 8, 8])),
    "tensor-axis": ("an axis that nobody knows", put(MANIFEST, "graphs.full.inputs.0.shape.0", "x")),
    "tensor-type": ("an input of objects", put(MANIFEST, "graphs.full.inputs.0.dtype", "object")),
    "tensor-type-empty": ("an input of no type", put(MANIFEST, "graphs.full.inputs.0.dtype", "")),
    "tensor-name": ("an input of another name", put(MANIFEST, "graphs.full.inputs.0.name", "x")),
    "tensor-twice": (
        "an input that is there twice",
        edit(
            MANIFEST,
            lambda document: document["graphs"]["full"]["inputs"].append(document["graphs"]["full"]["inputs"][0]),
        ),
    ),
    "no-inputs": ("a graph without inputs", put(MANIFEST, "graphs.full.inputs", [])),
    "no-outputs": ("a solver without outputs", put(MANIFEST, "graphs.solver.outputs", [])),
    "no-graphs": ("no graphs", put(MANIFEST, "graphs", {})),
    "graph-missing": ("a graph left out", edit(MANIFEST, without_graph)),
    "graph-renamed": ("a graph of a variant that is not", edit(MANIFEST, renamed_graph)),
    "graphs-swapped": ("two graphs' files swapped", edit(MANIFEST, swapped_graphs)),
    "classes": ("a label that is a picture", put(MANIFEST, "conditions.0.shape", [3, 3])),
    "condition-name": ("a condition with a name of the runtime's", put(MANIFEST, "conditions.0.name", "hidden_states")),
    "no-conditions": ("no conditions", put(MANIFEST, "conditions", [])),
    "precision": ("a precision that is not", put(MANIFEST, "precision", "fp99")),
    "format": ("a format of the future", put(MANIFEST, "format_version", 99)),
    "kind": ("a plan in a bundle's place", put(MANIFEST, "kind", "plan")),
    "unknown-key": ("a key that nobody knows", put(MANIFEST, "colour", "red")),
    "escape": ("escape sequences in a name", put(MANIFEST, "conditions.0.name", "\x1b[2J\x1b]0;owned\x07")),
    "right-to-left": ("a name that turns the line round", put(MANIFEST, "made_by", "\u202etxt.exe")),
    "surrogate": ("half a surrogate in a name", text(MANIFEST, lambda found: found.replace("tc-deploy", "\\ud800", 1))),
    "nan": (
        "NaN in JSON",
        text(MANIFEST, lambda found: found.replace('"guidance_scale": 2.0', '"guidance_scale": NaN')),
    ),
    "key-twice": ("a key twice in the manifest", first_key_twice(MANIFEST)),
    "deep": ("100,000 brackets", text(MANIFEST, lambda _: "[" * DEEP + "]" * DEEP)),
    "deep-value": (
        "100,000 brackets in a value",
        text(MANIFEST, lambda found: found.replace("{", '{"a": ' + "[" * DEEP + "]" * DEEP + ", ", 1)),
    ),
    "long-number": ("a number of 100,000 digits", text(MANIFEST, lambda found: found.replace("2.0", "9" * DEEP, 1))),
    "not-utf8": ("bytes that are no text", lambda bundle: (bundle / MANIFEST).write_bytes(b"\xff\xfe" * 100)),
    "empty": ("an empty manifest", lambda bundle: (bundle / MANIFEST).write_bytes(b"")),
    "list": ("a list for a manifest", lambda bundle: (bundle / MANIFEST).write_text("[]")),
    "weights-size": ("10 GB declared of the weights", lambda bundle: _declare(bundle, TEN_GB)),
    "weights-negative": ("-1 bytes declared of the weights", lambda bundle: _declare(bundle, -1)),
    "weights-sha-long": ("a checksum that is none", lambda bundle: _declare(bundle, None)),
    "built-option": ("an option that the engine has not", put(BUILT, "options.x", 1)),
    "built-threads": ("a thread count in words", put(BUILT, "options.threads", "many")),
    "built-threads-huge": ("10^9 threads", put(BUILT, "options.threads", 10**9)),
    "built-threads-negative": ("-1 threads", put(BUILT, "options.threads", -1)),
    "built-provider": ("a list for a provider", put(BUILT, "options.provider", ["cpu"])),
    "built-provider-missing": ("a provider that is not there", put(BUILT, "options.provider", "cuda")),
    "built-backend": ("another engine's manifest", put(BUILT, "backend", "openvino")),
    "built-key-twice": ("a key twice in an engine's manifest", first_key_twice(BUILT)),
    "built-from-another": ("an engine that was built from another plan", unstamped),
    "plan-interval": ("an interval edited", put(PLAN, "schedule.cache_interval_late", 1)),
    "plan-list": ("a list of other steps", put(PLAN, "schedule", {"variants": "F F F F F F F F F c2"})),
    "plan-list-cached-first": ("a list that begins cached", put(PLAN, "schedule", {"variants": "c1" + " F" * 9})),
    "plan-list-unknown": ("a list with an unknown step", put(PLAN, "schedule", {"variants": "F c9" + " F" * 8})),
    "plan-list-long": ("a list of a million steps", put(PLAN, "schedule", {"variants": "F " * 10**6})),
    "plan-phase-start": ("the start of phase 2 moved", put(PLAN, "schedule.phase_start", 6)),
    "plan-phase-start-beyond": ("a start of phase 2 beyond the steps", put(PLAN, "schedule.phase_start", 99)),
    "plan-forecast": ("forecast_order edited", put(PLAN, "cache.forecast_order", 2)),
    "plan-keep": ("keep_counts edited", put(PLAN, "cache.keep_counts.0.1", 8)),
    "plan-keep-beyond": ("more tokens kept than there are", put(PLAN, "cache.keep_counts.0.1", 10**6)),
    "plan-keep-negative": ("-8 tokens kept", put(PLAN, "cache.keep_counts.0.1", -8)),
    "plan-skip": (
        "skip = model in a plan whose phases all keep tokens, where it says nothing",
        put(PLAN, "cache.skip", "model"),
    ),
    "plan-tokens": ("10^9 tokens", put(PLAN, "model.tokens", 10**9)),
    "plan-blocks": ("10^9 blocks", put(PLAN, "model.blocks", 10**9)),
    "plan-steps-short": ("fewer steps than timesteps", put(PLAN, "schedule.steps", 9)),
    "plan-million-steps": ("10^6 steps, in earnest", edit(PLAN, million_steps)),
    "plan-billion-steps": ("10^9 steps", put(PLAN, "schedule.steps", 10**9)),
    "plan-timestep": ("a timestep edited", put(PLAN, "sampling.timesteps.3", 1.0)),
    "plan-timestep-huge": ("a timestep of 1e300", put(PLAN, "sampling.timesteps.3", 1e300)),
    "plan-key-twice": ("a key twice in the plan", first_key_twice(PLAN)),
    "plan-praise": ("a measurement of another plan", measured),
    "plan-text": ("a step count as a string", put(PLAN, "schedule.steps", "10")),
    "plan-escape": ("escape sequences in the model's name", put(PLAN, "model.source", "\x1b]8;;http://x\x07here")),
    "plan-guidance": ("another guidance than the manifest's", put(PLAN, "sampling.guidance_scale", 7.0)),
    "table-nan": (
        "NaN in a table of the solver",
        with_array(RUNTIME_TABLES, "coefficients", lambda a: shape_like(a, np.nan)),
    ),
    "table-inf": ("infinity in a table", with_array(RUNTIME_TABLES, "input_scale", lambda a: shape_like(a, np.inf))),
    "table-timesteps": ("other timesteps than the plan's", with_array(RUNTIME_TABLES, "timesteps", lambda a: a + 1)),
    "table-short": ("a table of fewer steps", with_array(RUNTIME_TABLES, "coefficients", lambda a: a[:-1])),
    "table-wide": ("a table that is wider", with_array(RUNTIME_TABLES, "coefficients", lambda a: np.hstack([a, a]))),
    "table-flat": ("a table of one number", with_array(RUNTIME_TABLES, "timesteps", lambda _: np.float32(1))),
    "table-float64": ("a table in float64", with_array(RUNTIME_TABLES, "input_scale", lambda a: a.astype(np.float64))),
    "table-int": ("a table of whole numbers", with_array(RUNTIME_TABLES, "coefficients", lambda a: a.astype(np.int32))),
    "table-past": (
        "a step that reads before the first",
        with_array(RUNTIME_TABLES, "coefficients", lambda a: np.hstack([a[:, ::-1], a])),
    ),
    "table-gone": ("a table left out", with_header(RUNTIME_TABLES, lambda header: header.pop("timesteps") and None)),
    "table-10-gb": (
        "a table of 10 GB declared",
        with_header(
            RUNTIME_TABLES, lambda header: tensor_header(header, shape=[TEN_GB // 4], data_offsets=[0, TEN_GB])
        ),
    ),
    "index-beyond": ("a token index beyond the tokens", with_array(TABLES, "token_index_1", lambda a: a + 16)),
    "index-negative": ("a negative token index", with_array(TABLES, "token_index_1", lambda a: a - 16)),
    "index-unsorted": ("token indices that do not ascend", with_array(TABLES, "token_index_1", lambda a: a[:, ::-1])),
    "index-wide": ("a token index of int64", with_array(TABLES, "token_index_1", lambda a: a.astype(np.int64))),
    "index-rows": ("a token index of fewer steps", with_array(TABLES, "token_index_1", lambda a: a[:-1])),
    "header-8-bytes": ("a header length of 2^63", with_header(RUNTIME_TABLES, lambda header: None, 2**63)),
    "header-all-ones": ("a header length of 2^64 - 1", with_header(RUNTIME_TABLES, lambda header: None, -1)),
    "header-10-gb": ("a header of 10 GB declared", with_header(TABLES, lambda header: None, TEN_GB)),
    "header-short": ("a header length one short", with_header(TABLES, lambda header: None, 40)),
    "header-no-json": ("a header that is no JSON", with_header(TABLES, lambda _: b"{{{{")),
    "header-deep": ("a header of 10,000 brackets", with_header(TABLES, lambda _: b"[" * 10_000 + b"]" * 10_000)),
    "header-negative": (
        "negative offsets",
        with_header(RUNTIME_TABLES, lambda header: tensor_header(header, data_offsets=[-40, 0])),
    ),
    "header-overlap": (
        "tensors that overlap",
        with_header(RUNTIME_TABLES, lambda header: tensor_header(header, data_offsets=[4, 84])),
    ),
    "header-beyond": (
        "a tensor that ends beyond the file",
        with_header(TABLES, lambda header: tensor_header(header, data_offsets=[0, TEN_GB], shape=[TEN_GB // 4])),
    ),
    "header-overflow": (
        "a shape whose product overflows",
        with_header(TABLES, lambda header: tensor_header(header, shape=[2**32, 2**32, 2**32])),
    ),
    "header-type": (
        "a tensor of a type that is not",
        with_header(RUNTIME_TABLES, lambda header: tensor_header(header, dtype="F99")),
    ),
    "header-bfloat16": (
        "a tensor of bfloat16",
        with_header(RUNTIME_TABLES, lambda header: tensor_header(header, dtype="BF16", shape=[20])),
    ),
}

QUICK = frozenset({"guidance-negative", "key-twice", "plan-interval", "table-nan", "header-10-gb", "deep", "escape"})
"""They run by default."""
