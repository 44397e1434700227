"""Train the judge of the demo: a small convolutional classifier of the real handwritten digits, as one ONNX file.

Its ``features`` are what a Fréchet distance between sets of digits is taken on, its ``logits`` say which digit a
picture shows. A fifth of the scans is held out and only tested on. Every random number is a function of the seed.

    python examples/train_digits_classifier.py
"""

from __future__ import annotations

import logging
from pathlib import Path

import click
import numpy as np
import onnx_ir as ir
import onnxruntime
import torch
import torch.nn.functional as F  # noqa: N812 - the name that PyTorch's users know
from digits import CLASSES, IMAGE_SIZE, images_and_labels
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from rich.progress import track
from torch import nn

from tc_deploy.bundle import check_output
from tc_deploy.bundle.marks import PLAIN_FILE

FEATURES = 16  # few, so that few samples are enough for a covariance
OPSET = 20
PEAK_LEARNING_RATE = 3e-3
SHIPPED = Path(__file__).parent / "digits-classifier.onnx"


class Classifier(nn.Module):
    """Three convolutions, 16 features, 10 logits."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 16, 8, 8)
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),  # (B, 32, 4, 4)
            nn.Conv2d(32, 64, 3, padding=1),
            nn.ReLU(),
            nn.Flatten(),
        )
        self.features = nn.Linear(64 * (IMAGE_SIZE // 4) ** 2, FEATURES)
        self.logits = nn.Linear(FEATURES, CLASSES)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.features(self.convolutions(images))
        return features, self.logits(F.relu(features))


def jittered(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Images turned, scaled and shifted a little, each in its own way; what comes in from outside is background."""
    turn, zoom, shift_x, shift_y = (2 * torch.rand((4, len(images)), generator=generator) - 1).unbind()
    turn, zoom, shift_x, shift_y = 0.15 * turn, 1 + 0.1 * zoom, 0.15 * shift_x, 0.15 * shift_y
    cos, sin = zoom * turn.cos(), zoom * turn.sin()
    matrices = torch.stack([torch.stack([cos, -sin, shift_x], 1), torch.stack([sin, cos, shift_y], 1)], 1)
    grid = F.affine_grid(matrices, list(images.shape), align_corners=False)
    return F.grid_sample(images + 1, grid, align_corners=False) - 1


def export(model: Classifier, path: Path) -> None:
    """Write one file with any batch, without the notes in which the exporter names local files."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which nothing here needs
    program = torch.onnx.export(
        model.eval(),
        (torch.zeros(2, 1, IMAGE_SIZE, IMAGE_SIZE),),
        dynamo=True,
        opset_version=OPSET,
        input_names=["images"],
        output_names=["features", "logits"],
        dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
        external_data=False,
        verbose=False,
    )
    assert program is not None
    ClearMetadataAndDocStringPass()(program.model)
    ir.save(program.model, path)


def accuracy(path: Path, images: torch.Tensor, labels: torch.Tensor) -> float:
    """Share of images that the file, not the module, reads as its label."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    return float((logits.argmax(1) == labels.numpy()).mean())


@click.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=SHIPPED,
    show_default=True,
)
@click.option("--epochs", default=40, show_default=True)
@click.option("--batch-size", default=64, show_default=True)
@click.option("--seed", default=0, show_default=True)
@click.option("--force", is_flag=True, help="Replace another file than the one that is shipped.")
def main(output: Path, epochs: int, batch_size: int, seed: int, force: bool) -> None:
    """Train the classifier and write it to OUTPUT."""
    if output != SHIPPED:
        check_output(output, PLAIN_FILE, force=force)
    torch.set_num_threads(1)  # sums in another order would end in other weights
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = (torch.from_numpy(part) for part in images_and_labels())
    order = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    held_out, seen = order[: len(order) // 5], order[len(order) // 5 :]
    model = Classifier()
    optimizer = torch.optim.AdamW(model.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.01)
    batches = len(seen) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LEARNING_RATE, total_steps=epochs * batches)
    for _ in track(range(epochs), "training"):
        shuffled = seen[torch.randperm(len(seen), generator=generator)]
        for chosen in shuffled[: batches * batch_size].split(batch_size):
            _, logits = model(jittered(images[chosen], generator))
            loss = F.cross_entropy(logits, labels[chosen], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    export(model, output)
    unseen, all_digits = (accuracy(output, images[chosen], labels[chosen]) for chosen in (held_out, order))
    click.echo(
        f"{output}: {output.stat().st_size / 1024:.0f} KiB; reads {100 * unseen:.1f} % of {len(held_out)} held-out"
        f" digits, {100 * all_digits:.1f} % of all {len(order)}"
    )


if __name__ == "__main__":
    main()
