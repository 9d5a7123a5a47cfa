"""The manifest: strict in what it reads, complete in what it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bundle_fixtures import make_manifest

from pipeline.artifacts import StageRecord
from pipeline.errors import IntegrityError, UnsupportedError
from pipeline.manifest import (
    SCHEMA_VERSION,
    CandidateRecord,
    Deployment,
    FileRecord,
    Manifest,
    Measurement,
    manifest_from_json,
    manifest_json_schema,
    manifest_to_json,
)

COMPLETE = replace(make_manifest(), files={"model.int8.onnx": FileRecord(4, "1" * 64)})


DEVICE = replace(
    COMPLETE,
    target="jetson-orin-nx-16gb",
    engine=None,
    files={"model.int8.onnx": FileRecord(4, "1" * 64), "model.fp16.onnx": FileRecord(4, "2" * 64)},
    deployment=Deployment(
        sm=87,
        jetpack="6.2",
        tensorrt="10.3",
        max_drop_points=0.5,
        candidates=(
            CandidateRecord("int8", "model.int8.onnx", "int8", "everywhere", COMPLETE.accuracy, True),
            CandidateRecord("fp16", "model.fp16.onnx", "fp16", "to beat", None, True),
        ),
        chosen="int8",
        measurements=(Measurement("int8", 1000, 12.5, None, None), Measurement("fp16", 1800, 9.0, 1.5, 1.9)),
        notes=("loads in TensorRT-RTX only",),
    ),
)


def changed(path: str, value: Any) -> bytes:
    """The JSON of a good manifest with one value replaced; `...` removes it."""
    tree = json.loads(manifest_to_json(COMPLETE))
    *parents, last = path.split("/")
    node = tree
    for key in parents:
        node = node[int(key) if isinstance(node, list) else key]
    if value is ...:
        del node[last]
    else:
        node[last] = value
    return json.dumps(tree).encode()


def test_what_is_written_is_read_back_equal() -> None:
    assert manifest_from_json(manifest_to_json(COMPLETE)) == COMPLETE


def test_what_may_be_absent_may_be_absent() -> None:
    bare = replace(COMPLETE, calibration=None, accuracy=None, stages=(), labels=(), precision="fp32")
    assert manifest_from_json(manifest_to_json(bare)) == bare


def test_a_bundle_for_a_device_is_read_back_equal_and_has_no_engine_until_it_is_finished() -> None:
    manifest = manifest_from_json(manifest_to_json(DEVICE))
    assert manifest == DEVICE
    with pytest.raises(UnsupportedError, match=r"edgefold finish.*jetson-orin-nx-16gb"):
        manifest.ready_engine()
    assert COMPLETE.ready_engine() is COMPLETE.engine


def test_a_candidate_that_is_not_there_is_refused() -> None:
    missing = replace(DEVICE, files={"model.int8.onnx": FileRecord(4, "1" * 64)})
    with pytest.raises(IntegrityError, match=r"model\.fp16\.onnx"):
        manifest_to_json(missing)


def test_neither_engine_nor_deployment_is_no_bundle() -> None:
    with pytest.raises(IntegrityError, match="neither"):
        manifest_to_json(replace(COMPLETE, engine=None))


def test_an_older_schema_has_to_be_built_again() -> None:
    with pytest.raises(UnsupportedError, match=rf"version 1.*reads {SCHEMA_VERSION}.*again"):
        manifest_from_json(changed("schema_version", 1))


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("comment", "hi", "comment"),
        ("preprocess/gamma", 2.2, "preprocess.gamma"),
        ("files/model.int8.onnx/mtime", 1, "mtime"),
        ("engine/fingerprint/driver", "x", "driver"),
        ("labels", ..., "labels"),
        ("files", ..., "does not list"),
        ("model/num_classes", ..., "num_classes"),
        ("model/num_classes", "3", "num_classes"),
        ("model/num_classes", 0, "num_classes"),
        ("preprocess_folded", 1, "preprocess_folded"),
        ("precision", "int4", "precision"),
        ("preprocess/resize", "stretch", "resize"),
        ("preprocess/mean", [0.5, 0.5], "mean"),
        ("inputs/0/shape", [1.5], "shape"),
        ("created_utc", "yesterday", "created_utc"),
        ("files/model.int8.onnx/sha256", "1" * 63, "sha256"),
        ("files/model.int8.onnx/sha256", "A" * 64, "sha256"),
        ("files/model.int8.onnx/size_bytes", -1, "size_bytes"),
        ("calibration/n_samples", 0, "n_samples"),
        ("engine/file", "model.plan", "does not list"),
        ("schema_version", 0, "schema_version"),
        ("schema_version", "1", "schema_version"),
        ("schema_version", ..., "schema_version"),
    ],
)
def test_anything_else_is_refused_by_name(path: str, value: Any, words: str) -> None:
    with pytest.raises(IntegrityError, match=words):
        manifest_from_json(changed(path, value))


@pytest.mark.parametrize(
    "name",
    [
        "../model.onnx",
        "/etc/passwd",
        "sub/model.onnx",
        "sub\\model.onnx",
        "..",
        ".",
        "",
        ".hidden",
        "a" * 129,
        "a\n",
    ],
)
def test_a_name_that_is_no_plain_file_name_is_refused(name: str) -> None:
    record = {"size_bytes": 1, "sha256": "1" * 64}
    with pytest.raises(IntegrityError, match="files"):
        manifest_from_json(changed(f"files/{name}" if "/" not in name else "files", record | {name: record}))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"\xff\xfe",
        b'{"schema_version": 1, "schema_version": 1}',
        b'{"schema_version": 1, "x": NaN}',
        b"[" * 100_000,
    ],
)
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"manifest\.json"):
        manifest_from_json(data)


def test_a_newer_schema_asks_for_a_newer_edgefold() -> None:
    tree = json.loads(manifest_to_json(COMPLETE))
    tree |= {"schema_version": SCHEMA_VERSION + 1, "edgefold_version": "9.9", "new_field": True}
    with pytest.raises(
        UnsupportedError, match=rf"version {SCHEMA_VERSION + 1}.*up to {SCHEMA_VERSION}.*9\.9"
    ):
        manifest_from_json(json.dumps(tree).encode())


def test_checks_that_measured_nothing_finite_are_written_as_words() -> None:
    checks = {
        "sqnr_db": float("inf"),
        "per_output": [float("nan"), 1.0],
        "n": np.int64(3),
        "e": np.float32(-np.inf),
    }
    stage = StageRecord("export", (), (), 0.1, checks)
    read = manifest_from_json(manifest_to_json(replace(COMPLETE, stages=(stage,))))
    assert read.stages[0].checks == {"sqnr_db": "inf", "per_output": ["nan", 1.0], "n": 3, "e": "-inf"}


@pytest.mark.parametrize(
    "broken",
    [
        replace(COMPLETE, accuracy=replace(COMPLETE.accuracy, sqnr_db=float("inf"))),  # type: ignore[type-var]
        replace(COMPLETE, stages=(StageRecord("fold", (), (), 0.1, {"path": object()}),)),
        replace(COMPLETE, created_utc="2026-11-23"),
        replace(COMPLETE, model=replace(COMPLETE.model, weights_sha256="none")),
    ],
)
def test_a_manifest_that_could_not_be_read_back_is_not_written(broken: Manifest) -> None:
    with pytest.raises(IntegrityError):
        manifest_to_json(broken)


def test_every_field_is_described_in_the_documentation() -> None:
    page = (Path(__file__).parents[2] / "docs" / "bundle-format.md").read_text(encoding="utf-8")
    schema = manifest_json_schema()
    names = set(schema["properties"])
    for item in (
        "ModelSource",
        "CalibrationSummary",
        "AccuracySummary",
        "FileRecord",
        "StageRecord",
        "Deployment",
        "CandidateRecord",
        "Measurement",
    ):
        names |= set(schema["$defs"][item]["properties"])
    names -= {"table_sha256", "statistics_sha256"}  # in words there
    assert not {name for name in names if f"`{name}`" not in page}


def test_the_json_schema_names_every_field_and_forbids_others() -> None:
    schema = manifest_json_schema()
    assert set(schema["required"]) == set(json.loads(manifest_to_json(COMPLETE)))
    assert schema["additionalProperties"] is False
    assert all(item.get("additionalProperties") is False for item in schema["$defs"].values())
