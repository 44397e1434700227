"""Graphs that other bundles hold: what need not be exported again.

In: bundles of the model that is being exported. Out: their full and cached graphs by what they compute, and what their
manifests say of each. Never: takes one of another precision or batch, or checks it anew.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from tc_deploy.consistency import read_documents
from tc_deploy.errors import UsageError
from tc_deploy.export.options import ExportOptions
from tc_deploy.manifest import GraphRecord, variant_name
from tc_deploy.models.family import DiffusionTransformer
from tc_deploy.plan import Plan
from tc_deploy.tokencache.graphs import ModelGraph, step_graphs

GraphKey: TypeAlias = tuple[Hashable, ...]


@dataclass(frozen=True, kw_only=True)
class TakenGraph:
    """A graph of another bundle."""

    path: Path
    record: GraphRecord
    """As that bundle's manifest names it."""


def key_of(graph: ModelGraph, variant: int) -> GraphKey:
    """What a variant computes, and of how many tokens where its graph leaves that open."""
    return graph.identity, tuple(group.size(variant) for group in graph.groups)


def taken_graphs(
    bundles: Iterable[Path], model: DiffusionTransformer, plan: Plan, options: ExportOptions
) -> dict[GraphKey, TakenGraph]:
    """Find the graphs of some bundles.

    Args:
        bundles: which nobody changes meanwhile.
        model: the model.
        plan: that is being exported.
        options: how.

    Raises:
        UsageError: a bundle is of another model, batch or precision, has a LoRA or a prologue, or one graph where
            several are wanted.
    """
    found: dict[GraphKey, TakenGraph] = {}
    for bundle in bundles:
        documents = read_documents(bundle)
        manifest, other = documents.manifest, documents.plan
        blocks = set(manifest.fp32_blocks)
        has = (other.model, manifest.loras, manifest.batch_size, manifest.precision, blocks, manifest.one_graph)
        cut = manifest.has_prologue
        blocks = set(options.fp32_blocks)
        if cut or has != (plan.model, (), options.batch_size, options.precision, blocks, options.one_graph):
            raise UsageError(
                f"{bundle}: its graphs are of another model, another batch or precision, or one graph where there"
                " should be several, or they read a prologue of its own; export anew"
            )
        graphs = step_graphs(model, other.cache, other.phases_used(), one_graph=manifest.one_graph)
        for variant, graph in graphs.items():
            record = manifest.graphs[variant_name(variant)]
            found.setdefault(key_of(graph, variant), TakenGraph(path=bundle / record.file, record=record))
    return found
