from concurrent.futures import Future

import numpy as np
import pytest
from judged import SPEC

from pipeline.artifacts import Sample, TensorSpec
from pipeline.errors import EngineError
from pipeline.judges import engine_judge, module_judge, transform_judge
from pipeline.preprocess import normalize


class FakeRunner:
    """Logits are the mean of the input per channel."""

    reuses_outputs = True
    n_streams = 1

    def __init__(self, dtype: str, batch: int | str) -> None:
        shape = (batch, 4, 4, 3) if dtype == "uint8" else (batch, 3, 4, 4)
        self.inputs = (TensorSpec("input", dtype, shape),)
        self.outputs = (TensorSpec("logits", "float32", (batch, 3)),)
        self.batches: list[int] = []

    def submit(self, inputs) -> Future:
        values = inputs["input"]
        assert values.dtype == self.inputs[0].dtype
        self.batches.append(len(values))
        future: Future = Future()
        axes = (1, 2) if values.dtype == np.uint8 else (2, 3)
        future.set_result({"logits": values.mean(axis=axes, dtype=np.float32)})
        return future


def test_engine_judge_feeds_pixels_or_normalized_floats():
    pixels = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3)).astype(np.uint8)
    on_pixels = engine_judge(FakeRunner("uint8", "N"), name="a", part="INT8", spec=SPEC, color="BGR")
    np.testing.assert_allclose(on_pixels.logits([], pixels), pixels.mean(axis=(1, 2)), rtol=1e-6)
    on_floats = engine_judge(FakeRunner("float32", "N"), name="a", part="INT8", spec=SPEC, color="BGR")
    expected = normalize(pixels, SPEC, "BGR").mean(axis=(2, 3))
    np.testing.assert_allclose(on_floats.logits([], pixels), expected, rtol=1e-6)


def test_engine_judge_fills_up_a_fixed_batch():
    runner = FakeRunner("uint8", 2)
    pixels = np.arange(5, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 4, 3), np.uint8)
    judge = engine_judge(runner, name="a", part="INT8", spec=SPEC, color="BGR")
    assert judge.logits([], pixels)[:, 0].tolist() == [0, 1, 2, 3, 4]
    assert runner.batches == [2, 2, 2]


def test_engine_judge_refuses_two_inputs():
    runner = FakeRunner("uint8", "N")
    runner.inputs *= 2
    with pytest.raises(EngineError, match="2 inputs"):
        engine_judge(runner, name="a", part="INT8", spec=SPEC, color="BGR")


def test_torch_judges_give_the_module_the_network_input():
    torch = pytest.importorskip("torch")

    class Means(torch.nn.Module):
        def forward(self, x):
            assert not self.training
            return x.mean(dim=(2, 3))

    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 4, 3)).astype(np.uint8)
    expected = normalize(pixels, SPEC, "RGB").mean(axis=(2, 3))
    shared = module_judge(Means(), name="a", part="reference", spec=SPEC, color="RGB")
    np.testing.assert_allclose(shared.logits([], pixels), expected, rtol=1e-5)
    samples = [Sample(image, 0, str(i)) for i, image in enumerate(pixels)]
    own = transform_judge(
        Means(),
        name="b",
        part="preprocessing",
        transform=lambda image: normalize(np.asarray(image)[None], SPEC, "RGB")[0],
    )
    np.testing.assert_allclose(own.logits(samples, np.zeros_like(pixels)), expected, rtol=1e-5)
