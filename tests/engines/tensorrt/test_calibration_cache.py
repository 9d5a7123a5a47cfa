"""TensorRT's calibration cache: what stands in it, and what is no such file."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx_text import onnx_model, weight

from engines.tensorrt.calibration_cache import CalibrationCache, cache_from_text, cache_to_text, make_cache
from pipeline.artifacts import CalibrationTable, TensorRange
from pipeline.errors import CalibrationError, IntegrityError


def _table(**ranges: tuple[float, float]) -> CalibrationTable:
    return CalibrationTable(
        {name: TensorRange(*limits) for name, limits in ranges.items()}, "minmax", 1, "", "", "", ""
    )


def _model() -> ir.Model:
    """A pixel input, an activation, a pool, a residual sum, a concatenation, a classifier."""
    return onnx_model(
        """agraph (uint8[N,8,8,4] image) => (float[N,10] logits) {
            t = Transpose <perm = [0, 3, 1, 2]> (image) x = Cast <to = 1> (t)
            c = Conv (x, w) r = Relu (c) p = MaxPool <kernel_shape = [2, 2]> (r)
            d = Conv (p, v) s = Add (p, d) q = Relu (s)
            e = Conv (q, v) f = Relu (e) j = Concat <axis = 1> (q, f)
            g = GlobalAveragePool (j) h = Flatten (g) logits = Gemm <transB = 1> (h, m) }""",
        w=weight(4, 4, 1, 1), v=weight(4, 4, 1, 1, seed=1), m=weight(10, 8),
    )  # fmt: skip


def test_every_tensor_has_a_scale_and_the_text_is_tensorrts() -> None:
    table = _table(r=(0.0, 2.0), p=(0.0, 1.5), d=(-3.0, 1.0), q=(0.0, 4.0), f=(0.0, 5.0))
    cache = make_cache(_model(), table)
    peaks = {name: round(float(scale) * 127, 4) for name, scale in cache.scales.items()}
    assert peaks == {
        **dict.fromkeys(("image", "t", "x"), 255.0),
        **dict.fromkeys(("c", "r", "p"), 2.0),  # one scale through activation and pool: the union
        "d": 3.0,
        **dict.fromkeys(("s", "q", "e", "f", "j", "g", "h"), 5.0),  # all meet in the concatenation
    }
    text = cache_to_text(cache)
    assert text.splitlines()[0] == "TRT-100300-EntropyCalibration2"
    assert "d: 3cc18306" in text.splitlines()  # 3 / 127 as a float32
    assert cache_from_text(text) == cache


@pytest.mark.parametrize(("center", "scale"), [(128.0, 1.0), (100.0, 155.0 / 127)])
def test_centred_pixels_have_scale_one(center: float, scale: float) -> None:
    model = onnx_model(
        """agraph (uint8[N,8,8,4] image) => (float[N,4,8,8] y) {
            x = Cast <to = 1> (image) t = Transpose <perm = [0, 3, 1, 2]> (x)
            z = Sub (t, center) y = Conv (z, w) }""",
        w=weight(4, 4, 1, 1), center=np.float32(center),
    )  # fmt: skip
    cache = make_cache(model, _table())
    assert cache.scales["z"] == np.float32(scale)
    assert cache.scales["t"] == np.float32(255 / 127)


def test_a_tensor_without_a_range_is_named() -> None:
    with pytest.raises(CalibrationError, match=r"no range for tensor 'd' \(1 of 14 missing\)"):
        make_cache(_model(), _table(r=(0.0, 2.0), q=(0.0, 4.0)))


def test_a_range_that_is_not_finite_is_named() -> None:
    with pytest.raises(CalibrationError, match="'d' has the range inf"):
        make_cache(_model(), _table(r=(0.0, 2.0), d=(0.0, float("inf")), q=(0.0, 4.0)))


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8", exclude_characters="\n\r"), min_size=1),
        st.floats(0, allow_nan=False, allow_infinity=False, width=32),
        max_size=5,
    ),
    st.sampled_from([(8, 5, 2), (10, 3, 0), (10, 14, 1), (11, 4, 1)]),
)
def test_round_trip_is_bit_exact(scales: dict[str, float], version: tuple[int, int, int]) -> None:
    cache = CalibrationCache(version, {name: np.float32(scale) for name, scale in scales.items()})
    again = cache_from_text(cache_to_text(cache))
    assert again.tensorrt == version
    assert list(again.scales) == list(cache.scales)
    for name, scale in cache.scales.items():
        assert again.scales[name].tobytes() == (scale + np.float32(0)).tobytes()


def test_a_file_of_tensorrts_own_calibration_is_read() -> None:
    # From a published calibration with TensorRT 8.4.1; 0 stands where a tensor has no scale.
    text = "TRT-8401-EntropyCalibration2\ninput: 3caa54fc\n(Unnamed Layer* 64) [Shuffle]_output: 0\n404: 3d5c11b5\n"
    cache = cache_from_text(text)
    assert cache.tensorrt == (8, 4, 1)
    assert cache.scales["(Unnamed Layer* 64) [Shuffle]_output"] == 0
    assert cache.scales["input"] == np.float32(0.020792477)
    assert cache_to_text(cache) == text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the first line is ''"),
        ("input: 3caa54fc\n", "the first line is 'input: 3caa54fc'"),
        ("TRT-8401-MinMaxCalibration\n", "should be TRT-<version>-EntropyCalibration2"),
        ("TRT-8401-EntropyCalibration2\ninput: 3caa54fc", "breaks off in line 2"),
        ("TRT-8401-EntropyCalibration2\ninput 3caa54fc\n", "line 2 .* not 'tensor: hexadecimal scale'"),
        ("TRT-8401-EntropyCalibration2\na: 3c\nb: 0.5\n", "line 3 "),
        ("TRT-8401-EntropyCalibration2\na: 7f800000\n", "gives 'a' the scale inf"),
        ("TRT-8401-EntropyCalibration2\na: 7fc00000\n", "gives 'a' the scale nan"),
        ("TRT-8401-EntropyCalibration2\na: bf800000\n", "gives 'a' the scale -1.0"),
        ("TRT-8401-EntropyCalibration2\na: 3c\na: 3d\n", "names tensor 'a' a second time"),
    ],
)
def test_what_is_no_cache_is_refused(text: str, message: str) -> None:
    with pytest.raises(IntegrityError, match=message):
        cache_from_text(text)


def test_a_name_with_a_line_break_is_refused() -> None:
    with pytest.raises(CalibrationError, match="cannot stand in a calibration cache"):
        cache_to_text(CalibrationCache((10, 3, 0), {"a\nb": np.float32(1)}))
