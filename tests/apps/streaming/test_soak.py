"""The soak in short: three rounds of every fault on the real command, and that each of its checks can fail."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from soak_app import Limits
from soak_scenario import GROWTH_LIMIT_MB, shortfalls, soak

pytest.importorskip("aiohttp")
pytest.importorskip("prometheus_client")
pytest.importorskip("cv2")

IMPATIENT = Limits(degraded_s=0.5, stall_s=2.0, frozen_s=1.5, backoff_s=(0.2, 1.0), lost_retry_s=1.0)
WELL: dict[str, Any] = {
    "crashes": 0,
    "exit_code": 0,
    "seconds_to_exit": 1.2,
    "tracebacks": 0,
    "rising_by_itself": [],
    "injected": {"camera stalls": 3, "another size": 3},
    "counted": {"camera stalls": 3, "another size": 3},
    "not_recovered_from": [],
    "grown": {"rss_mb": 0.5, "anonymous_mb": 0.5, "descriptors": -2, "threads": 0},
    "frames_inferred": 900.0,
}


@pytest.mark.soak
def test_a_minute_of_faults(bundle: Path) -> None:
    found = soak(bundle, rounds=3, warm_up_rounds=1, quiet_s=5.0, limits=IMPATIENT)
    assert shortfalls(found) == []
    assert len(found["injected"]) == 11
    assert set(found["injected"].values()) == {3}
    assert found["grown"]["rss_mb"] < GROWTH_LIMIT_MB


def test_a_run_without_a_fault_has_no_shortfall() -> None:
    assert shortfalls(WELL) == []


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        ({"crashes": 1}, "the app crashed"),
        ({"exit_code": 1}, "exit code 1"),
        ({"exit_code": None}, "exit code None"),
        ({"seconds_to_exit": 5.2}, "5.2 s to exit"),
        ({"tracebacks": 2}, "2 tracebacks in the log"),
        ({"rising_by_itself": ["another size"]}, "rose though nothing was done: ['another size']"),
        ({"counted": {"camera stalls": 3, "another size": 2}}, "not counted: {'another size': 1}"),
        ({"counted": {"camera stalls": 3}}, "not counted: {'another size': 3}"),
        ({"injected": {}, "counted": {}}, "no fault was injected"),
        ({"not_recovered_from": ["camera stalls"]}, "not recovered from: ['camera stalls']"),
        ({"grown": {**WELL["grown"], "descriptors": 1}}, "descriptors grew by 1"),
        ({"grown": {**WELL["grown"], "threads": 1}}, "threads grew by 1"),
        ({"frames_inferred": float("nan")}, "nothing was inferred"),
    ],
)
def test_every_check_can_fail(seen: dict[str, Any], words: str) -> None:
    assert shortfalls({**WELL, **seen}) == [words]
