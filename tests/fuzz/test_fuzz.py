"""Documents at random: nothing but a result or one of our errors, in one line. Found ones stay in ``corpus/``."""

from __future__ import annotations

import importlib.util
import logging
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import reliability
from bundles import Made
from diffusers_pipelines import tiny_tokenizer
from fuzz.mutations import mutated
from fuzz.targets import NAMES, TOKENS, Target, seed_folder, targets
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CORPUS = Path(__file__).parent / "corpus"
SECONDS = int(os.environ.get("FUZZ_SECONDS", "60"))
_RUNS = re.compile(r"Done (\d+) runs|^#(\d+)", re.MULTILINE)
COUNTS: dict[str, int] = {"findings": 0}


@pytest.fixture(scope="session")
def seeds(mixed: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.enable_truncation(TOKENS)
    tokenizer.enable_padding(length=TOKENS, pad_id=0, pad_token="<pad>")
    return seed_folder(mixed.bundle, tokenizer.to_str(), tmp_path_factory.mktemp("seeds"))


@pytest.fixture(scope="module")
def known(seeds: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Target]]:
    logging.disable()
    try:
        yield targets(seeds, tmp_path_factory.mktemp("fuzz"))
    finally:
        logging.disable(logging.NOTSET)


@pytest.fixture(scope="module", autouse=True)
def counted() -> Iterator[None]:
    start_s = time.monotonic()
    yield
    if len(COUNTS) > 1:
        reliability.record("fuzz", COUNTS, took_s=time.monotonic() - start_s)


@pytest.mark.parametrize("name", NAMES)
def test_a_good_document_is_accepted(known: dict[str, Target], name: str) -> None:
    assert all(known[name].run(seed) for seed in known[name].seeds)


@pytest.mark.parametrize("found", sorted(CORPUS.glob("*/*")), ids=lambda path: f"{path.parent.name}/{path.name}")
def test_what_was_found_is_mended(known: dict[str, Target], found: Path) -> None:
    known[found.parent.name].run(found.read_bytes())


def _once(target: Target, examples: int) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(st.integers(0, 2**64 - 1))
    def run(seed: int) -> None:
        chance = random.Random(seed)
        data = chance.choice(target.seeds)
        for _ in range(chance.choice((1, 1, 2))):
            data = mutated(target.kind, data, chance)
        target.run(data)

    run()


@pytest.mark.parametrize("name", NAMES)
def test_a_document_that_is_nearly_right_ends_in_a_result_or_in_an_error_of_ours(
    known: dict[str, Target], name: str
) -> None:
    _once(known[name], 60)


@pytest.mark.fuzz
@pytest.mark.parametrize("name", NAMES)
def test_a_minute_of_documents(known: dict[str, Target], seeds: Path, tmp_path: Path, name: str) -> None:
    if importlib.util.find_spec("atheris") is None:
        end_s, rounds, examples = time.monotonic() + SECONDS, 0, 500
        while time.monotonic() < end_s:
            COUNTS["findings"] += 1
            _once(known[name], examples)
            COUNTS["findings"] -= 1
            rounds += 1
        COUNTS[f"documents for {name}, by hypothesis"] = rounds * examples
        return
    first, artifacts = tmp_path / "first", CORPUS / name
    first.mkdir()
    artifacts.mkdir(exist_ok=True, parents=True)
    for number, seed in enumerate(known[name].seeds):
        (first / str(number)).write_bytes(seed)
    options = (f"-max_total_time={SECONDS}", "-timeout=20", "-rss_limit_mb=2048", "-max_len=65536")
    runner = Path(__file__).with_name("run_atheris.py")
    words = (sys.executable, runner, name, seeds, *options, f"-artifact_prefix={artifacts}/", first)
    ended = subprocess.run([str(word) for word in words], capture_output=True, text=True, errors="replace", check=False)
    if not any(artifacts.iterdir()):
        artifacts.rmdir()
    COUNTS["findings"] += ended.returncode != 0
    assert ended.returncode == 0, ended.stdout[-3000:] + ended.stderr[-6000:]
    runs = [int(done or step) for done, step in _RUNS.findall(ended.stderr + ended.stdout)]
    assert runs, ended.stderr[-3000:]
    COUNTS[f"documents for {name}, by atheris"] = max(runs)
