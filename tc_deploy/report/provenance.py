"""Where a plan comes from and how to make it again, as pairs of a term and what belongs to it.

In: a :class:`Source`. Out: facts for the report's last section. Never: asks the machine that draws the report.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from typing import Any

from tc_deploy import __version__
from tc_deploy.plan import Plan, plan_sha256
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
    seeds = () if plan.measured is None else plan.measured.seeds
    if seeds:
        text = f"{len(seeds)} seeds, {min(seeds)} to {max(seeds)}, in PyTorch"
        facts.append(Fact(term="calibration's measurement", text=text))
    return facts


def _search_facts(source: Source) -> list[Fact]:
    search = source.search
    if search is None:
        return []
    seeds = f"{search.screening_seeds} to screen, {search.confirmation_seeds} others to confirm; the search's own seed"
    return [
        Fact(term="hardware", text=search.hardware),
        Fact(term="backend", text=f"{search.backend} {search.backend_version}, batch {search.batch_size}"),
        Fact(term="latencies", text="measured" if search.latency_source == "measured" else "estimated from FLOPs"),
        Fact(term="search's seeds", text=f"{seeds} is {search.seed}"),
        Fact(term="candidates", text=f"{len(search.screened)} screened, {len(search.points)} points confirmed"),
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
        text = f"{target.backend} {target.backend_version}, built by {target.made_by}"
        facts.append(Fact(term="engines", text=text))
    return facts


def _making(source: Source) -> list[Fact]:
    return [
        Fact(term="made again with", text=command_from_source(source), is_code=True),
        Fact(term="page drawn by", text=f"tc-deploy {__version__}"),
    ]


def command_from_source(source: Source) -> str:
    """The command line that makes this plan; a search's recipe has the settings that are printed beside it."""
    if source.search is not None:
        return shlex.join(["tc-deploy", "plan", "RECIPE", "-o", "calibration/NAME"])
    plan = source.plan
    schedule, cache, settings = plan.schedule, plan.cache, plan.origin.settings
    words: list[object] = ["tc-deploy", "calibrate", plan.model.source, "-o", "calibration/NAME"]
    words += ["--steps", schedule.steps, "--boundary", schedule.boundary, "--k1", schedule.k1, "--k2", schedule.k2]
    if plan.sampling.guidance_scale is not None:
        words += ["--guidance-scale", plan.sampling.guidance_scale]
    match settings:
        case {"keep_ratio": [first, second], "predictor": {"iterations": iterations}}:
            words += ["--keep-ratio", first, second, "--iterations", iterations]
        case _:
            words += ["--keep-counts", *(",".join(map(str, counts)) for counts in cache.keep_counts)]
    words += ["--reuse", cache.reuse, "--attention", cache.attention, "--skip", cache.skip]
    words += ["--forecast-order", cache.forecast_order, "--seed", plan.origin.seed]
    words += ["--samples", 0 if plan.measured is None else len(plan.measured.seeds)]
    return shlex.join(str(word) for word in words)


def _on_one_line(settings: dict[str, Any]) -> str:
    return json.dumps(settings, sort_keys=True, ensure_ascii=False, allow_nan=False)
