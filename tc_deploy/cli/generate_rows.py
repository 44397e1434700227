"""``tc-deploy generate --input``: a file of requests to a folder of pictures, here or through Ray."""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING

import click

from tc_deploy.bundle import MANIFEST, canonical_json, reading, sha256_of_file
from tc_deploy.cli.progress import progress_bar
from tc_deploy.errors import UsageError, counted
from tc_deploy.manifest import BUNDLE_FOLDER, read_manifest
from tc_deploy.plan import places_read

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from tc_deploy.scale.rows import Made, Row
    from tc_deploy.scale.worker import Workers

LOG = logging.getLogger(__name__)
DEFAULT_SLOTS = 8


def generate_rows(
    file: Path,
    output: Path,
    bundle: Path,
    *,
    backend: str | None,
    batch_size: int | None,
    require_signature: Path | None,
    seed: int,
    ray: bool,
    count: int | None,
    as_json: bool,
) -> None:
    """Do the rows of a file that are not done.

    Args:
        file: a request a line.
        output: the folder.
        bundle: ``engines/NAME``.
        backend: which of its targets.
        batch_size: pictures that one engine makes at a time.
        require_signature: a public key, whose holder must have signed the bundle.
        seed: of the first line.
        ray: whether Ray spreads the rows.
        count: over so many engines.
        as_json: how what was done is said.

    Raises:
        TcDeployError: nothing could be done, or some rows could not.
    """
    from tc_deploy.scale.rows import read_rows, results_in
    from tc_deploy.scale.worker import Workers
    from tc_deploy.serving.maker import picture_size

    with reading(bundle, BUNDLE_FOLDER):
        manifest = read_manifest(bundle)
        bundle_id = sha256_of_file(bundle / MANIFEST)[:16]
    slots = batch_size or max(DEFAULT_SLOTS, manifest.batch_size or 1)
    workers = Workers(path=bundle.absolute(), backend=backend, slots=slots, require_signature=require_signature)
    rows, bad = read_rows(file, manifest, picture_size(bundle, manifest), seed)
    reads = [*places_read(bundle), file]
    reads += [] if require_signature is None else [require_signature]
    start_s = time.perf_counter()
    with results_in(output, bundle_id, reads=reads) as results:
        left = results.left(rows)
        for line, words in bad:
            LOG.warning("%s:%s: %s", file, line, words)
        by_line = {row.line: row for row in left}
        with progress_bar() as report:
            for number, made in enumerate(_made(left, workers, ray=ray, count=count) if left else (), start=1):
                if made.error is None:
                    results.write(by_line[made.line], made.pictures)
                else:
                    LOG.warning("%s:%s: %s", file, made.line, made.error)
                    bad.append((made.line, made.error))
                report("rows", number, len(left))
    skipped, failed = len(rows) - len(left), sorted(line for line, _ in bad)
    done = len(left) - sum(line in by_line for line in failed)
    seconds = time.perf_counter() - start_s
    if as_json:
        facts = {"folder": str(output), "made": done, "skipped": skipped, "failed": failed, "elapsed_s": seconds}
        click.echo(canonical_json(facts), nl=False)
    else:
        click.echo(f"{output}: {counted(done, 'row')} made, {skipped} skipped, {seconds:.2f} s")
    if bad:
        line, words = min(bad)
        raise UsageError(
            f"{file}: {counted(len(bad), 'row')} could not be made, the first is line {line}: {words}; mend them and"
            " run it again: what is done is skipped"
        )


def _made(rows: Sequence[Row], workers: Workers, *, ray: bool, count: int | None) -> Iterator[Made]:
    if ray:
        from tc_deploy.scale.ray_data import made_with_ray

        yield from made_with_ray(rows, workers, count)
        return
    from tc_deploy.scale.worker import RowMaker

    with RowMaker(workers) as maker:
        yield from maker.made(rows)
