"""One target under atheris: ``python run_atheris.py TARGET SEEDS [libFuzzer's arguments]``.

atheris counts which branches a document reaches and keeps those that reach new ones. It ends at the first finding,
which it saves where ``-artifact_prefix`` says.
"""

from __future__ import annotations

import logging
import random
import sys
import tempfile
from pathlib import Path

import atheris

sys.path.insert(0, str(Path(__file__).parents[1]))

with atheris.instrument_imports(include=["tc_deploy"]):
    from fuzz.mutations import mutated
    from fuzz.targets import targets

logging.disable()
name, seeds, *arguments = sys.argv[1:]
target = targets(Path(seeds), Path(tempfile.mkdtemp(prefix="fuzz-")))[name]


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Nearly right documents mostly, and libFuzzer's bytes."""
    chance = random.Random(seed)
    if chance.random() < 0.2:
        return bytes(atheris.Mutate(data, max_size))
    return mutated(target.kind, data or target.seeds[0], chance)[:max_size]


atheris.Setup([sys.argv[0], *arguments], target.run, custom_mutator=mutate)
atheris.Fuzz()
