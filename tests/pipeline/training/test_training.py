"""Training: recipes as stated, resuming that changes nothing, and a network that learns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tolerances import GPU_TRAINING_RTOL
from torch import nn

from pipeline.artifacts import PreprocessSpec
from pipeline.errors import DataError, EdgefoldError, UsageError
from pipeline.synthetic import SyntheticDataset
from pipeline.training.loop import EpochResult, TrainingRun, train
from pipeline.training.pixels import (
    Augmentation,
    PixelTable,
    augmented_batches,
    materialize,
    mirrored_images,
    split,
)
from pipeline.training.recipes import RECIPES, Recipe, learning_rate, make_optimizer, recipe_named

SPEC = PreprocessSpec((8, 8), mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))
RECIPE = RECIPES["modern"]


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


def table(n: int = 96) -> PixelTable:
    """Dark and light images: learned in a few steps, or not at all."""
    rng = np.random.default_rng(0)
    labels = np.arange(n) % 2
    pixels = np.clip(rng.normal(90 + 80 * labels[:, None, None, None], 20, (n, 8, 8, 3)), 0, 255)
    return PixelTable(pixels.astype(np.uint8), labels.astype(np.int64), ("dark", "light"))


def network() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 2),
    )


def run_training(
    folder: Path,
    epochs: int = 4,
    model: nn.Module | None = None,
    recipe: Recipe = RECIPE,
    stop_after: int | None = None,
    device: str = "cpu",
    **changes: object,
) -> tuple[dict[str, torch.Tensor], list[EpochResult]]:
    data = table()
    train_indices, held = split(data.labels, 16, 0)
    recipe = dataclasses.replace(recipe, **{"epochs": epochs, "batch_size": 16, **changes})  # type: ignore[arg-type]
    run = TrainingRun(recipe, Augmentation(shift_px=1), SPEC, seed=0, device=device)
    results: list[EpochResult] = []

    def watch(result: EpochResult) -> None:
        results.append(result)
        if result.epoch == stop_after:
            raise _StopError

    state = train(
        model or network(),
        data,
        train_indices,
        held,
        run,
        folder / "checkpoint.pt",
        progress=quiet,
        on_epoch=watch,
    )
    return state, results


class _StopError(Exception):
    pass


@pytest.mark.parametrize("name", ["modern", "fast"])
def test_it_learns(tmp_path: Path, name: str) -> None:
    _, results = run_training(tmp_path, epochs=8, recipe=RECIPES[name])
    assert results[-1].top1 >= 90.0
    assert results[-1].loss < results[0].loss


@pytest.mark.parametrize("name", ["modern", "fast"])
def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, name: str) -> None:
    whole, _ = run_training(tmp_path / "whole", recipe=RECIPES[name])
    with pytest.raises(_StopError):
        run_training(tmp_path / "part", recipe=RECIPES[name], stop_after=2)
    resumed, results = run_training(tmp_path / "part", recipe=RECIPES[name])
    assert [result.epoch for result in results] == [3, 4]
    for key, tensor in whole.items():
        torch.testing.assert_close(resumed[key], tensor, rtol=0, atol=0, msg=key)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["modern", "fast"])
def test_a_gpu_trains_as_the_cpu_does_and_a_run_goes_on_from_one_to_the_other(
    tmp_path: Path, name: str
) -> None:
    if not torch.cuda.is_available():
        pytest.skip("PyTorch has no GPU here")
    on_cpu, expected = run_training(tmp_path / "cpu", recipe=RECIPES[name])
    on_gpu, results = run_training(tmp_path / "gpu", recipe=RECIPES[name], device="cuda")
    with pytest.raises(_StopError):
        run_training(tmp_path / "both", recipe=RECIPES[name], device="cuda", stop_after=2)
    across, _ = run_training(tmp_path / "both", recipe=RECIPES[name])
    assert [result.loss for result in results] == pytest.approx(
        [result.loss for result in expected], rel=GPU_TRAINING_RTOL
    )
    for key, tensor in on_cpu.items():
        for state in (on_gpu, across):
            assert state[key].device.type == "cpu"
            torch.testing.assert_close(
                state[key], tensor, rtol=GPU_TRAINING_RTOL, atol=GPU_TRAINING_RTOL, msg=key
            )


def test_given_weights_are_not_prepared_over(tmp_path: Path) -> None:
    data = table()
    train_indices, held = split(data.labels, 16, 0)
    recipe = dataclasses.replace(RECIPES["fast"], batch_size=16, epochs=1, peak_lr=1e-9)
    for given in ("abc", None):
        model = network()
        kernel = model[0].weight.detach().clone()
        run = TrainingRun(recipe, Augmentation(), SPEC, seed=0, initial_sha256=given)
        checkpoint = tmp_path / str(given) / "checkpoint.pt"
        train(model, data, train_indices, held, run, checkpoint, progress=quiet, on_epoch=lambda _: None)
        kept = bool((model[0].weight - kernel).abs().max() < 1e-4)
        assert kept == (given is not None)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run_training(tmp_path, epochs=1)
    with pytest.raises(UsageError, match="another run"):
        run_training(tmp_path, epochs=1, peak_lr=0.01)


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    model = network()
    with torch.no_grad():
        next(model.parameters()).fill_(math.nan)
    with pytest.raises(EdgefoldError, match="loss became nan"):
        run_training(tmp_path, model=model)


def test_fewer_images_than_a_batch_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--batch-size"):
        run_training(tmp_path, batch_size=1000)


def test_the_papers_recipe_is_the_papers() -> None:
    recipe = recipe_named("paper")
    assert [learning_rate(recipe, step, 100, 10) for step in (0, 19, 20, 40)] == pytest.approx(
        [0.045, 0.045, 0.045 * 0.94, 0.045 * 0.94**2]
    )
    optimizer = make_optimizer(recipe, network())
    assert type(optimizer).__name__ == "RMSpropTF"
    assert optimizer.defaults["alpha"] == 0.9
    assert optimizer.defaults["eps"] == 1.0
    assert recipe.label_smoothing == 0.1
    assert recipe.clip_norm == 2.0


def test_one_cycle_rises_and_falls_to_zero() -> None:
    rates = [learning_rate(RECIPE, step, 100, 10) for step in range(101)]
    assert max(rates) == rates[round(RECIPE.warmup * 100)] == RECIPE.peak_lr
    assert rates[100] == 0.0


def test_norms_and_biases_are_not_decayed() -> None:
    groups = make_optimizer(RECIPE, network()).param_groups
    assert all(p.ndim > 1 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0.0


def test_the_fast_recipe_scales_rates_and_not_how_fast_weights_shrink() -> None:
    recipe = RECIPES["fast"]
    model = network()
    matrices, shifts, head = make_optimizer(recipe, model).param_groups
    assert [group["lr_scale"] for group in (matrices, shifts, head)] == [1.0, 64.0, pytest.approx(1 / 81)]
    assert all(
        group["lr"] * group["weight_decay"] == pytest.approx(recipe.peak_lr * recipe.weight_decay)
        for group in (matrices, shifts, head)
    )
    assert {id(p) for p in head["params"]} == {id(p) for p in model[-1].parameters()}


def test_an_image_is_mirrored_every_second_epoch() -> None:
    first, second, third = (mirrored_images(1000, Augmentation(), 7, epoch) for epoch in range(3))
    assert 400 < first.sum() < 600
    np.testing.assert_array_equal(first, ~second)
    np.testing.assert_array_equal(first, third)
    assert not mirrored_images(1000, Augmentation(flip=False), 7, 1).any()


def test_an_unknown_recipe_names_the_known_ones() -> None:
    with pytest.raises(UsageError, match="modern"):
        recipe_named("ancient")


def test_held_out_images_are_balanced_and_not_trained_on() -> None:
    labels = np.repeat(np.arange(4), 50)
    train_indices, held = split(labels, 40, 0)
    assert len(np.intersect1d(train_indices, held)) == 0
    assert len(train_indices) + len(held) == 200
    assert np.ptp(np.bincount(labels[held])) <= 1
    with pytest.raises(DataError, match="nothing"):
        split(labels, 200, 0)


def test_augmentation_only_moves_mirrors_and_blanks() -> None:
    data = table(16)
    rng = np.random.default_rng(0)
    asis, half = np.zeros(16, np.bool_), np.arange(16) % 2 == 0
    plain = Augmentation(shift_px=0, cutout_px=0)
    (pixels, labels, _), *rest = augmented_batches(data, np.arange(16), 16, plain, rng, asis)
    assert not rest
    np.testing.assert_array_equal(pixels, data.pixels[np.arange(16)])
    np.testing.assert_array_equal(labels, data.labels)
    ((pixels, _, _),) = augmented_batches(data, np.arange(16), 16, plain, rng, half)
    np.testing.assert_array_equal(pixels[half], data.pixels[half][:, :, ::-1])
    np.testing.assert_array_equal(pixels[~half], data.pixels[~half])
    cut = Augmentation(shift_px=0, cutout_px=4)
    ((pixels, _, _),) = augmented_batches(data, np.arange(16), 16, cut, rng, asis)
    changed = (pixels != data.pixels).any(axis=(1, 2, 3))
    assert changed.all()
    assert (pixels[pixels != data.pixels] == 128).all()


def test_pixels_are_decoded_once(tmp_path: Path) -> None:
    dataset = SyntheticDataset(0, 24)
    first = materialize(dataset, SPEC, tmp_path, quiet)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = materialize(dataset, SPEC, tmp_path, quiet)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before
    np.testing.assert_array_equal(first.pixels, second.pixels)
    assert first.labels.tolist() == [sample.label for sample in dataset]
