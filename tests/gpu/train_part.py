"""Training of the second demo model, the emoji DiT, while there is time; the weights come back with the numbers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from typing import Any

from gpu.parts import ROOT, Kit, Measurements

SCRIPT = ROOT / "examples" / "train_emoji_dit.py"
STAGES = (
    ("small", ("--image-size", "16", "--iterations", "12000", "--batch-size", "256"), 0.5),
    ("emoji-dit", ("--iterations", "8000", "--batch-size", "128"), 1.0),
)
"""By the folder that it writes, what a stage is told, and the share of the time left that it may take."""


def measurements(kit: Kit) -> Measurements:
    """The part's."""
    return {"the emoji model": lambda: emoji(kit)}


def emoji(kit: Kit) -> dict[str, Any]:
    """Train on few tokens, then on all, and bring the model back. A stage that ran out of time leaves what it has."""
    if kit.emoji is None:
        raise FileNotFoundError("the kit was packed without --emoji; say where npm's emoji-datasource-google lies")
    found: dict[str, Any] = {}
    before: tuple[str, ...] = ()
    for name, words, share in STAGES:
        folder = kit.work / name
        minutes = share * (kit.end - time.time()) / 60 - 0.1  # the sheet of samples takes seconds
        command = (sys.executable, str(SCRIPT), str(kit.emoji), "-o", str(folder), "--device", "cuda", *words, *before)
        ended = subprocess.run((*command, "--minutes", str(minutes)), check=False, capture_output=True, text=True)
        facts = folder / "training" / "training.json"
        if not facts.is_file():
            raise RuntimeError(ended.stderr.strip().splitlines()[-1])
        found[name] = json.loads(facts.read_text(encoding="utf-8"))
        shutil.copytree(folder, kit.output / name, ignore=shutil.ignore_patterns("state-*"), dirs_exist_ok=True)
        before = ("--start-from", str(folder))
    return found
