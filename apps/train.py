"""``edgefold train``: train a network on labelled images."""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from apps.console import console, progress_display

if TYPE_CHECKING:
    from torch import Tensor, nn

    from pipeline.artifacts import PreprocessSpec

__all__ = ["train_command"]

_BUILTIN_INPUT = 96


def train_command(
    model: Annotated[
        str,
        typer.Argument(
            help="A built-in network (inception_resnet_lite, inception_v3, …), timm:NAME, torchvision:NAME, or what "
            "starts from weights of its own: inception_resnet_lite.signs, path/to/file.py:factory."
        ),
    ],
    data: Annotated[str, typer.Option(help="Labelled DATA to train on (see `edgefold build --help`).")],
    out: Annotated[Path, typer.Option(help="Directory for checkpoint, weights and model card.")],
    weights: Annotated[
        Path | None,
        typer.Option(help="Start from the weights in this file instead of random ones.", show_default=False),
    ] = None,
    teacher: Annotated[
        list[Path] | None,
        typer.Option(
            help="BUNDLE of another network with the same classes, whose answers to the images are learned "
            "beside their labels (distillation); of several, given one by one, the mean.",
            show_default=False,
        ),
    ] = None,
    recipe: Annotated[
        str, typer.Option(help="modern, fast (small images), or paper (RMSProp as in arXiv 1512.00567).")
    ] = "modern",
    epochs: Annotated[int | None, typer.Option(min=1, help="Instead of the recipe's.")] = None,
    lr: Annotated[
        float | None, typer.Option(min=1e-6, help="Peak learning rate instead of the recipe's.")
    ] = None,
    batch_size: Annotated[int | None, typer.Option(min=2, help="Instead of the recipe's.")] = None,
    label_smoothing: Annotated[
        float | None, typer.Option(min=0.0, max=0.5, help="Instead of the recipe's.")
    ] = None,
    input_size: Annotated[
        int | None,
        typer.Option(
            min=8,
            help="Side of the network's input in pixels; 96 for a built-in network, else the model's own.",
            show_default=False,
        ),
    ] = None,
    width: Annotated[
        float, typer.Option(min=0.25, max=4.0, help="Width multiplier (inception_resnet_lite).")
    ] = 1.0,
    preprocess: Annotated[Path | None, typer.Option(help="PreprocessSpec as JSON.")] = None,
    holdout: Annotated[
        int, typer.Option(min=0, help="Images kept from training to watch the accuracy on.")
    ] = 2000,
    flip: Annotated[bool, typer.Option(help="Mirror images; off where a mirror changes the class.")] = True,
    shift: Annotated[int, typer.Option(min=0, help="Translate by up to this many pixels.")] = 4,
    cutout: Annotated[int, typer.Option(min=0, help="Side of the square blanked out, in pixels.")] = 0,
    seed: Annotated[int, typer.Option(help="Of the initial weights, the order and the augmentation.")] = 0,
    threads: Annotated[int | None, typer.Option(min=1, help="CPU threads.")] = None,
    device: Annotated[
        str | None,
        typer.Option(
            help="cpu, cuda, or cuda:1 where PyTorch has several; cuda where it has one, else cpu.",
            show_default=False,
        ),
    ] = None,
    bf16: Annotated[
        bool, typer.Option(help="bfloat16 arithmetic: several times faster on a GPU, and on CPUs with AMX.")
    ] = False,
    compile_: Annotated[
        bool, typer.Option("--compile", help="torch.compile: minutes to start, faster after.")
    ] = False,
) -> None:
    """Train a network; interrupt at will, the same command goes on from the last epoch."""
    import torch

    from pipeline.datasets import open_dataset
    from pipeline.models.registry import NETWORKS
    from pipeline.training.loop import EpochResult, TrainingRun, train
    from pipeline.training.pixels import Augmentation, class_count, materialize, split
    from pipeline.training.recipes import recipe_named

    if threads is not None:
        torch.set_num_threads(threads)
    where = _device(device)
    chosen = recipe_named(recipe)
    chosen = dataclasses.replace(
        chosen,
        epochs=epochs or chosen.epochs,
        peak_lr=lr or chosen.peak_lr,
        batch_size=batch_size or chosen.batch_size,
        label_smoothing=chosen.label_smoothing if label_smoothing is None else label_smoothing,
    )
    dataset = open_dataset(data)
    torch.manual_seed(seed)
    network, spec, initial_sha256 = _network(
        model, class_count(dataset), width, input_size, preprocess, weights
    )
    with progress_display() as progress:
        table = materialize(dataset, spec, out / "pixels", progress)
        taught_by = None
        if teacher:
            from apps.teaching import ask_teachers

            taught_by = ask_teachers(teacher, dataset, out / "pixels", progress, mirror=flip)
        train_indices, held_indices = split(table.labels, holdout, seed)
        run = TrainingRun(
            recipe=chosen,
            augmentation=Augmentation(flip, shift, cutout),
            preprocess=spec,
            seed=seed,
            bf16=bf16,
            compile=compile_,
            device=where,
            initial_sha256=initial_sha256,
            teacher=taught_by,
        )
        results: list[EpochResult] = []

        def report(result: EpochResult) -> None:
            results.append(result)
            console.print(
                f"epoch {result.epoch:3d}/{chosen.epochs}  loss {result.loss:.4f}  "
                f"held-out top-1 {result.top1:.2f}%  {result.seconds:.3g} s"
            )

        state = train(
            network,
            table,
            train_indices,
            held_indices,
            run,
            out / "checkpoint.pt",
            progress=progress,
            on_epoch=report,
        )
    untagged = model.partition(".")[0]
    card = {
        "model": untagged if untagged in NETWORKS else model,
        "width": width,
        "input_size": spec.input_hw[0],
        "num_classes": len(table.class_names),
        "labels": list(table.class_names),
        "preprocess": dataclasses.asdict(spec),
        "data": {
            "name": dataset.name,
            "sha256": dataset.sha256,
            "train": len(train_indices),
            "held": len(held_indices),
        },
        "recipe": dataclasses.asdict(chosen),
        "augmentation": {"flip": flip, "shift_px": shift, "cutout_px": cutout},
        "seed": seed,
        "initial_weights_sha256": initial_sha256,
        "teacher": taught_by.card() if taught_by else None,
        "command": shlex.join(["edgefold", *sys.argv[1:]]),
        "held_out_top1_percent": results[-1].top1 if results else None,
    }
    _write(out, state, card)
    console.print(f"wrote {out / 'weights.safetensors'} and {out / 'card.json'}")


def _device(given: str | None) -> str:
    """Where to compute: `given`, else PyTorch's first GPU, else the CPU.

    Raises:
        UsageError: `given` is no device that PyTorch has here.
    """
    import torch

    from pipeline.errors import UsageError

    if given is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    there = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    there += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if given not in there:
        raise UsageError(
            f"--device {given}: PyTorch {torch.__version__} has {', '.join(there)} here; take one of these, or for a "
            "GPU see that `nvidia-smi` answers and that PyTorch is a CUDA build"
        )
    return given


def _network(
    model: str,
    num_classes: int,
    width: float,
    input_size: int | None,
    preprocess: Path | None,
    weights: Path | None,
) -> tuple[nn.Module, PreprocessSpec, str | None]:
    """The network to train, what its pixels go through, and the digest of what it starts from.

    That is the file `weights`, the bundled weights that the name stands for, or what a factory gave it; ``None``:
    random weights.

    Raises:
        ModelSpecError: there is no such network, or it has not `num_classes` outputs.
        WeightsError: the weights are not this network's.
    """
    from pipeline.artifacts import PreprocessSpec
    from pipeline.errors import ModelSpecError, WeightsError
    from pipeline.judges import module_sha256
    from pipeline.models.registry import NETWORKS
    from pipeline.models.resolve import count_outputs, read_preprocess
    from pipeline.models.sources import open_source

    given = read_preprocess(preprocess) if preprocess else None
    builtin = NETWORKS.get(model)
    if width != 1.0 and not (builtin and builtin.has_width):
        raise ModelSpecError(f"{model} has no width multiplier; leave out --width {width:g}")
    if builtin:
        side = input_size or _BUILTIN_INPUT
        spec = given or PreprocessSpec((side, side))
        options = {"width": width} if builtin.has_width else {}
        network = builtin.build(num_classes, spec.input_hw[0], **options)
        return network, spec, None if weights is None else _start_from(network, weights)
    source = open_source(model, input_size, None)
    if weights is not None and source.bundled is not None:
        raise WeightsError(f"{model} names its own weights, and --weights others: drop one of the two")
    network = source.build(num_classes)
    spec = given or source.preprocess(network).spec
    n_outputs = count_outputs(model, network.eval(), spec)
    if n_outputs != num_classes:
        raise ModelSpecError(
            f"{model} gives {n_outputs} scores and the data has {num_classes} classes: let the factory take num_classes, "
            "or return a network with that many outputs"
        )
    start = weights or source.bundled
    if start is not None:
        return network, spec, _start_from(network, start)
    return network, spec, module_sha256(network) if source.has_own_weights else None


def _start_from(network: nn.Module, path: Path) -> str:
    """Load the weights of a file into `network`; its SHA-256."""
    from pipeline.models.checkpoints import load_state, read_checkpoint, unwrap

    checkpoint = read_checkpoint(path)
    state, _ = unwrap(checkpoint, network.state_dict())
    load_state(network, state, str(path))
    return checkpoint.sha256


def _write(out: Path, state: dict[str, Tensor], card: dict[str, object]) -> None:
    """Weights with half-precision kernels (norms stay float32: their range is wider), and the card."""
    import torch
    from safetensors.torch import save_file

    small = {
        k: (v.half() if v.ndim > 1 else v).contiguous() for k, v in state.items() if v.dtype != torch.int64
    }
    save_file(small, out / "weights.safetensors")
    (out / "card.json").write_text(json.dumps(card, indent=2) + "\n")
