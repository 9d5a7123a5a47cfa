from __future__ import annotations

import pytest

from engines.tensorrt.options import BatchProfile, TensorRtOptions, check_build_options
from pipeline.errors import UnsupportedError, UsageError


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TensorRtOptions(profiles=()), "no batch profile"),
        (TensorRtOptions(profiles=(BatchProfile(1, 8, 4),)), r"1, 8, 4 is out of order"),
        (TensorRtOptions(profiles=(BatchProfile(0, 1, 1),)), r"0, 1, 1 is out of order"),
        (TensorRtOptions(workspace_bytes=512), r"512 bytes.*1048576"),
        (TensorRtOptions(optimization_level=6), "6 is not in 0 … 5"),
        (TensorRtOptions(sms=(87, 87)), "twice"),
    ],
)
def test_numbers_out_of_range(fake_tensorrt, options, words):
    with pytest.raises(UsageError, match=words):
        check_build_options(options, fake_tensorrt())


@pytest.mark.parametrize(
    ("version", "options", "words"),
    [
        ("10.3.0", TensorRtOptions(sms=(80, 89)), r"the one GPU it finds, 2 .*80, 89"),
        ("10.3.0", TensorRtOptions(tiling="fast"), r"10\.3\.0 has no tiling"),
        (
            "10.3.0",
            TensorRtOptions(hardware_compatibility="same_compute_capability"),
            r"10\.3\.0 has no hardware compatibility 'same_compute_capability'",
        ),
    ],
)
def test_what_a_version_lacks(fake_tensorrt, version, options, words):
    with pytest.raises(UnsupportedError, match=words):
        check_build_options(options, fake_tensorrt(version))


def test_later_versions_have_it(fake_tensorrt):
    options = TensorRtOptions(tiling="fast", hardware_compatibility="same_compute_capability")
    check_build_options(options, fake_tensorrt("10.13.2"))
    check_build_options(options, fake_tensorrt("11.4.0"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (TensorRtOptions(sms=(87,)), r"does not compile for SM 87; it knows 75, 80"),
        (TensorRtOptions(version_compatible=True), "no version-compatible"),
        (TensorRtOptions(hardware_compatibility="ampere_plus"), "no hardware-compatible"),
    ],
)
def test_what_rtx_lacks(rtx, options, words):
    with pytest.raises(
        UnsupportedError, match=words.replace("no hardware", "no version-compatible and no hardware")
    ):
        check_build_options(options, rtx)
