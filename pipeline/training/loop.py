"""The training loop: resumable, interruptible, evaluated on the average of the weights."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipeline.artifacts import PreprocessSpec
from pipeline.contracts import Progress
from pipeline.errors import EdgefoldError, UsageError
from pipeline.preprocess import affine
from pipeline.training.distillation import Teacher, taught_loss
from pipeline.training.pixels import Augmentation, PixelTable, augmented_batches, mirrored_images
from pipeline.training.recipes import Recipe, learning_rate, make_optimizer
from pipeline.training.start import prepare
from pipeline.whole_files import whole_file

__all__ = ["EpochResult", "TrainingRun", "train"]


_PREPARED_FROM = 1024
"""Images whose patches the first convolution is whitened by."""


@dataclass(frozen=True, slots=True)
class EpochResult:
    """``top1`` is in percent, of the averaged weights on the held-out images; NaN without any."""

    epoch: int
    loss: float
    top1: float
    seconds: float


@dataclass(frozen=True, slots=True)
class TrainingRun:
    """What is trained on what; its digest ties a checkpoint to it."""

    recipe: Recipe
    augmentation: Augmentation
    preprocess: PreprocessSpec
    seed: int
    bf16: bool = False
    compile: bool = False
    device: str = "cpu"
    """Where PyTorch computes; a run may go on elsewhere than where it began."""
    initial_sha256: str | None = None
    """Of the weights file it starts from; ``None``: from random ones."""
    teacher: Teacher | None = None
    """Whose answers are learned beside the labels."""

    def digest(self, table: PixelTable, train_indices: NDArray[np.int64]) -> str:
        """Identity of the run: how, on which labels in which order."""
        how = json.dumps(
            [
                asdict(self.recipe),
                asdict(self.augmentation),
                asdict(self.preprocess),
                self.seed,
                *([self.initial_sha256] if self.initial_sha256 is not None else []),
                *([self.teacher.engines] if self.teacher is not None else []),
            ]
        )
        what = table.labels[train_indices].tobytes() + train_indices.tobytes()
        return hashlib.sha256(how.encode() + what).hexdigest()


class _Normalize:
    """uint8 NHWC batches to the float32 NCHW tensors the network takes, by the spec's own affine."""

    def __init__(self, spec: PreprocessSpec, device: torch.device) -> None:
        scale, shift = affine(spec)
        self.device = device
        self.scale = torch.tensor(scale, dtype=torch.float32, device=device).view(1, 3, 1, 1)
        self.shift = torch.tensor(shift, dtype=torch.float32, device=device).view(1, 3, 1, 1)

    def __call__(self, pixels: NDArray[np.uint8]) -> Tensor:
        # Bytes travel to the device, a quarter of the floats. Permuting NHWC gives the channels-last layout for
        # nothing.
        there = torch.from_numpy(pixels).to(self.device)
        return there.permute(0, 3, 1, 2).float() * self.scale + self.shift


def train(
    model: nn.Module,
    table: PixelTable,
    train_indices: NDArray[np.int64],
    held_indices: NDArray[np.int64],
    run: TrainingRun,
    checkpoint: Path,
    *,
    progress: Progress,
    on_epoch: Callable[[EpochResult], None],
) -> dict[str, Tensor]:
    """Train `model` in place; return the averaged weights as a state dict.

    A checkpoint is written (atomically) after every epoch; where one of the same run exists, training
    goes on from it.

    Raises:
        UsageError: the checkpoint belongs to another run, or there are fewer images than a batch.
        EdgefoldError: the loss is not finite.
    """
    recipe = run.recipe
    steps_per_epoch = len(train_indices) // recipe.batch_size
    if steps_per_epoch == 0:
        raise UsageError(
            f"{len(train_indices)} training images do not fill one batch of {recipe.batch_size}; lower --batch-size"
        )
    total_steps = steps_per_epoch * recipe.epochs
    device = torch.device(run.device)
    # Every batch has the same shape: the fastest convolution is worth looking for once.
    torch.backends.cudnn.benchmark = True
    if recipe.prepared and run.initial_sha256 is None:
        sample, _ = table.subset(train_indices[:: max(1, len(train_indices) // _PREPARED_FROM)])
        # On the CPU wherever the rest happens: the signs of eigenvectors are a library's own.
        prepare(model, _Normalize(run.preprocess, torch.device("cpu"))(sample), recipe.head_scale)
    model = model.to(device).to(memory_format=torch.channels_last)
    normalize = _Normalize(run.preprocess, device)
    optimizer = make_optimizer(recipe, model)
    ema = torch.optim.swa_utils.get_ema_multi_avg_fn(recipe.ema_decay)  # type: ignore[no-untyped-call]
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema, use_buffers=True)
    digest = run.digest(table, train_indices)
    first_epoch = _resume(checkpoint, digest, model, average, optimizer)
    forward: Callable[[Tensor], Tensor] = torch.compile(model) if run.compile else model
    for epoch in range(first_epoch, recipe.epochs):
        # Seeded by epoch, so that a resumed run sees what an uninterrupted one would have seen.
        rng = np.random.default_rng([run.seed, epoch])
        torch.manual_seed(run.seed * 100_003 + epoch)
        model.train()
        began, total_loss = time.monotonic(), 0.0
        mirrored = mirrored_images(len(table.labels), run.augmentation, run.seed, epoch)
        epoch_batches = augmented_batches(
            table, train_indices, recipe.batch_size, run.augmentation, rng, mirrored
        )
        for i, (pixels, labels, batch) in enumerate(epoch_batches):
            rate = learning_rate(recipe, epoch * steps_per_epoch + i, total_steps, steps_per_epoch)
            for group in optimizer.param_groups:
                group["lr"] = rate * group["lr_scale"]
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=run.bf16):
                logits = forward(normalize(pixels))
            loss = F.cross_entropy(
                logits.float(), torch.from_numpy(labels).to(device), label_smoothing=recipe.label_smoothing
            )
            if run.teacher is not None:
                loss = taught_loss(loss, logits.float(), run.teacher.answers(batch).to(device))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(model.parameters(), recipe.clip_norm)
            optimizer.step()
            average.update_parameters(model)
            # Asked for last: it waits for a GPU, which by now has the whole step to work on.
            value = loss.item()
            if not math.isfinite(value):
                raise EdgefoldError(
                    f"the loss became {value} in epoch {epoch + 1}, step {i + 1} at learning rate {rate:.4g}; "
                    "lower --lr (the last good checkpoint is kept)"
                )
            total_loss += value
            progress(f"epoch {epoch + 1}/{recipe.epochs}", i + 1, steps_per_epoch)
        top1 = _top1(average.module, table, held_indices, normalize)
        _save(checkpoint, digest, model, average, optimizer, epoch + 1)
        on_epoch(EpochResult(epoch + 1, total_loss / steps_per_epoch, top1, time.monotonic() - began))
    return {name: tensor.cpu() for name, tensor in average.module.state_dict().items()}


@torch.inference_mode()
def _top1(model: nn.Module, table: PixelTable, indices: NDArray[np.int64], normalize: _Normalize) -> float:
    if len(indices) == 0:
        return math.nan
    model.eval()
    correct = 0
    for start in range(0, len(indices), 256):
        pixels, labels = table.subset(indices[start : start + 256])
        correct += int((model(normalize(pixels)).argmax(1).cpu().numpy() == labels).sum())
    return 100.0 * correct / len(indices)


def _save(
    path: Path,
    digest: str,
    model: nn.Module,
    average: nn.Module,
    optimizer: torch.optim.Optimizer,
    epoch: int,
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "digest": digest,
        "epoch": epoch,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    with whole_file(path) as file:
        torch.save(state, file)


def _resume(
    path: Path, digest: str, model: nn.Module, average: nn.Module, optimizer: torch.optim.Optimizer
) -> int:
    """Load the checkpoint where there is one; the number of epochs it has behind it."""
    if not path.exists():
        return 0
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    if state["digest"] != digest:
        raise UsageError(
            f"{path} is the checkpoint of another run (other data, recipe, preprocessing or seed); "
            "give another --out, or delete it to start again"
        )
    model.load_state_dict(state["model"])
    average.load_state_dict(state["average"])
    optimizer.load_state_dict(state["optimizer"])
    return int(state["epoch"])
