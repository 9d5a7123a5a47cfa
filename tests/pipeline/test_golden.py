"""Golden frames: what a build keeps, and that every mistake of a live path is found and named."""

from __future__ import annotations

import dataclasses
import io
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_fixtures import make_manifest
from numpy.typing import NDArray
from PIL import Image

from pipeline.artifacts import Frame, PreprocessSpec, TensorSpec, YuvCoding
from pipeline.bundle import Bundle, BundleWriter
from pipeline.contracts import Outputs
from pipeline.errors import DataError, EngineError, IntegrityError
from pipeline.golden import LOGITS_LIMIT_DB, check_live_path, golden_logits
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, make_golden, read_golden
from pipeline.preprocess import affine, normalize, to_network_pixels
from pipeline.yuv import planes_of

IMAGENET = PreprocessSpec(
    (75, 75),
    interpolation="bicubic",
    crop_fraction=0.875,
    mean=(0.485, 0.456, 0.406),
    std=(0.229, 0.224, 0.225),
)
Prepare = Callable[[Frame], NDArray[Any]]


class MeanRunner:
    """Answers with the mean of each channel and their products, plus `noise`; takes pixels or floats."""

    reuses_outputs = False
    n_streams = 1

    def __init__(
        self, spec: PreprocessSpec, takes_pixels: bool = True, noise: float = 0.0, batch: int | str = "batch"
    ) -> None:
        shape = (batch, *spec.input_hw, 3) if takes_pixels else (batch, 3, *spec.input_hw)
        self.inputs = (TensorSpec("input", "uint8" if takes_pixels else "float32", shape),)
        self.outputs = (TensorSpec("logits", "float32", (batch, 3)),)
        self.noise = noise
        self._batch = batch

    def infer(self, inputs: Mapping[str, NDArray[Any]]) -> Outputs:
        image = inputs["input"]
        assert image.ndim == 4
        assert isinstance(self._batch, str) or image.shape[0] == self._batch
        axes = (1, 2) if self.inputs[0].dtype == "uint8" else (2, 3)
        means = image.astype(np.float32).mean(axis=axes)
        ripple = self.noise * np.array([1.0, -1.0, 1.0], np.float32)
        return {"logits": (means + ripple).astype(np.float32)}

    def submit(self, inputs: Mapping[str, NDArray[Any]]) -> Future[Outputs]:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def __enter__(self) -> MeanRunner:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def write_bundle(
    path: Path, spec: PreprocessSpec, folded: bool = True, content: bytes | None = None
) -> Bundle:
    """A bundle with golden frames, whose engine's answers are `MeanRunner`'s."""
    golden = make_golden(spec, "BGR")
    runner = MeanRunner(spec, folded)
    logits = golden_logits(golden, runner, spec, "BGR")
    golden = dataclasses.replace(golden, logits={"model.onnx": logits, "model.int8.onnx": logits})
    manifest = dataclasses.replace(
        make_manifest(), preprocess=spec, inputs=runner.inputs, preprocess_folded=folded
    )
    with BundleWriter(path) as writer:
        for name in ("model.onnx", "model.int8.onnx"):
            writer.add_file(name, b"graph")
        writer.add_file(GOLDEN_NAME, golden_to_bytes(golden) if content is None else content)
        return writer.commit(manifest)


@pytest.fixture(scope="module")
def folded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("golden") / "folded", IMAGENET)


@pytest.fixture(scope="module")
def unfolded(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return write_bundle(tmp_path_factory.mktemp("golden") / "unfolded", IMAGENET, folded=False)


def pixels_of(frame: Frame, spec: PreprocessSpec = IMAGENET) -> NDArray[np.uint8]:
    return to_network_pixels(frame.image, frame.pixel_format, spec, "BGR", yuv=frame.yuv)


def floats_of(frame: Frame) -> NDArray[np.float32]:
    return normalize(pixels_of(frame)[np.newaxis], IMAGENET, "BGR")


@pytest.mark.parametrize("batched", [True, False])
def test_the_right_path_is_verified_to_the_bit(folded: Bundle, batched: bool) -> None:
    def prepare(frame: Frame) -> NDArray[Any]:
        return pixels_of(frame)[np.newaxis] if batched else pixels_of(frame)

    report = check_live_path(folded, prepare, MeanRunner(IMAGENET))
    assert report.verified
    assert report.formats == ("BGR", "RGB", "BGRA", "GRAY", "I420")
    assert report.max_levels == 0
    assert report.planes_levels is not None
    assert 0 < report.planes_levels < 2.5
    assert report.logits_db == float("inf")
    assert report.summary().startswith(
        f"verified {report.checked_utc}: 4 golden frames as BGR RGB BGRA GRAY I420"
    )
    assert report.to_json()["logits_db"] == "inf"


def test_normalized_floats_are_verified_too(unfolded: Bundle) -> None:
    report = check_live_path(unfolded, floats_of, MeanRunner(IMAGENET, takes_pixels=False))
    assert report.verified
    assert report.max_levels <= 0.01


def test_one_level_of_another_rounding_passes_and_two_do_not(folded: Bundle) -> None:
    def off_by(levels: int) -> Prepare:
        return lambda frame: np.clip(pixels_of(frame).astype(int) + levels, 0, 255).astype(np.uint8)

    assert check_live_path(folded, off_by(1), None).max_levels == 1
    with pytest.raises(IntegrityError, match=r"differs by up to 2 levels \(limit 1\).* resampled or rounded"):
        check_live_path(folded, off_by(2), None)


def as_cv2(frame: Frame) -> NDArray[np.uint8]:
    """What ``cv2.resize(frame, (75, 75))`` does: squash, plain bilinear."""
    image = np.ascontiguousarray(frame.image if frame.image.ndim == 3 else np.stack([frame.image] * 3, -1))
    height, width = image.shape[:2]
    rgb = Image.fromarray(image[..., :3])
    squashed = rgb.transform(
        (75, 75),
        Image.Transform.AFFINE,
        (width / 75, 0, 0, 0, height / 75, 0),
        Image.Resampling.BILINEAR,
    )
    pixels = np.asarray(squashed)
    return pixels if frame.pixel_format.startswith("BGR") or frame.image.ndim == 2 else pixels[..., ::-1]


PIXEL_MISTAKES: dict[str, tuple[Prepare, str]] = {
    "swapped": (lambda f: pixels_of(f)[..., ::-1], "channels swapped: red and blue have changed places"),
    "unit range": (
        lambda f: (pixels_of(f) / 255).astype(np.float32),
        r"range: values from 0 to 1 where the engine takes 0 to 255 \(float32 values from 0 to 1\)",
    ),
    "symmetric range": (lambda f: pixels_of(f) / 127.5 - 1, "range: values from −1 to 1"),
    "normalized": (floats_of, "normalization twice.*; axes in the wrong order: the engine takes NHWC"),
    "right but float": (
        lambda f: pixels_of(f).astype(np.float32),
        "The values are right, the type is not: float32 .* the engine takes uint8",
    ),
    "video levels": (
        lambda f: np.rint(16 + pixels_of(f) * (219 / 255)).astype(np.uint8),
        "range: video levels",
    ),
    "stretched": (
        lambda f: np.clip((pixels_of(f) - 16.0) * 255 / 219, 0, 255).astype(np.uint8),
        "range: full levels were stretched",
    ),
    "upside down": (lambda f: pixels_of(f)[::-1], "upside down"),
    "mirrored": (lambda f: pixels_of(f)[:, ::-1], "mirrored"),
    "turned": (lambda f: pixels_of(f)[::-1, ::-1], "turned by 180°"),
    "squashed": (
        lambda f: pixels_of(f, dataclasses.replace(IMAGENET, resize="squash", crop_fraction=1.0)),
        "crop: the frame is squashed",
    ),
    "not cropped": (
        lambda f: pixels_of(f, dataclasses.replace(IMAGENET, crop_fraction=1.0)),
        "crop: the whole frame is taken where the bundle crops to 0.875",
    ),
    "nearest": (
        lambda f: pixels_of(f, dataclasses.replace(IMAGENET, interpolation="nearest")),
        "interpolation: nearest where the bundle has bicubic, antialiased",
    ),
    "not antialiased": (
        lambda f: pixels_of(f, dataclasses.replace(IMAGENET, antialias=False)),
        "interpolation: antialias=False where the bundle has bicubic, antialiased",
    ),
    "cv2.resize": (as_cv2, "squashed to the network's size with plain bilinear, as cv2.resize"),
    "cv2.resize, swapped": (
        lambda f: as_cv2(f)[..., ::-1],
        "channels swapped.*; crop and interpolation: squashed .* as cv2.resize",
    ),
    "another size": (
        lambda f: pixels_of(f, dataclasses.replace(IMAGENET, input_hw=(64, 64))),
        r"The size is wrong: it gives uint8 of shape \(64, 64, 3\), the engine takes \(75, 75, 3\)",
    ),
    "axes": (
        lambda f: pixels_of(f).transpose(2, 0, 1),
        "axes in the wrong order: the engine takes NHWC",
    ),
    "noise": (
        lambda f: np.random.default_rng(0).integers(0, 256, (75, 75, 3), dtype=np.uint8),
        "No known mistake explains it",
    ),
}


@pytest.mark.parametrize("mistake", PIXEL_MISTAKES)
def test_a_mistake_of_a_pixel_path_is_named(folded: Bundle, mistake: str) -> None:
    prepare, named = PIXEL_MISTAKES[mistake]
    with pytest.raises(IntegrityError, match=named):
        check_live_path(folded, prepare, None)


FLOAT_MISTAKES: dict[str, tuple[Prepare, str]] = {
    "raw": (
        lambda f: pixels_of(f)[..., ::-1].transpose(2, 0, 1).astype(np.float32),
        "normalization missing: values from 0 to 255",
    ),
    "unit": (
        lambda f: pixels_of(f)[..., ::-1].transpose(2, 0, 1).astype(np.float32) / 255,
        "normalization missing: values from 0 to 1",
    ),
    "twice": (
        lambda f: (
            (floats_of(f)[0].transpose(1, 2, 0) * affine(IMAGENET)[0] + affine(IMAGENET)[1])
            .transpose(2, 0, 1)
            .astype(np.float32)
        ),
        "normalization twice: the normalized values were normalized again",
    ),
    "swapped before": (
        lambda f: normalize(pixels_of(f)[np.newaxis, ..., ::-1], IMAGENET, "BGR"),
        "channels swapped",
    ),
    "axes": (lambda f: floats_of(f)[0].transpose(1, 2, 0), "axes in the wrong order: the engine takes NCHW"),
}


@pytest.mark.parametrize("mistake", FLOAT_MISTAKES)
def test_a_mistake_of_a_normalizing_path_is_named(unfolded: Bundle, mistake: str) -> None:
    prepare, named = FLOAT_MISTAKES[mistake]
    with pytest.raises(IntegrityError, match=named):
        check_live_path(unfolded, prepare, None)


def test_a_format_that_is_refused_is_told_and_one_that_is_misread_fails(folded: Bundle) -> None:
    def only_bgr(frame: Frame) -> NDArray[np.uint8]:
        if frame.pixel_format != "BGR":
            raise DataError("BGR only")
        return pixels_of(frame)

    report = check_live_path(folded, only_bgr, None)
    assert report.formats == ("BGR",)
    assert report.refused == ("RGB", "BGRA", "GRAY", "I420")
    assert report.planes_levels is None

    def rgb_for_bgr(frame: Frame) -> NDArray[np.uint8]:
        return to_network_pixels(
            frame.image, "BGR" if frame.pixel_format == "RGB" else frame.pixel_format, IMAGENET, "BGR"
        )

    with pytest.raises(IntegrityError, match=r"as RGB\) differs.*channels swapped"):
        check_live_path(folded, rgb_for_bgr, None)

    def nothing(frame: Frame) -> NDArray[np.uint8]:
        raise DataError("no BGR")

    with pytest.raises(DataError, match="no BGR"):
        check_live_path(folded, nothing, None)


def swapped_planes(frame: Frame) -> NDArray[np.uint8]:
    """U and V in the wrong places."""
    y, u, v = planes_of(frame.image)
    return np.concatenate([y.reshape(-1), v.reshape(-1), u.reshape(-1)]).reshape(frame.image.shape)


PLANES_MISTAKES: dict[str, tuple[Prepare, str]] = {
    "colours": (lambda f: pixels_of(f)[..., ::-1], "channels swapped"),
    "planes": (
        lambda f: pixels_of(dataclasses.replace(f, image=swapped_planes(f))),
        "No known mistake|channels swapped",
    ),
    "matrix": (
        lambda f: pixels_of(dataclasses.replace(f, yuv=YuvCoding("bt601", f.yuv.full_range, "center"))),  # type: ignore[union-attr]
        "right on average",
    ),
    "range": (
        lambda f: pixels_of(dataclasses.replace(f, yuv=YuvCoding(f.yuv.matrix, True, "center"))),  # type: ignore[union-attr]
        "No known mistake explains it",  # half of the frames have full range, and are right
    ),
}


@pytest.mark.parametrize("mistake", PLANES_MISTAKES)
def test_a_mistake_with_planes_is_named(folded: Bundle, mistake: str) -> None:
    """The other formats are right, as where only one source delivers planes."""
    prepare, named = PLANES_MISTAKES[mistake]

    def wrong_for_planes(frame: Frame) -> NDArray[np.uint8]:
        return prepare(frame) if frame.pixel_format == "I420" else pixels_of(frame)

    with pytest.raises(IntegrityError, match=rf"as I420\) differs by \d+ levels on average.*({named})"):
        check_live_path(folded, wrong_for_planes, None)


def test_rows_padded_in_a_wider_buffer_are_handed_over(folded: Bundle) -> None:
    """A path that takes the buffer for contiguous sees sheared pictures."""

    def ignores_strides(frame: Frame) -> NDArray[np.uint8]:
        base = frame.image.base
        if frame.pixel_format != "BGR" or base is None:
            return pixels_of(frame)
        flat = np.asarray(base).reshape(-1)[: frame.image.size]
        return pixels_of(dataclasses.replace(frame, image=flat.reshape(frame.image.shape)))

    with pytest.raises(IntegrityError, match="as BGR"):
        check_live_path(folded, ignores_strides, None)


def test_an_engine_that_answers_otherwise_is_refused(folded: Bundle) -> None:
    assert check_live_path(folded, pixels_of, MeanRunner(IMAGENET, noise=1.0)).logits_db is not None
    with pytest.raises(
        IntegrityError, match=r"answers otherwise than at the build: -?\d+\.\d dB .*at least 15"
    ):
        check_live_path(folded, pixels_of, MeanRunner(IMAGENET, noise=60.0))
    # As fp32 the same small difference is too much.
    with pytest.raises(IntegrityError, match="at least 60 for fp32"):
        check_live_path(folded, pixels_of, MeanRunner(IMAGENET, noise=1.0), file="model.onnx")
    with pytest.raises(EngineError, match="not finite"):
        check_live_path(folded, pixels_of, MeanRunner(IMAGENET, noise=float("nan")))


def test_an_engine_of_one_batch_size_is_given_full_batches(folded: Bundle) -> None:
    assert check_live_path(folded, pixels_of, MeanRunner(IMAGENET, batch=4)).logits_db == float("inf")


def test_a_bundle_from_before_says_so(tmp_path: Path) -> None:
    with BundleWriter(tmp_path / "old") as writer:
        writer.add_file("model.onnx", b"graph")
        writer.add_file("model.int8.onnx", b"graph")
        old = writer.commit(make_manifest())
    report = check_live_path(old, pixels_of, None)
    assert not report.verified
    assert report.summary() == "not verified: the bundle was built before golden frames; build it again"


def test_preprocessing_that_does_not_resize_has_frames_of_its_size(tmp_path: Path) -> None:
    spec = PreprocessSpec((40, 24), resize="none")
    bundle = write_bundle(tmp_path / "fixed", spec)
    golden = read_golden(bundle)
    assert golden is not None
    assert {image.shape for image in golden.images} == {(40, 24, 3)}

    def swapped(frame: Frame) -> NDArray[np.uint8]:
        return pixels_of(frame, spec)[..., ::-1]

    with pytest.raises(IntegrityError, match="channels swapped"):
        check_live_path(bundle, swapped, None)


def test_the_frames_have_full_range_odd_sizes_and_are_the_same_every_time() -> None:
    golden = make_golden(IMAGENET, "BGR")
    assert golden_to_bytes(golden) == golden_to_bytes(make_golden(IMAGENET, "BGR"))
    sizes = [image.shape[:2] for image in golden.images]
    assert any(height % 2 and width % 2 for height, width in sizes)
    assert any(height > width for height, width in sizes)
    assert any(width > height for height, width in sizes)
    by_name = dict(zip(golden.names, golden.images, strict=True))
    for name in ("bars", "ramps", "gray"):
        assert by_name[name].min() == 0, name
        assert by_name[name].max() == 255, name
    assert (by_name["gray"] == by_name["gray"][..., :1]).all()


@pytest.mark.parametrize("damage", ["not a zip", "no pixels", "wrong size", "pickle", "bomb"])
def test_a_file_of_another_kind_is_refused(
    tmp_path: Path, damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    golden = make_golden(IMAGENET, "BGR")
    buffer = io.BytesIO()
    if damage == "not a zip":
        buffer.write(b"PK nothing of the kind")
    elif damage == "no pixels":
        np.savez(buffer, **{"frame.a": golden.images[0]})  # type: ignore[arg-type]
    elif damage == "pickle":
        np.savez(buffer, pixels=np.array([{}], object))
    elif damage == "wrong size":
        buffer.write(golden_to_bytes(dataclasses.replace(golden, pixels=golden.pixels[:, :-1])))
    else:
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("pixels.npy", b"\0" * 100_000)
        monkeypatch.setattr("pipeline.golden_frames._MAX_UNPACKED_BYTES", 10_000)
    bundle = write_bundle(tmp_path / "bundle", IMAGENET, content=buffer.getvalue())
    with pytest.raises(IntegrityError, match=r"holds no golden frames: .*; build the bundle again"):
        read_golden(bundle)


def test_every_precision_has_a_limit() -> None:
    assert set(LOGITS_LIMIT_DB) == {"fp32", "fp16", "bf16", "int8"}
