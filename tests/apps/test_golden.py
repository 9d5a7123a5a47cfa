"""Golden frames with real engines: what a build writes is verified, and an engine of another model is not."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from tinted import FACTORY, write_tinted_images
from tolerances import EXPORTED_RELATIVE

from apps.building import build
from apps.cli import main
from apps.golden import check_bundle
from apps.publishing import BuildRequest
from pipeline.bundle import Bundle, BundleWriter, open_bundle
from pipeline.compile import FOLDED_NAME, QUANTIZED_NAME
from pipeline.errors import IntegrityError
from pipeline.golden_frames import GOLDEN_NAME, golden_to_bytes, read_golden
from pipeline.metrics import max_abs_error
from pipeline.preprocess import normalize

pytest.importorskip("torch")


def quiet(what: str, done: int, total: int | None) -> None:
    """A progress callback that draws nothing."""


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    folder = tmp_path_factory.mktemp("golden-build")
    (folder / "model.py").write_text(FACTORY)
    images = write_tinted_images(folder / "images")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EDGEFOLD_CACHE", str(folder / "cache"))
        request = BuildRequest(
            f"{folder / 'model.py'}:classifier", folder / "bundle", calib=str(images), input_size=32
        )
        return build(request, quiet).bundle


def rewritten(
    bundle: Bundle, out: Path, change: Callable[[dict[str, bytes]], None], **changes: object
) -> Bundle:
    """A copy with other files, honestly listed: integrity cannot tell, golden frames can."""
    files = {name: bundle.read_bytes(name) for name in bundle.manifest.files}
    change(files)
    with BundleWriter(out) as writer:
        for name, content in files.items():
            writer.add_file(name, content)
        return writer.commit(dataclasses.replace(bundle.manifest, **changes))  # type: ignore[arg-type]


def test_a_build_keeps_the_answers_of_both_graphs(built: Bundle) -> None:
    golden = read_golden(built)
    assert golden is not None
    assert set(golden.logits) == {FOLDED_NAME, QUANTIZED_NAME}
    assert golden.logits[FOLDED_NAME].shape == (len(golden.names), 2)
    # The network of `tinted` in NumPy: 3×3 sums of red and of blue at stride 2, batch norm, ReLU, mean.
    manifest = built.manifest
    red_blue = normalize(golden.pixels, manifest.preprocess, manifest.input_color)[:, (0, 2)]
    sums = sliding_window_view(red_blue, (3, 3), axis=(2, 3))[:, :, ::2, ::2].sum(axis=(-1, -2))
    expected = np.maximum(sums / np.sqrt(1 + 1e-5), 0).mean(axis=(2, 3))
    assert max_abs_error(expected, golden.logits[FOLDED_NAME]) <= EXPORTED_RELATIVE * expected.max()
    assert built.manifest.files[GOLDEN_NAME].size_bytes < 1 << 20


def test_the_check_of_a_fresh_bundle(built: Bundle, capfd: pytest.CaptureFixture[str]) -> None:
    report = check_bundle(built, None)
    assert report.verified
    assert report.max_levels == 0
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(built.path), "--check", "--json"])
    assert stop.value.code == 0
    printed = json.loads(capfd.readouterr().out)
    assert printed["verified"] is True
    assert printed["summary"].startswith("verified 20")


def test_the_engine_of_another_model_is_found(
    built: Bundle, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The classes changed places on the way: same interface, same digests in the manifest, other answers."""

    def swap_classes(files: dict[str, bytes]) -> None:
        import onnx
        import onnx.numpy_helper as helper

        model = onnx.load_from_string(files[QUANTIZED_NAME])
        gather = onnx.helper.make_node("Gather", ["straight", "order"], [model.graph.output[0].name], axis=1)
        for node in model.graph.node:
            for index, name in enumerate(node.output):
                if name == model.graph.output[0].name:
                    node.output[index] = "straight"
        model.graph.node.append(gather)
        model.graph.initializer.append(helper.from_array(np.array([1, 0], np.int64), "order"))
        files[QUANTIZED_NAME] = model.SerializeToString()

    other = rewritten(built, tmp_path / "other", swap_classes)
    with pytest.raises(SystemExit) as stop:
        main(["inspect", str(other.path), "--check"])
    assert stop.value.code == 5
    assert "answers otherwise than at the build" in " ".join(capfd.readouterr().err.split())


def test_another_preprocessing_than_the_build_s_is_found(built: Bundle, tmp_path: Path) -> None:
    """As after an update that changes the canonical resize: the bundle's pixels are the measure."""
    spec = dataclasses.replace(built.manifest.preprocess, interpolation="nearest")
    other = rewritten(built, tmp_path / "other", lambda files: None, preprocess=spec)
    with pytest.raises(IntegrityError, match=r"interpolation: .* where the bundle has nearest"):
        check_bundle(other, None)


def test_answers_of_another_graph_are_missed_by_name(built: Bundle, tmp_path: Path) -> None:
    def forget(files: dict[str, bytes]) -> None:
        golden = read_golden(built)
        assert golden is not None
        kept: dict[str, NDArray[np.float32]] = {FOLDED_NAME: golden.logits[FOLDED_NAME]}
        files[GOLDEN_NAME] = golden_to_bytes(dataclasses.replace(golden, logits=kept))

    other = rewritten(built, tmp_path / "other", forget)
    with pytest.raises(
        IntegrityError, match=r"has no answers of 'model.int8.onnx'; it has those of model.onnx"
    ):
        check_bundle(other, None)


def test_a_bundle_from_before_says_so(built: Bundle, tmp_path: Path) -> None:
    old = rewritten(built, tmp_path / "old", lambda files: files.pop(GOLDEN_NAME) and None)
    assert (
        check_bundle(open_bundle(old.path), None).summary().startswith("not verified: the bundle was built")
    )
