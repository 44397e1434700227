"""Packs what a bare machine with a GPU lacks into one folder: ``make gpu-kit``.

Such a machine is rented by the minute, has no network, and brings a Python of its own. The kit holds the wheels that it
lacks (resolved for Python 3.12 on Linux, less what ``machine.txt`` lists) and the demo's bundle, so that nothing is
resolved or exported there. Weights of a large model are made there by seed.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path

import click

from tc_deploy.backends.build import build_target
from tc_deploy.export.bundle_export import export_bundle
from tc_deploy.export.options import ExportOptions

ROOT = Path(__file__).parents[2]
PLAN = ROOT / "calibration" / "digits"
MACHINE = Path(__file__).with_name("machine.txt")
WHEELS, BUNDLE = "wheels", "digits"
EXTRAS = ("compile", "validate")
FOR = ("--python-version", "3.12", "--implementation", "cp", "--only-binary", ":all:")
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(17, 40)), "manylinux2014_x86_64")
LARGEST_MIB = 60
"""What travels to such a machine in one piece."""


def canonical(name: str) -> str:
    """A distribution's name as package indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def wanted() -> list[str]:
    """What the package and the extras for calibration and export ask for."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = (line for name in EXTRAS for line in project["optional-dependencies"][name])
    return sorted({*project["dependencies"], *extras})


def present() -> set[str]:
    """What the machine brings."""
    lines = MACHINE.read_text(encoding="utf-8").splitlines()
    return {canonical(line) for line in lines if line and not line.startswith("#")}


def pip(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "-q", "--disable-pip-version-check", *words], check=True)


def missing() -> list[str]:
    """What has to be carried, resolved for that Python under the project's constraints."""
    targets = [word for platform in PLATFORMS for word in ("--platform", platform)]
    with tempfile.TemporaryDirectory() as name:
        report = Path(name) / "report.json"
        constraints = ("-c", str(ROOT / ".ci" / "constraints.txt"))
        aim = ("--dry-run", "--ignore-installed", "--target", name, "--report", str(report))
        pip("install", *aim, *constraints, *FOR, *targets, *wanted())
        chosen = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
    there = present()
    # What only CUDA's builds of torch ask for comes with the machine's torch.
    return [
        f"{item['name']}=={item['version']}"
        for item in chosen
        if canonical(item["name"]) not in there and not canonical(item["name"]).startswith(("nvidia-", "cuda-"))
    ]


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--emoji",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    help="npm's emoji-datasource-google, unpacked: what the second demo model learns.",
)
def main(folder: Path, emoji: Path | None) -> None:
    """Write the kit to FOLDER, in the place of an earlier one."""
    if folder.exists() and not (folder / WHEELS).is_dir():
        raise click.ClickException(f"{folder} is there and is no kit; name another folder, or remove it")
    shutil.rmtree(folder, ignore_errors=True)
    targets = [word for platform in PLATFORMS for word in ("--platform", platform)]
    pip("download", "--no-deps", "-d", str(folder / WHEELS), *FOR, *targets, *missing())
    export_bundle(PLAN, folder / BUNDLE, ExportOptions(samples=False), progress=click.echo)
    build_target(folder / BUNDLE, "onnxruntime")
    if emoji is not None:
        shutil.copytree(emoji / "img/google/64", folder / "emoji/img/google/64")
        shutil.copy(emoji / "emoji.json", folder / "emoji")
    size_mib = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 2**20
    if size_mib > LARGEST_MIB:
        raise click.ClickException(f"{folder} takes {size_mib:.0f} MiB, and {LARGEST_MIB} may be carried")
    wheels = sorted(file.name.split("-")[0] for file in (folder / WHEELS).iterdir())
    click.echo(f"{folder}: {size_mib:.1f} MiB; wheels of {', '.join(wheels)}; the demo's bundle")


if __name__ == "__main__":
    main()
