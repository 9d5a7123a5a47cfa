"""The calls that differ between TensorRT 10.3 and 11.x, on the stand-in: a contract, not a proof.

The worker process is a real one; only the ``tensorrt`` it imports is `fake_site/tensorrt.py`.
"""

from __future__ import annotations

import dataclasses
import json

import pytest

from engines.tensorrt.builder import build_plan, probe_plan
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from pipeline.errors import EngineError, UnsupportedError

VERSIONS = ["10.3.0", "10.13.2", "11.4.0"]


def quiet(*told):
    """No progress."""


def told_to_builder(plan_path):
    """What the stand-in writes into its plan."""
    data = plan_path.read_bytes()
    assert data.startswith(b"ftrt")
    return json.loads(data[64:])


@pytest.mark.parametrize("version", VERSIONS)
def test_one_path_for_all_versions(fake_tensorrt, orin, make_model, tmp_path, version):
    api = fake_tensorrt(version)
    options = TensorRtOptions(
        profiles=(BatchProfile(1, 2, 4),), workspace_bytes=256 << 20, optimization_level=4
    )
    reports = []
    built = build_plan(api, make_model(), tmp_path / "p", options, lambda *told: reports.append(told))
    told = told_to_builder(tmp_path / "p")
    assert told["strongly_typed"] is True
    assert told["flags"] == []
    assert told["pools"] == {"WORKSPACE": 256 << 20}
    assert told["profiles"] == [{"x": [[1, 3, 8, 8], [2, 3, 8, 8], [4, 3, 8, 8]]}]
    assert told["level"] == 4
    assert told["verbosity"] == "DETAILED"
    assert built.version == version
    assert built.compute_capabilities == (87,)
    assert built.device == orin.name
    assert built.inspector == '{"Layers": ["conv at [2, 3, 8, 8]"]}', (
        "with the shapes of the profile's optimum"
    )
    assert built.warnings == ("a warning",)
    assert [done for _, done, _ in reports] == [0, 250, 500, 750, 1000]


def test_compatible_plans(fake_tensorrt, orin, make_model, tmp_path):
    options = TensorRtOptions(version_compatible=True, hardware_compatibility="ampere_plus")
    build_plan(fake_tensorrt(), make_model(), tmp_path / "p", options, quiet)
    told = told_to_builder(tmp_path / "p")
    assert told["flags"] == ["VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"]
    assert told["hardware"] == "AMPERE_PLUS"
    options = TensorRtOptions(hardware_compatibility="same_compute_capability", tiling="moderate")
    build_plan(fake_tensorrt("11.4.0"), make_model(), tmp_path / "p", options, quiet)
    told = told_to_builder(tmp_path / "p")
    assert (told["hardware"], told["tiling"]) == ("SAME_COMPUTE_CAPABILITY", 2)


def test_weak_typing_where_strong_typing_is_refused(fake_tensorrt, orin, make_model, tmp_path):
    api = fake_tensorrt("10.3.0", refuse_strong=True)
    built = build_plan(api, make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    assert not built.strongly_typed
    assert built.warnings[0].startswith("built weakly typed, because TensorRT 10.3.0 refuses")
    told = told_to_builder(tmp_path / "p")
    assert told["strongly_typed"] is False
    assert told["flags"] == ["INT8", "FP16"]  # the types of the stand-in's layers, and no others


def test_no_weak_typing_to_fall_back_to(fake_tensorrt, orin, make_model, tmp_path):
    with pytest.raises(EngineError, match="the graph is refused as strongly typed"):
        build_plan(
            fake_tensorrt("11.4.0", refuse_strong=True),
            make_model(),
            tmp_path / "p",
            TensorRtOptions(),
            quiet,
        )


def test_where_both_fail_the_first_reason_is_told(fake_tensorrt, orin, make_model, tmp_path):
    api = fake_tensorrt("10.3.0", refuse_strong=True, build_error="weak, too")
    with pytest.raises(EngineError, match="the graph is refused as strongly typed"):
        build_plan(api, make_model(), tmp_path / "p", TensorRtOptions(), quiet)


@pytest.mark.parametrize(
    ("asked", "memory", "tried"),
    [
        (None, 600 << 20, ["TensorRT's default", "2048 MiB", "1024 MiB"]),
        (4 << 30, 600 << 20, ["4096 MiB", "2048 MiB", "1024 MiB"]),
        (512 << 20, 600 << 20, []),
    ],
)
def test_less_workspace_where_memory_runs_out(
    fake_tensorrt, orin, make_model, tmp_path, asked, memory, tried
):
    api = fake_tensorrt(memory=memory)
    options = TensorRtOptions(workspace_bytes=asked)
    built = build_plan(api, make_model(), tmp_path / "p", options, quiet)
    assert built.workspace_bytes == 512 << 20
    assert told_to_builder(tmp_path / "p")["pools"] == {"WORKSPACE": 512 << 20}
    assert built.warnings == (*(f"out of memory with a workspace of {t}" for t in tried), "a warning")


def test_out_of_memory_with_every_workspace(fake_tensorrt, orin, make_model, tmp_path):
    options = TensorRtOptions(workspace_bytes=512 << 20)
    with pytest.raises(
        EngineError,
        match=r"on Orin \(nvgpu\) with a workspace of 512 MiB, of 256 MiB, of 128 MiB; .*OutOfMemory.*smaller batch",
    ):
        build_plan(fake_tensorrt(memory=1), make_model(), tmp_path / "p", options, quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}


def test_other_failures_are_not_tried_again(fake_tensorrt, orin, make_model, tmp_path):
    reports = []
    api = fake_tensorrt("11.4.0", build_error="Error Code 10: could not find any implementation")
    with pytest.raises(EngineError, match="cannot build the network: Error Code 10"):
        build_plan(api, make_model(), tmp_path / "p", TensorRtOptions(), lambda *told: reports.append(told))
    assert reports.count(("engine", 0, 1000)) == 1


def test_the_second_build_starts_from_the_timings_of_the_first(fake_tensorrt, orin, make_model, tmp_path):
    options = TensorRtOptions(timing_cache_dir=tmp_path / "timings")
    first = build_plan(fake_tensorrt(kernel="a"), make_model(), tmp_path / "p", options, quiet)
    assert first.timing_cache.name == "10.3.0-Orin-nvgpu-sm87.timing"
    build_plan(fake_tensorrt(kernel="b"), make_model(), tmp_path / "p", options, quiet)
    assert json.loads(first.timing_cache.read_bytes()[32:]) == ["a", "b"]
    other = build_plan(fake_tensorrt("10.13.2"), make_model(), tmp_path / "p", options, quiet)
    assert other.timing_cache != first.timing_cache


@pytest.mark.parametrize("content", [b"damaged", None])
def test_a_timing_cache_that_is_not_accepted(fake_tensorrt, orin, make_model, tmp_path, content):
    import hashlib

    options = TensorRtOptions(timing_cache_dir=tmp_path)
    first = build_plan(fake_tensorrt(), make_model(), tmp_path / "p", options, quiet)
    foreign = b"whole, but TensorRT does not take it"
    first.timing_cache.write_bytes(content or hashlib.sha256(foreign).digest() + foreign)
    again = build_plan(fake_tensorrt(kernel="new"), make_model(), tmp_path / "p", options, quiet)
    assert json.loads(again.timing_cache.read_bytes()[32:]) == ["new"]


def test_another_device_than_the_one_here(fake_tensorrt, orin, make_model, tmp_path):
    with pytest.raises(UnsupportedError, match=r"Orin \(nvgpu\) \(SM 87\); SM 89 was asked for"):
        build_plan(fake_tensorrt(), make_model(), tmp_path / "p", TensorRtOptions(sms=(89,)), quiet)
    options = dataclasses.replace(TensorRtOptions(), sms=(87,))
    assert build_plan(fake_tensorrt(), make_model(), tmp_path / "p", options, quiet).device == orin.name


def test_what_is_no_plan_is_not_published(fake_tensorrt, orin, make_model, tmp_path):
    (tmp_path / "p").write_bytes(b"old")
    with pytest.raises(EngineError, match="something that cannot be told to be a plan"):
        build_plan(fake_tensorrt(plan="foreign"), make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    assert (tmp_path / "p").read_bytes() == b"old"


@pytest.mark.parametrize(("load", "words"), [("crash", "crashed with SIGSEGV"), ("refuse", "Version tag")])
def test_a_plan_that_does_not_load_is_not_published(fake_tensorrt, orin, make_model, tmp_path, load, words):
    (tmp_path / "p").write_bytes(b"old")
    with pytest.raises(EngineError, match=rf"the new plan cannot be loaded by TensorRT 10\.3\.0: .*{words}"):
        build_plan(fake_tensorrt(load=load), make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    assert (tmp_path / "p").read_bytes() == b"old"
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "p"}


def test_loading_is_tried_in_a_process_that_may_die(fake_tensorrt, orin, make_model, tmp_path):
    built = build_plan(fake_tensorrt(), make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    api = fake_tensorrt(load="crash")
    with pytest.raises(EngineError, match=r"cannot be loaded by TensorRT 10\.3\.0: .*crashed with SIGSEGV"):
        probe_plan(api, built.path, built.sha256)
    api = fake_tensorrt(load="refuse")
    with pytest.raises(EngineError, match="Version tag does not match"):
        probe_plan(api, built.path, built.sha256)
