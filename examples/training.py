"""What the demo models' training scripts share: a loop that a kill does not lose, the loss curve, a sheet of samples.

In: a diffusers transformer and a function that gives the loss of an iteration.
Out: the moving average of the weights; the losses; PNGs.
Every random number is a function of (seed, iteration), so a resumed run ends in the weights of an unbroken one.
Never: imports tc_deploy. What stands here is the user's side of the demo.
"""

from __future__ import annotations

import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

WARMUP_ITERATIONS = 200
EMA_DECAY = 0.999
SAVE_EVERY = 250


def initialise(model: torch.nn.Module) -> None:
    """Initialise a ``DiTTransformer2DModel`` as the DiT paper does (adaLN-Zero) and leave it in evaluation mode.

    diffusers drops labels in training mode, but each block owns a label embedder and would drop on its own: a script
    drops the labels itself, once for all blocks.
    """
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    for block in model.transformer_blocks:
        torch.nn.init.zeros_(block.norm1.linear.weight)
    for head in (model.proj_out_1, model.proj_out_2):
        torch.nn.init.zeros_(head.weight)
    model.eval()


class State:
    """All that a resumed run needs: weights, their moving average, AdamW's moments, the losses so far."""

    def __init__(self, model: torch.nn.Module, peak_learning_rate: float) -> None:
        self.model = model
        self.peak = peak_learning_rate
        self.average = {name: value.detach().clone() for name, value in model.state_dict().items()}
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=peak_learning_rate, weight_decay=0.0)
        self.losses: list[float] = []

    def save(self, path: Path) -> None:
        tensors = {f"model/{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average/{name}": value for name, value in self.average.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer/{index}/{key}": value for key, value in moments.items()}
        tensors["losses"] = torch.tensor(self.losses, dtype=torch.float64)
        part = path.with_suffix(".part")
        save_file(tensors, part)
        part.replace(path)

    def load(self, path: Path) -> None:
        with safe_open(path, "pt", device=str(next(self.model.parameters()).device)) as file:
            stored = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
        part = {kind: {} for kind in ("model", "average", "optimizer")}
        for name, value in stored.items():
            kind, _, rest = name.partition("/")
            if kind in part:
                part[kind][rest] = value
        self.model.load_state_dict(part["model"])
        self.average = part["average"]
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in part["optimizer"].items():
            index, key = name.split("/")
            moments.setdefault(int(index), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": moments})
        self.losses = stored["losses"].tolist()

    def learn(self, loss: torch.Tensor, iterations: int) -> None:
        """One step of AdamW down ``loss``, warmed up and cosine-decayed over ``iterations``, and of the average."""
        iteration = len(self.losses)
        decay = 0.5 * (1 + math.cos(math.pi * iteration / iterations))
        for group in self.optimizer.param_groups:
            group["lr"] = self.peak * min(1.0, (iteration + 1) / WARMUP_ITERATIONS) * (0.98 * decay + 0.02)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        weight = 1 - min(EMA_DECAY, (iteration + 1) / (iteration + 10))
        for name, value in self.model.state_dict().items():
            self.average[name].lerp_(value, weight)
        self.losses.append(loss.item())


def train(
    state: State,
    loss_of: Callable[[int], torch.Tensor],
    iterations: int,
    checkpoint: Path,
    stop_after_s: float = math.inf,
) -> bool:
    """Train until ``iterations`` losses are behind ``state``; resume from ``checkpoint`` where it exists.

    Args:
        state: the model and its optimiser.
        loss_of: the loss of an iteration, by its number.
        iterations: how long the schedule of the learning rate is.
        checkpoint: written every 250 iterations, on SIGTERM and at the end.
        stop_after_s: save and return early after this many seconds.

    Returns:
        Whether training is complete.
    """
    if checkpoint.exists():
        state.load(checkpoint)
        print(f"resuming at iteration {len(state.losses)} from {checkpoint}")
    stopped = False

    def stop(*_: object) -> None:
        nonlocal stopped
        stopped = True

    signal.signal(signal.SIGTERM, stop)
    columns = (*Progress.get_default_columns()[:2], MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("loss {task.fields[loss]:.4f}")) as progress:
        task = progress.add_task("training", total=iterations, completed=len(state.losses), loss=math.nan)
        begin = progress.get_time()
        while len(state.losses) < iterations and not stopped:
            state.learn(loss_of(len(state.losses)), iterations)
            done = len(state.losses)
            progress.update(task, advance=1, loss=float(np.mean(state.losses[-100:])))
            stopped |= progress.get_time() - begin > stop_after_s
            if done % SAVE_EVERY == 0 or done == iterations or stopped:
                state.save(checkpoint)
    return len(state.losses) == iterations


@torch.no_grad()
def guided_samples(
    model: torch.nn.Module, scheduler: Any, labels: torch.Tensor, *, steps: int, guidance_scale: float, seed: int
) -> torch.Tensor:
    """Samples ``(B, C, H, W)`` of a class-conditional model by a diffusers scheduler, with diffusers alone."""
    config: Any = model.config
    shape = (len(labels), config.in_channels, config.sample_size, config.sample_size)
    latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(labels.device)
    no_class = config.num_embeds_ada_norm  # the embedding row after the classes
    classes = torch.cat([labels, torch.full_like(labels, no_class)])
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(torch.cat([latents, latents]), t.expand(len(classes)), classes, return_dict=False)[0]
        cond, uncond = output.chunk(2)
        latents = scheduler.step(uncond + guidance_scale * (cond - uncond), t, latents).prev_sample
    return latents


def write_curve(path: Path, losses: list[float], title: str) -> None:
    from matplotlib.figure import Figure  # a machine that only trains need not have it

    window = max(1, len(losses) // 200)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(np.arange(len(smooth)) + window, smooth)
    axes.set(xlabel="iteration", ylabel=f"loss, mean of {window}", title=title)
    axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110, metadata={"Software": None})


def write_sheet(path: Path, images: NDArray[np.float32], columns: int = 10, scale: int = 4) -> None:
    """Write ``(B, C, H, W)`` images in [-1, 1], of one channel or three, as one PNG of ``columns`` a row."""
    rows = len(images) // columns
    _, channels, height, width = images.shape
    grid = images[: rows * columns].reshape(rows, columns, channels, height, width).transpose(0, 3, 1, 4, 2)
    pixels = ((grid.reshape(rows * height, columns * width, channels).clip(-1, 1) + 1) * 127.5).round().astype(np.uint8)
    picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(path)
