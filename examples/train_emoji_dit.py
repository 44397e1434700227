"""Train the second demo model: a class-conditional DiT on colour emoji, by flow matching, 256 tokens, 12 blocks.

Writes a folder that diffusers loads (``transformer/`` and ``scheduler/``), the loss curve and a sheet of guided
samples. A killed run continues where it stood: start the same command again. Most of the training is done on a quarter
of the tokens, where a step costs a quarter:

    npm install emoji-datasource-google@16.0.0
    python examples/train_emoji_dit.py node_modules/emoji-datasource-google -o SMALL --image-size 16 --iterations 6000
    python examples/train_emoji_dit.py node_modules/emoji-datasource-google --start-from SMALL
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from diffusers import DiTTransformer2DModel, FlowMatchEulerDiscreteScheduler
from emoji import CLASSES, GROUPS, IMAGE_SIZE, images_and_labels
from training import State, guided_samples, initialise, train, write_curve, write_sheet

NULL_CLASS = CLASSES  # the embedding row that classifier-free guidance uses for "no class"
STEPS, GUIDANCE_SCALE = 50, 3.0  # of the sample sheet
SCHEDULER = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


def new_model(image_size: int) -> DiTTransformer2DModel:
    """A DiT with 12 blocks of width 192 and a token for 2 x 2 pixels."""
    model = DiTTransformer2DModel(
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=3,
        out_channels=3,
        num_layers=12,
        sample_size=image_size,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    initialise(model)
    return model


def loss_at(
    iteration: int,
    seed: int,
    size: int,
    model: DiTTransformer2DModel,
    images: torch.Tensor,
    labels: torch.Tensor,
    bf16: bool,
) -> torch.Tensor:
    """Flow matching's error on one batch, a tenth of its labels dropped.

    Noise levels are logit-normal as in Stable Diffusion 3 (arXiv 2403.03206), the timestep is 1000 times the level.
    """
    device = images.device
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    chosen = torch.randint(len(images), (size,), generator=generator)
    dropped = torch.rand(size, generator=generator) < 0.1
    sigmas = torch.sigmoid(torch.randn(size, generator=generator)).to(device)
    noise = torch.randn((size, *images.shape[1:]), generator=generator).to(device)
    pixels = images[chosen]
    classes = torch.where(dropped, NULL_CLASS, labels[chosen]).to(device)
    level = sigmas[:, None, None, None]
    noisy = (1 - level) * pixels + level * noise
    with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        velocity = model(noisy, sigmas * 1000, classes, return_dict=False)[0]
    return F.mse_loss(velocity.float(), noise - pixels)


@click.command()
@click.argument("package", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "emoji-dit", show_default=True
)
@click.option("--iterations", default=2000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--learning-rate", default=6e-4, show_default=True, help="Peak of AdamW's learning rate.")
@click.option("--seed", default=0, show_default=True)
@click.option("--image-size", default=IMAGE_SIZE, show_default=True, help="Pixels of a side; 32 makes 256 tokens.")
@click.option(
    "--start-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A trained folder of another image size whose weights training begins with.",
)
@click.option("--bf16/--fp32", default=True, show_default=True, help="fp32 is faster where the CPU has no bf16.")
@click.option("--device", default="cpu", show_default=True, help="cpu or cuda.")
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
@click.option("--minutes", default=float("inf"), help="Save and stop after this long; the same command goes on.")
def main(
    package: Path,
    output: Path,
    iterations: int,
    batch_size: int,
    learning_rate: float,
    seed: int,
    image_size: int,
    start_from: Path | None,
    bf16: bool,
    device: str,
    threads: int,
    minutes: float,
) -> None:
    """Train the emoji DiT on PACKAGE, the unpacked emoji-datasource-google, and write it to OUTPUT."""
    if (output / "transformer").exists() and not (output / "training").is_dir():
        raise click.UsageError(f"{output} holds a model that was not trained here; choose another output")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(part) for part in images_and_labels(package, image_size))
    model = new_model(image_size)
    if start_from is not None:
        trained = DiTTransformer2DModel.from_pretrained(start_from / "transformer", torch_dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    model.to(device)
    images = images.to(device)
    state = State(model, learning_rate)
    work = output / "training"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"state-{iterations}-{batch_size}-{seed}.safetensors"
    complete = train(
        state,
        lambda iteration: loss_at(iteration, seed, batch_size, model, images, labels, bf16),
        iterations,
        checkpoint,
        60 * minutes,
    )

    learned = {name: value.cpu() for name, value in state.average.items()}
    model = new_model(image_size)
    model.load_state_dict(learned)
    model.half().save_pretrained(output / "transformer")
    SCHEDULER.save_pretrained(output / "scheduler")
    model = DiTTransformer2DModel.from_pretrained(output / "transformer", torch_dtype=torch.float32).to(device)
    wanted = torch.arange(45, device=device) % CLASSES
    write_sheet(
        work / "samples.png",
        guided_samples(model, SCHEDULER, wanted, steps=STEPS, guidance_scale=GUIDANCE_SCALE, seed=seed).cpu().numpy(),
        columns=CLASSES,
    )
    write_curve(work / "curve.png", state.losses, "Emoji DiT: velocity error")
    facts = {
        "image_size": image_size,
        "iterations": len(state.losses),
        "of_iterations": iterations,
        "batch_size": batch_size,
        "seed": seed,
        "final_loss": round(float(np.mean(state.losses[-200:])), 5),
        "classes": GROUPS,
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    (work / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(json.dumps(facts))
    if not complete:
        raise click.ClickException("stopped before the last iteration; the same command goes on")


if __name__ == "__main__":
    main()
