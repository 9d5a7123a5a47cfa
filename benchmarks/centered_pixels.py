"""What the first layer loses in int8, by the bias that goes with the shift of its pixels.

    python benchmarks/centered_pixels.py --data DIR [--models inception_resnet_lite.cifar10 …] [--images 32]

The first convolution sees ``pixel - 128`` and its bias gets ``128 sum W``. Compared, as SQNR of the layer's output
behind the Relu against fp32 on photographs: the sum of the weights before quantization (what
`pipeline.passes.center_pixels` takes) and of the quantized ones, which is the same as unshifted pixels. Networks
without bundled weights get random ones. Writes benchmarks/results/centered_pixels.json.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from harness import machine_stamp, write_results
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from calibration.qparams import dequantize, per_channel_int8, quantize
from pipeline.compile import export_resolved
from pipeline.datasets import batches, open_dataset
from pipeline.metrics import sqnr_db
from pipeline.models.resolve import resolve_model
from pipeline.onnx_files import load_model
from pipeline.passes import fold

MODELS = (
    "inception_resnet_lite.cifar10",
    "inception_resnet_lite.signs",
    "inception_v3",
    "inception_resnet_v2",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--data", required=True, help="photographs")
    parser.add_argument("--images", type=int, default=32)
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": machine_stamp(), "images": arguments.images, "models": {}}
    for name in arguments.models:
        results["models"][name] = _measure(name, arguments.data, arguments.images)
        print(name, results["models"][name], file=sys.stderr)
    print(write_results("centered_pixels", results))


def _measure(name: str, data: str, n_images: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        resolved = resolve_model(name, weights=None if "." in name else "random:0")
        model, _ = fold(
            export_resolved(resolved, Path(folder) / "exported.onnx"), Path(folder) / "model.onnx"
        )
        graph = load_model(model.path).graph
        images = batches(open_dataset(data, limit=n_images), model.preprocess, model.input_color, 8)()
        layer = next(node for node in graph if node.op_type == "Conv")
        weight, bias = (
            value.const_value.numpy() for value in layer.inputs[1:] if value is not None and value.const_value
        )
        stride = layer.attributes.get_ints("strides", (1, 1))[0]
        params = per_channel_int8(weight, 0)
        int8 = dequantize(quantize(weight, params), params)
        real, ours, other = [], [], []
        for pixels in images:
            windows = sliding_window_view(pixels.astype(np.float64), weight.shape[2:], axis=(1, 2))
            windows = windows[:, ::stride, ::stride]
            real.append(_layer(windows, weight, bias))
            ours.append(_layer(windows - 128.0, int8, bias + 128.0 * weight.sum(axis=(1, 2, 3))))
            other.append(_layer(windows, int8, bias))
    reference = np.concatenate(real)
    return {
        "sqnr_db_sum_of_float_weights": sqnr_db(reference, np.concatenate(ours)),
        "sqnr_db_sum_of_int8_weights": sqnr_db(reference, np.concatenate(other)),
    }


def _layer(windows: NDArray[Any], weight: NDArray[Any], bias: NDArray[Any]) -> NDArray[np.float64]:
    out: NDArray[np.float64] = np.maximum(np.einsum("nhwcij,ocij->nhwo", windows, weight) + bias, 0.0)
    return out


if __name__ == "__main__":
    main()
