from __future__ import annotations

import pytest

from engines.tensorrt.builder import build_plan
from engines.tensorrt.options import TensorRtOptions
from engines.tensorrt.plan import PlanHeader, identify_plan
from pipeline.errors import IntegrityError


@pytest.fixture
def plan(rtx, make_model, tmp_path):
    options = TensorRtOptions(sms=(86, 121))
    return build_plan(
        rtx, make_model(), tmp_path / "model.plan", options, lambda *told: None
    ).path.read_bytes()


@pytest.mark.parametrize("sms", [(75,), (80,), (86,), (89,), (120,), (121,), (80, 89, 120)])
def test_a_real_plan_says_what_it_was_built_for(rtx, make_model, tmp_path, sms):
    built = build_plan(rtx, make_model(), tmp_path / "p", TensorRtOptions(sms=sms), lambda *told: None)
    assert identify_plan(built.path.read_bytes()) == PlanHeader("tensorrt_rtx", rtx.version, sms)


@pytest.mark.parametrize("keep", [0.5, 0.999])
def test_a_truncated_real_plan(plan, keep):
    short = plan[: int(keep * len(plan))]
    with pytest.raises(
        IntegrityError, match=rf"truncated: its header says {len(plan)} bytes, {len(short)} are"
    ):
        identify_plan(short)


def test_a_real_plan_with_something_behind_it(plan):
    with pytest.raises(IntegrityError, match="followed by other bytes"):
        identify_plan(plan + b"\0")


def test_another_header_layout(plan):
    with pytest.raises(IntegrityError, match="layout 3, this version of edgefold reads 2"):
        identify_plan(plan[:8] + b"\3" + plan[9:])
    with pytest.raises(IntegrityError, match="layout"):
        identify_plan(plan[:28] + b"nope" + plan[32:])


@pytest.mark.parametrize("magic", [b"ftrt", b"vtrt"])
def test_less_than_a_header(magic):
    with pytest.raises(IntegrityError, match="truncated: 24 bytes"):
        identify_plan(magic + bytes(20))


@pytest.mark.parametrize("data", [b"", b"garbage" * 100, b"\x08\x09pytorch" + bytes(100), b"{}" * 64])
def test_what_is_no_plan(data):
    with pytest.raises(IntegrityError, match=r"no TensorRT plan.*'ftrt'.*'vtrt'"):
        identify_plan(data)


def test_tensorrts_own_plan_is_known_by_its_first_bytes_only():
    assert identify_plan(b"ftrt" + bytes(100)) == PlanHeader("tensorrt", None, None)
