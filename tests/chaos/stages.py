"""The commands that are stopped, with what each finds when it starts and what it is to leave."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import diffusers
from chaos.commands import Commands, Ended, Tree, part, tree
from zoo import randomise

MODEL = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "num_layers": 1,
    "in_channels": 3,
    "out_channels": 6,
    "sample_size": 4,
    "patch_size": 2,
    "num_embeds_ada_norm": 4,
}
RECIPE = """
model = "model"

[sampling]
num_inference_steps = 4
guidance_scale = 1.5

[cache]
multiple = 2
keep_ratio = [0.5, 0.5]

[predictor]
trajectories = 2
iterations = 2
batch_size = 2

[measure]
samples = 2

[search]
full_steps = [0.25, 0.75]
keep_ratio = [0.5]
confirmation_samples = 2
latency_rounds = 2
baselines = "none"
"""
BY_HAND = (
    "--phase-start",
    4,
    "--cache-interval-early",
    2,
    "--cache-interval-late",
    1,
    "--keep-counts",
    "0",
    "0",
    "--samples",
    0,
)
PLAN = ("calibrate", "model", "--steps", 4, *BY_HAND)
OTHER_PLAN = ("calibrate", "model", "--steps", 6, *BY_HAND)
SEARCH = ("plan", "recipe.toml", "-o", "cal", "--from-flops", "--target-psnr", 0)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A command in a folder."""

    name: str
    words: tuple[object, ...]
    output: str
    """What it writes, in its working directory."""
    found: Mapping[str, str] = field(default_factory=dict)
    """What lies there when it starts: names of what :class:`Inputs` holds, by their place."""
    goes_on: bool = False
    """Whether it keeps its state when it is stopped, to go on."""

    @property
    def replaces(self) -> bool:
        """Whether something lies where its output goes."""
        return self.output.partition("/")[0] in self.found and self.name.endswith((" over", " again"))


_CALIBRATE = ("calibrate", "recipe.toml", "-o", "cal")
_EXPORT = ("export", "cal", "-o", "bundle")
_BUILD = ("build", "bundle", "--threads", 1)
_IMAGE = ("generate", "bundle", "--class-label", 1, "-o", "made/x.png")
_LATENTS = ("generate", "bundle", "--class-label", 1, "--full", "-o", "x.safetensors")
_REPORT = ("report", "cal", "-o", "report.html")
_MODEL = {"model": "model", "recipe.toml": "recipe.toml"}

STAGES = {
    stage.name: stage
    for stage in (
        Stage(name="calibrate", words=_CALIBRATE, output="cal", found=_MODEL, goes_on=True),
        Stage(name="calibrate over", words=_CALIBRATE, output="cal", found={**_MODEL, "cal": "other"}, goes_on=True),
        Stage(name="plan", words=SEARCH, output="cal", found=_MODEL, goes_on=True),
        Stage(name="plan again", words=("plan", "cal", "--target-psnr", 45), output="cal", found={"cal": "search"}),
        Stage(name="export", words=_EXPORT, output="bundle", found={"model": "model", "cal": "plan"}),
        Stage(
            name="export over", words=_EXPORT, output="bundle", found={"model": "model", "cal": "plan", "bundle": "old"}
        ),
        Stage(name="build", words=_BUILD, output="bundle/onnxruntime", found={"bundle": "exported"}),
        Stage(name="build over", words=_BUILD, output="bundle/onnxruntime", found={"bundle": "built"}),
        Stage(name="report", words=_REPORT, output="report.html", found={"cal": "search"}),
        Stage(name="report over", words=_REPORT, output="report.html", found={"cal": "search", "report.html": "page"}),
        Stage(name="generate", words=_IMAGE, output="made/x.png", found={"bundle": "built"}),
        Stage(
            name="generate over",
            words=_LATENTS,
            output="x.safetensors",
            found={"bundle": "built", "x.safetensors": "x.safetensors"},
        ),
    )
}


class Inputs:
    """What stages find: made once, by the commands themselves, and copied into each test's folder.

    Args:
        folder: where it is made.
        commands: what makes it.
    """

    def __init__(self, folder: Path, commands: Commands) -> None:
        self.folder, self._commands = folder, commands
        module = diffusers.DiTTransformer2DModel(**MODEL)
        randomise(module, 0)
        module.save_pretrained(folder / "model" / "transformer")
        diffusers.DDIMScheduler(num_train_timesteps=1000, clip_sample=False).save_pretrained(
            folder / "model" / "scheduler"
        )
        (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")

    def path(self, name: str) -> Path:
        """One of them, which is made when it is first asked for."""
        path = self.folder / name
        if path.exists():
            return path
        match name:
            case "plan" | "other":
                self._do(*(PLAN if name == "plan" else OTHER_PLAN), "-o", name)
            case "search":
                self._do("plan", "recipe.toml", "-o", name, "--from-flops", "--target-psnr", 0)
            case "exported":
                self._do("export", self.path("plan").name, "-o", name)
            case "built":
                shutil.copytree(self.path("exported"), path)
                self._do("build", name, "--threads", 2)
            case "old":
                self._do("export", self.path("other").name, "-o", name)
                self._do("build", name, "--threads", 2)
            case "x.safetensors":
                self._do("generate", self.path("built").name, "--class-label", 2, "-o", name)
            case "page":
                self._do("report", self.path("plan").name, "-o", name)
            case _:
                raise ValueError(f"unknown input {name!r}")
        return path

    def _do(self, *words: object) -> None:
        ended = self._commands.run(self.folder, *words)
        if ended.code != 0:
            raise RuntimeError(f"{' '.join(map(str, words))}: exit code {ended.code}: {ended.err}")

    def lay(self, stage: Stage, arena: Path) -> None:
        """Make an arena anew, with what a stage finds."""
        for path in arena.iterdir() if arena.exists() else ():
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        arena.mkdir(exist_ok=True)
        for place, name in stage.found.items():
            source = self.path(name)
            (shutil.copytree if source.is_dir() else shutil.copy2)(source, arena / place)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A stage that nothing stopped."""

    stage: Stage
    before: Tree
    after: Tree
    ended: Ended

    def state_of(self, now: Tree) -> str:
        """What the output is: ``new``, ``old``, ``none``, or ``other``."""
        output = part(now, self.stage.output)
        if output == part(self.after, self.stage.output):
            return "new"
        if output == part(self.before, self.stage.output):
            return "old" if output else "none"
        return "other" if output else "none"

    def left_behind(self, now: Tree) -> list[str]:
        """What is neither output nor input, in a stopped stage's folder."""
        known = self.before.keys() | part(now, self.stage.output).keys()
        return sorted(name for name in now.keys() - known if not self.is_state(name))

    def is_state(self, name: str) -> bool:
        """Whether a path belongs to what a stopped stage keeps to go on with, as it promises."""
        return self.stage.goes_on and name.partition("/")[0] == f".{self.stage.output}.tc-deploy"


def reference(stage: Stage, inputs: Inputs, arena: Path, commands: Commands) -> Reference:
    """Run a stage to its end.

    Raises:
        RuntimeError: it failed.
    """
    inputs.lay(stage, arena)
    before = tree(arena)
    ended = commands.run(arena, *stage.words)
    if ended.code != 0:
        raise RuntimeError(f"{stage.name}: exit code {ended.code}: {ended.err}")
    return Reference(stage=stage, before=before, after=tree(arena), ended=ended)
