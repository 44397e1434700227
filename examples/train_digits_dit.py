"""Train the demo model: a small class-conditional DiT on real handwritten digits.

Writes a folder that diffusers loads (``transformer/`` and ``scheduler/``), the loss curve, a sample sheet and the
class accuracy of 500 guided samples. A killed run continues where it stood: start the same command again.

    python examples/train_digits_dit.py --iterations 7000

A model of four times as many tokens, to see what more tokens change, begins with the small one's weights:

    python examples/train_digits_dit.py --image-size 32 --start-from examples/digits-dit -o DIR --iterations 2500
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from diffusers import DDIMScheduler, DiTTransformer2DModel
from digits import CLASSES, IMAGE_SIZE, class_accuracy, images_and_labels
from training import State, guided_samples, initialise, train, write_curve, write_sheet

NULL_CLASS = CLASSES  # the embedding row that classifier-free guidance uses for "no class"
PEAK_LEARNING_RATE = 8e-4
STEPS, GUIDANCE_SCALE = 50, 2.0  # of the sample sheet and the class accuracy


def new_model(image_size: int) -> DiTTransformer2DModel:
    """A DiT with 8 blocks of width 128, a token for 2 x 2 pixels, initialised as the DiT paper does (adaLN-Zero)."""
    model = DiTTransformer2DModel(
        num_attention_heads=4,
        attention_head_dim=32,
        in_channels=1,
        out_channels=1,
        num_layers=8,
        sample_size=image_size,
        patch_size=2,
        num_embeds_ada_norm=CLASSES,
    )
    initialise(model)
    return model


def batch_at(
    iteration: int, seed: int, size: int, images: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The training batch of one iteration: images shifted by up to a pixel, labels of which a tenth is dropped."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + iteration)
    chosen = torch.randint(len(images), (size,), generator=generator)
    shift_y, shift_x = torch.randint(-1, 2, (2,), generator=generator).tolist()
    side = images.shape[-1]
    pixels = F.pad(images[chosen], (1, 1, 1, 1), value=-1.0)
    pixels = pixels[:, :, 1 + shift_y : 1 + shift_y + side, 1 + shift_x : 1 + shift_x + side]
    dropped = torch.rand(size, generator=generator) < 0.1
    classes = torch.where(dropped, torch.tensor(NULL_CLASS), labels[chosen])
    timesteps = torch.randint(1000, (size,), generator=generator)
    noise = torch.randn(pixels.shape, generator=generator)
    return pixels, classes, timesteps, noise


@click.command()
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "digits-dit", show_default=True
)
@click.option("--iterations", default=7000, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--image-size", default=IMAGE_SIZE, show_default=True, help="Pixels of a side; 32 makes 256 tokens.")
@click.option(
    "--start-from",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="A trained folder of another image size whose weights training begins with.",
)
@click.option("--bf16/--fp32", default=True, show_default=True, help="fp32 is faster where the CPU has no bf16.")
@click.option("--threads", default=0, help="CPU threads; 0 leaves the choice to PyTorch.")
def main(
    output: Path,
    iterations: int,
    batch_size: int,
    seed: int,
    image_size: int,
    start_from: Path | None,
    bf16: bool,
    threads: int,
) -> None:
    """Train the digits DiT and write it to OUTPUT."""
    if (output / "transformer").exists() and not (output / "training").is_dir():
        raise click.UsageError(f"{output} holds a model that was not trained here; choose another output")
    if threads:
        torch.set_num_threads(threads)
    torch.manual_seed(seed)
    images, labels = (torch.from_numpy(part) for part in images_and_labels(image_size))
    model = new_model(image_size)
    if start_from is not None:
        trained = DiTTransformer2DModel.from_pretrained(start_from / "transformer", torch_dtype=torch.float32)
        model.load_state_dict(trained.state_dict())
    state = State(model, PEAK_LEARNING_RATE)
    work = output / "training"
    work.mkdir(parents=True, exist_ok=True)
    checkpoint = work / f"state-{iterations}-{batch_size}-{seed}.safetensors"

    def loss_at(iteration: int) -> torch.Tensor:
        pixels, classes, timesteps, noise = batch_at(iteration, seed, batch_size, images, labels)
        noisy = SCHEDULER.add_noise(pixels, noise, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            output_noise = model(noisy, timesteps, classes, return_dict=False)[0]
        return F.mse_loss(output_noise.float(), noise)

    if not train(state, loss_at, iterations, checkpoint):
        raise click.ClickException("stopped before the last iteration; the same command goes on")
    model.load_state_dict(state.average)
    model.half().save_pretrained(output / "transformer")
    SCHEDULER.save_pretrained(output / "scheduler")
    model = DiTTransformer2DModel.from_pretrained(output / "transformer", torch_dtype=torch.float32)
    wanted = torch.arange(500) % CLASSES
    how = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    parts = enumerate(wanted.split(100))
    samples = torch.cat([guided_samples(model, SCHEDULER, part, seed=seed + i, **how) for i, part in parts]).numpy()
    accuracy = class_accuracy(samples, wanted.numpy())
    write_curve(work / "curve.png", state.losses, "Digits DiT: noise prediction error")
    write_sheet(work / "samples.png", samples[:100])
    facts = {
        "image_size": image_size,
        "iterations": iterations,
        "batch_size": batch_size,
        "seed": seed,
        "final_loss": round(float(np.mean(state.losses[-200:])), 5),
        "class_accuracy": accuracy,
        "samples": len(samples),
        "steps": STEPS,
        "guidance_scale": GUIDANCE_SCALE,
    }
    (work / "training.json").write_text(json.dumps(facts, indent=2) + "\n")
    click.echo(json.dumps(facts))


# clip_sample off: a clipped update is not linear in the latents, so no static solver table could reproduce it.
SCHEDULER = DDIMScheduler(
    num_train_timesteps=1000,
    beta_schedule="linear",
    clip_sample=False,
    set_alpha_to_one=True,
    timestep_spacing="trailing",
)

if __name__ == "__main__":
    main()
