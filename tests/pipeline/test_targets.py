"""The target table is consistent, and impossible combinations are refused with both sides and a remedy."""

from __future__ import annotations

import dataclasses

import pytest

from pipeline.errors import UnsupportedError, UsageError
from pipeline.target_entry import TENSORRT_RTX_SMS, TensorRtWindow, version_key
from pipeline.targets import JETPACKS, OLDEST_TENSORRT, TARGETS, find_target, jetpacks_of, preflight

BUILDABLE = [target for target in TARGETS if target.buildable]


def test_names_and_aliases_are_unique() -> None:
    names = [name for target in TARGETS for name in (target.name, *target.aliases)]
    assert len(names) == len(set(names))
    for name in names:
        assert name in (found := find_target(name)).aliases or found.name == name


@pytest.mark.parametrize("target", [t for t in TARGETS if t.family == "tensorrt"], ids=lambda t: t.name)
def test_an_entry_has_sources_and_plausible_figures(target) -> None:
    assert target.sources
    assert all(source.url.startswith("https://") and source.figures for source in target.sources)
    for peaks in filter(None, (target.peaks, target.super_peaks)):
        assert peaks.bandwidth_gb_s
        if peaks.int8_tops and peaks.fp16_tflops:
            # Twice fp16 on tensor cores; four times where GeForce halves fp16 with float32 accumulation.
            assert 1.9 <= peaks.int8_tops / peaks.fp16_tflops <= 4.1
        assert (peaks.dla_int8_tops is not None) == (target.dla_cores > 0)
    if target.super_peaks is not None:
        assert target.super_peaks.int8_tops > target.peaks.int8_tops
    if target.peaks.int8_tops is None and "int8" in target.precisions:
        assert target.note, "an int8 device without an int8 figure says why"
    assert target.tensorrt_rtx == (target.buildable and target.sm in TENSORRT_RTX_SMS)


@pytest.mark.parametrize("target", BUILDABLE, ids=lambda t: t.name)
def test_what_can_be_built_has_a_release_to_build_with(target) -> None:
    if target.kind == "jetson":
        assert jetpacks_of(target)
        for release in jetpacks_of(target):
            done = preflight(target, precision="int8", jetpack=release.version)
            assert (done.jetpack, done.tensorrt) == (release, release.tensorrt)
            assert version_key(release.tensorrt) >= version_key(OLDEST_TENSORRT)
    elif target.family == "tensorrt":
        assert target.tensorrt is not None
        assert preflight(target, precision="int8", tensorrt="11.4.1").tensorrt == "11.4.1"


def test_jetpacks_are_in_order() -> None:
    keys = [version_key(release.version) for release in JETPACKS]
    assert keys == sorted(keys)


def test_the_whole_jetpack_and_sm_matrix() -> None:
    """Facts: 6.x has Orin only, 7.0 and 7.1 Thor only, 7.2 and later both."""
    taken = {
        (target.name, release.version)
        for target in TARGETS
        for release in jetpacks_of(target)
        if target.aliases
    }
    orin = {"jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb"}
    expected = {(name, version) for name in orin for version in ("6.1", "6.2", "7.2", "7.2.2")}
    expected |= {("jetson-thor-t5000", version) for version in ("7.0", "7.1", "7.2", "7.2.2")}
    assert taken == expected


def test_a_newer_patch_counts_as_the_release_before_it() -> None:
    orin = find_target("jetson-orin-nx")
    assert preflight(orin, precision="int8", jetpack="6.2.1").jetpack.version == "6.2"
    assert preflight(orin, precision="int8", jetpack="7.2.1").tensorrt == "10.16.2"
    assert preflight(orin, precision="int8", jetpack="7.2.3").tensorrt == "11.4.1"


def test_without_a_jetpack_the_choice_is_named() -> None:
    done = preflight(find_target("jetson-agx-orin"), precision="fp16")
    assert done.jetpack is None
    assert done.tensorrt is None
    assert any("6.1, 6.2, 7.2 or 7.2.2" in note for note in done.notes)


REFUSED = [
    ("jetson-orin-nx", {"jetpack": "7.1"}, ["sm_87", "10.13", "sm_110", "6.1, 6.2, 7.2 or 7.2.2"]),
    ("jetson-thor", {"jetpack": "6.2"}, ["sm_110", "10.3", "sm_87", "7.0, 7.1, 7.2 or 7.2.2"]),
    ("jetson-orin-nx", {"jetpack": "5.1.2"}, ["8.5", OLDEST_TENSORRT]),
    ("jetson-orin-nx", {"jetpack": "8.0"}, ["JetPack 8.0 is not in the table"]),
    ("jetson-orin-nx", {"jetpack": "6.2", "tensorrt": "10.8"}, ["10.8", "JetPack 6.2", "10.3"]),
    ("jetson-orin-nx", {"tensorrt": "10.13"}, ["10.13 is in no JetPack", "10.3, 10.16.2 or 11.4.1"]),
    ("jetson-orin-nx", {"jetpack": "7.2", "dla": True}, ["10.16.2", "no DLA", "JetPack 6.2"]),
    ("jetson-orin-nx", {"jetpack": "7.2.2", "dla": True}, ["AGX Orin only"]),
    ("jetson-agx-orin", {"tensorrt": "10.16.2", "dla": True}, ["no DLA"]),
    ("jetson-thor", {"dla": True}, ["no DLA"]),
    ("l4", {"dla": True}, ["no DLA"]),
    ("l4", {"jetpack": "6.2"}, ["no Jetson", "leave --jetpack out"]),
    ("l4", {"tensorrt": "8.6.1"}, ["too old", OLDEST_TENSORRT]),
    ("rtx-5090", {"tensorrt": "10.7.1"}, ["sm_120", "10.8 or later"]),
    ("cpu", {"tensorrt": "10.3"}, ["--tensorrt"]),
    ("jetson-xavier-nx", {}, ["JetPack 5.1", "TensorRT 8.5", OLDEST_TENSORRT]),
    ("jetson-nano", {}, ["JetPack 4.6", "TensorRT 8.2"]),
]


@pytest.mark.parametrize(("name", "options", "said"), REFUSED)
def test_what_cannot_work_is_refused_with_both_sides(name, options, said) -> None:
    with pytest.raises(UnsupportedError) as caught:
        preflight(find_target(name), precision="int8", **options)
    for words in said:
        assert words in str(caught.value)


@pytest.mark.parametrize(
    ("name", "precision"), [("cpu", "fp16"), ("t4", "bf16"), ("jetson-orin-nx", "fp8"), ("l4", "int4")]
)
def test_a_precision_the_device_lacks(name, precision) -> None:
    with pytest.raises(UnsupportedError, match=f"{precision} is no precision of {find_target(name).name}"):
        preflight(find_target(name), precision=precision)


def test_dla_takes_int8_and_fp16_where_the_release_has_it() -> None:
    orin = find_target("jetson-agx-orin")
    for release in ("6.1", "6.2", "7.2.2"):
        assert any(
            "dynamic" in note for note in preflight(orin, precision="int8", jetpack=release, dla=True).notes
        )
    with pytest.raises(UnsupportedError, match="int8 and fp16, not bf16"):
        preflight(orin, precision="bf16", jetpack="6.2", dla=True)


def test_a_version_that_is_none() -> None:
    for options in ({"jetpack": "six"}, {"tensorrt": "10.x"}, {"tensorrt": ""}):
        with pytest.raises(UsageError, match="numbers with dots"):
            preflight(find_target("jetson-agx-orin"), precision="int8", **options)


@pytest.mark.parametrize(
    ("asked", "near"),
    [
        ("jetson-orin", "jetson-orin-nx-16gb"),
        ("l40", "l40s"),
        ("h1000", "h100"),
        ("orin-nx", "jetson-orin-nx"),
    ],
)
def test_an_unknown_name_gets_near_ones(asked, near) -> None:
    with pytest.raises(UnsupportedError) as caught:
        find_target(asked)
    assert near in str(caught.value)
    assert "edgefold targets" in str(caught.value)


def test_a_name_is_found_however_it_is_written() -> None:
    assert find_target("Jetson_Orin_NX").name == "jetson-orin-nx-16gb"
    assert find_target(" L4 ").name == "l4"


def test_a_window_holds_what_lies_inside() -> None:
    window = TensorRtWindow("10.3", "10.7")
    assert [window.holds(v) for v in ("10.2.9", "10.3", "10.7", "10.7.1", "10.8", "11.0")] == [
        False, True, True, True, False, False,
    ]  # fmt: skip
    assert TensorRtWindow(None).holds("9.0")
    board = dataclasses.replace(find_target("l4"), tensorrt=window)
    with pytest.raises(UnsupportedError, match=r"no sm_89.*use 10\.3 to 10\.7"):
        preflight(board, precision="int8", tensorrt="10.8")
