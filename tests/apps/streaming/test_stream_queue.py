import threading
import time

import pytest
from waiting import PATIENCE_S, SLACK_S, eventually

from apps.streaming.queues import StageQueue


def test_newest_keeps_the_latest_and_reports_what_it_gave_up() -> None:
    dropped: list[int] = []
    queue = StageQueue[int](1, "newest", on_drop=dropped.append)
    for item in range(5):
        assert queue.put(item)
    assert queue.get() == 4
    assert dropped == [0, 1, 2, 3]


def test_every_blocks_the_producer_and_loses_nothing() -> None:
    queue = StageQueue[int](2, "every")
    n_put = 0

    def produce() -> None:
        nonlocal n_put
        for item in range(50):
            assert queue.put(item)
            n_put += 1
        queue.close()

    producer = threading.Thread(target=produce)
    producer.start()
    eventually(lambda: n_put == 2)
    time.sleep(0.05)
    assert n_put == 2  # full: the third put waits
    taken = []
    while not queue.exhausted:
        item = queue.get(timeout_s=1)
        if item is not None:
            taken.append(item)
    producer.join(PATIENCE_S)
    assert taken == list(range(50))


def test_close_delivers_what_is_queued_then_ends() -> None:
    queue = StageQueue[int](3)
    queue.put(1)
    queue.close()
    assert not queue.exhausted
    assert queue.put(2) is False
    assert queue.get() == 1
    assert queue.exhausted
    assert queue.get() is None


@pytest.mark.parametrize("blocked_in", ["put", "get"])
def test_abort_releases_both_sides(blocked_in: str) -> None:
    queue = StageQueue[int](1)
    if blocked_in == "put":
        queue.put(0)
    results: list[object] = []
    thread = threading.Thread(
        target=lambda: results.append(queue.put(1) if blocked_in == "put" else queue.get())
    )
    thread.start()
    time.sleep(0.02)
    left = queue.abort()
    thread.join(PATIENCE_S)
    assert not thread.is_alive()
    assert (left, results) == (([0], [False]) if blocked_in == "put" else ([], [None]))


def test_get_times_out() -> None:
    started = time.monotonic()
    assert StageQueue[int](1).get(timeout_s=0.03) is None
    assert 0.02 < time.monotonic() - started < SLACK_S
