"""Where a plan comes from and how to make it again, as pairs of a term and what belongs to it.

In: a :class:`Source`. Out: facts for the report's last section. Never: asks the machine that draws the report.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from tc_deploy import __version__
from tc_deploy.plan import Plan, PromptsRecord, TextsRecord, plan_sha256
from tc_deploy.report.source import Source


@dataclass(frozen=True, kw_only=True)
class Fact:
    """A line of the provenance."""

    term: str
    text: str
    is_code: bool = False
    """Whether it is to be copied letter by letter: a hash, a command, settings."""


def facts_from_source(source: Source) -> tuple[Fact, ...]:
    """Everything that a reader needs to judge the figures and to make them again."""
    return (*_plan_facts(source.plan), *_search_facts(source), *_bundle_facts(source), *_making(source))


def _plan_facts(plan: Plan) -> list[Fact]:
    model, sampling = plan.model, plan.sampling
    guidance = "no guidance" if sampling.guidance_scale is None else f"guidance {sampling.guidance_scale:g}"
    cache = plan.cache
    facts = [
        Fact(
            term="model",
            text=f"{model.model_class}, {model.blocks} blocks, {model.tokens} tokens, width {model.width}",
        ),
        Fact(term="found in", text=model.source),
        Fact(term="SHA-256 of its weights", text=model.weights_sha256, is_code=True),
        Fact(term="SHA-256 of the plan", text=plan_sha256(plan), is_code=True),
        Fact(term="SHA-256 of its tables", text=plan.tables.sha256, is_code=True),
        Fact(term="scheduler", text=f"{sampling.scheduler_class}, {plan.schedule.steps} steps, {guidance}"),
        Fact(term="scheduler's settings", text=_on_one_line(sampling.scheduler_config), is_code=True),
        Fact(
            term="cache",
            text=f"reuse {cache.reuse}, attention {cache.attention}, forecast order {cache.forecast_order},"
            f" skips the {cache.skip} where nothing is kept",
        ),
        Fact(term="chosen by", text=f"{plan.origin.method}, seed {plan.origin.seed}"),
        Fact(term="settings of that", text=_on_one_line(plan.origin.settings), is_code=True),
    ]
    if (fit := plan.forecast) is not None:
        text = f"fitted on {fit.samples} seeds, {fit.first_seed} to {fit.first_seed + fit.samples - 1}, in PyTorch,"
        text += f" {fit.target_in_words}"
        facts.append(Fact(term="forecast weights", text=text))
    seeds = () if plan.measured is None else plan.measured.seeds
    if seeds:
        text = f"{len(seeds)} seeds, {min(seeds)} to {max(seeds)}, in PyTorch"
        facts.append(Fact(term="calibration's measurement", text=text))
    return facts


def _search_facts(source: Source) -> list[Fact]:
    search = source.search
    if search is None:
        return []
    return [
        Fact(term="hardware", text=search.hardware),
        Fact(term="backend", text=f"{search.backend} {search.backend_version}, batch {search.batch_size}"),
        Fact(term="latencies", text="measured" if search.latency_source == "measured" else "estimated from FLOPs"),
        Fact(term="search's seeds", text=f"{search.confirmation_seeds} to judge by; the search's own is {search.seed}"),
        Fact(term="points", text=str(len(search.points))),
        Fact(term="searched", text=f"{search.date}, by {search.made_by}"),
        Fact(term="search's settings", text=_on_one_line(search.settings), is_code=True),
    ]


def _bundle_facts(source: Source) -> list[Fact]:
    manifest = source.manifest
    if manifest is None:
        return []
    batch = "any" if manifest.batch_size is None else str(manifest.batch_size)
    facts = [Fact(term="bundle", text=f"{manifest.precision}, batch {batch}, exported by {manifest.made_by}")]
    for name, graph in manifest.graphs.items():
        error = "not compared" if graph.max_abs_error is None else f"within {graph.max_abs_error:.1e} of PyTorch"
        facts.append(Fact(term=f"graph {name}", text=error))
    for target in source.targets:
        text = f"{target.backend} {target.backend_version}, {target.computes_in}, {target.options_in_words}"
        text += f", built by {target.made_by}"
        facts.append(Fact(term="engines", text=text))
    return facts


def _making(source: Source) -> list[Fact]:
    command = "tc-deploy {} RECIPE -o calibration/NAME"
    drawn = Fact(term="page drawn by", text=f"tc-deploy {__version__}")
    # Of a search's recipe the settings stand beside it; a bundle of its plan holds no search.
    if source.search is not None or source.plan.origin.method in ("search", "baseline"):
        return [Fact(term="made again with", text=command.format("plan"), is_code=True), drawn]
    return [
        Fact(term="its recipe", text=toml_from_plan(source.plan), is_code=True),
        Fact(term="made again with", text=command.format("calibrate"), is_code=True),
        drawn,
    ]


def toml_from_plan(plan: Plan) -> str:
    """The recipe that makes a plan of calibration's, every setting in it written out."""
    sampling, cache, settings = plan.sampling, plan.cache, plan.origin.settings
    guidance = {"guidance_scale": sampling.guidance_scale}
    if sampling.true_cfg:
        guidance = {"guidance_scale": sampling.embedded_guidance, "true_cfg_scale": sampling.guidance_scale}
    tables: dict[str, dict[str, Any]] = {
        "sampling": {"num_inference_steps": plan.schedule.steps, **guidance},
        "schedule": plan.schedule.model_dump(exclude={"steps"}),
        "cache": cache.model_dump(mode="json", exclude={"keep_counts"}),
        "forecast": {"fit_samples": 0}
        if plan.forecast is None
        else {"fit_samples": plan.forecast.samples, "target": plan.forecast.target.value},
        "measure": {"samples": 0 if plan.measured is None else len(plan.measured.seeds)},
    }
    if sampling.set_timesteps_kwargs:
        tables["sampling"]["set_timesteps_kwargs"] = sampling.set_timesteps_kwargs
    match settings:
        case {"keep_ratio": ratio, "multiple": multiple, "predictor": {**predictor}}:
            tables["cache"] |= {"keep_ratio": ratio, "multiple": multiple}
            tables["predictor"] = {str(key): value for key, value in predictor.items()}
        case _:
            tables["cache"]["keep_counts"] = cache.keep_counts
    lines = [f"model = {_toml(plan.model.source)}  # relative to this file", f"seed = {plan.origin.seed}"]
    given = {
        "latent_size": plan.model.latent_size,
        "text_tokens": plan.model.text_tokens,
        "variant": plan.model.variant,
        **_conditions(plan),
    }
    lines += [f"{key} = {_toml(value)}" for key, value in given.items() if value is not None]
    for name, table in tables.items():
        lines += ["", f"[{name}]", *(f"{key} = {_toml(value)}" for key, value in table.items() if value is not None)]
    return "\n".join(lines) + "\n"


def _conditions(plan: Plan) -> dict[str, Any]:
    """What a plan was made on, as a recipe says it."""
    match plan.origin.conditions:
        case TextsRecord() as texts:
            return {"prompts": texts.prompts, "negative_prompt": texts.negative_prompt or None}
        case PromptsRecord() as prompts:
            return {"conditions": prompts.file}
        case conditions:
            return {"conditions": conditions}


def _toml(value: Any) -> str:
    """A JSON value as TOML writes it."""
    match value:
        case dict():
            pairs = [f"{_toml(str(key))} = {_toml(item)}" for key, item in value.items() if item is not None]
            return f"{{{', '.join(pairs)}}}"
        case list() | tuple():
            return f"[{', '.join(map(_toml, value))}]"
        case _:
            # JSON's scalars are TOML's too, but for one character that TOML wants escaped.
            return json.dumps(value, ensure_ascii=False, allow_nan=False).replace("\x7f", "\\u007f")


def _on_one_line(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
