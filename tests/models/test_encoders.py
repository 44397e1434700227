"""Prompts encoded in PyTorch, against encode_prompt of the real pipeline."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import zoo
from text_pipelines import CASES, PROMPTS, geometry_of, save

from tc_deploy.models.components import PipelineFolder
from tc_deploy.models.encoders import ROWS, encoded, text_plan


@pytest.mark.parametrize("name", CASES)
def test_conditions_are_those_of_encode_prompt(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    pipe = case.make(zoo.model(case.model).module)
    save(pipe, tmp_path / "pipeline")
    folder = PipelineFolder(tmp_path / "pipeline", "text encoders")
    # More than an encoder reads at once.
    prompts = [f"{prompt} {number}" for number in range(3) for prompt in PROMPTS]
    assert len(prompts) > ROWS
    said: list[str] = []
    found = encoded(folder, text_plan(folder, case.family, geometry_of(case)), prompts, said.append)
    with torch.no_grad():
        expected = case.encode(pipe, prompts)
    assert found.keys() == expected.keys()
    for condition, tensor in expected.items():
        torch.testing.assert_close(found[condition], tensor.float(), rtol=0, atol=1e-6)
    assert said[0] == f"encoding {len(prompts)} texts with text_encoder"
