"""The candidates of a validation chain: a PyTorch module, or a loaded engine."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import PreprocessSpec, Sample
from pipeline.contracts import Runner
from pipeline.errors import EngineError
from pipeline.preprocess import normalize
from pipeline.validation_run import Judge

if TYPE_CHECKING:
    from torch import nn

__all__ = ["engine_judge", "module_judge", "module_sha256", "transform_judge"]

Color = Literal["RGB", "BGR"]


def engine_judge(runner: Runner, *, name: str, part: str, spec: PreprocessSpec, color: Color) -> Judge:
    """A loaded engine with one image input; its first output is the logits.

    A float input gets normalized pixels, a uint8 one (preprocessing folded into the graph) the
    pixels as they are. An engine of a fixed batch size gets its batches, the last filled up.

    Raises:
        EngineError: the engine has not exactly one input.
    """
    if len(runner.inputs) != 1:
        raise EngineError(f"{name} has {len(runner.inputs)} inputs; a classifier has one, the image")
    declared, output = runner.inputs[0], runner.outputs[0].name
    fixed = declared.shape[0] if isinstance(declared.shape[0], int) else None

    def logits(samples: Sequence[Sample], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        values: NDArray[Any] = pixels if declared.dtype == "uint8" else normalize(pixels, spec, color)
        size = fixed or len(values)
        starts = range(0, len(values), size)
        # Submitted together, so that an engine with several streams runs them side by side.
        pending = [runner.submit({declared.name: _filled(values[i : i + size], size)}) for i in starts]
        rows: NDArray[np.float32] = np.concatenate([future.result()[output] for future in pending])
        return rows[: len(values)]

    return Judge(name, part, logits)


def module_judge(module: nn.Module, *, name: str, part: str, spec: PreprocessSpec, color: Color) -> Judge:
    """A PyTorch module on the shared pixels. It is put into evaluation mode."""

    def inputs(samples: Sequence[Sample], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return normalize(pixels, spec, color)

    return _torch_judge(module, name, part, inputs)


def transform_judge(
    module: nn.Module,
    *,
    name: str,
    part: str,
    transform: Callable[[Image.Image], NDArray[np.float32]],
) -> Judge:
    """A PyTorch module on images that went through `transform` (float32 CHW each), the library's own."""

    def inputs(samples: Sequence[Sample], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        return np.stack([transform(Image.fromarray(sample.image)) for sample in samples])

    return _torch_judge(module, name, part, inputs)


def module_sha256(module: nn.Module) -> str:
    """Digest (SHA-256, hex) of a module's parameters and buffers, by name."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _torch_judge(
    module: nn.Module,
    name: str,
    part: str,
    inputs: Callable[[Sequence[Sample], NDArray[np.uint8]], NDArray[np.float32]],
) -> Judge:
    import torch

    module.eval()

    def logits(samples: Sequence[Sample], pixels: NDArray[np.uint8]) -> NDArray[np.float32]:
        with torch.inference_mode():
            rows: NDArray[np.float32] = module(torch.from_numpy(inputs(samples, pixels))).float().numpy()
        return rows

    return Judge(name, part, logits)


def _filled(values: NDArray[Any], size: int) -> NDArray[Any]:
    missing = size - len(values)
    return np.concatenate([values, np.repeat(values[-1:], missing, axis=0)]) if missing else values
