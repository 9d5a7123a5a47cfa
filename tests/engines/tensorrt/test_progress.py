from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from engines.tensorrt.progress import TOTAL, BuildProgress


def make():
    reports = []
    return BuildProgress(lambda done, total: reports.append((done, total))), reports


def test_nested_phases_count_within_their_parents_step():
    progress, reports = make()
    progress.start("root", None, 4)
    progress.step("root", 0)
    progress.start("child", "root", 2)
    progress.step("child", 0)
    assert reports[-1] == (375, TOTAL)  # one step of four, and half of the second
    progress.finish("child")
    progress.step("root", 1)
    assert reports[-1] == (500, TOTAL)
    progress.finish("root")
    assert reports[-1] == (TOTAL, TOTAL)


def test_a_second_child_in_the_same_step_does_not_go_back():
    progress, reports = make()
    progress.start("root", None, 2)
    for child in ("first", "second"):
        progress.start(child, "root", 10)
        progress.step(child, 7)
        progress.finish(child)
    assert reports == sorted(reports)
    assert reports[-1] == (500, TOTAL)


def test_unknown_phases_and_parents_are_harmless():
    progress, reports = make()
    progress.step("never opened", 3)
    progress.finish("never opened")
    progress.start("orphan", "never opened", 0)
    progress.finish("orphan")
    assert reports[-1] == (TOTAL, TOTAL)


@given(
    st.lists(
        st.tuples(st.sampled_from(["start", "step", "finish"]), st.sampled_from("abcd"), st.integers(0, 9))
    )
)
def test_it_only_grows_and_stays_in_range(events):
    progress, reports = make()
    progress.start("root", None, 5)
    parents = {"a": "root", "b": "a", "c": "b", "d": None}
    for what, phase, number in events:
        if what == "start":
            progress.start(phase, parents[phase], number)
        elif what == "step":
            progress.step(phase, number)
        else:
            progress.finish(phase)
    numbers = [done for done, _ in reports]
    assert numbers == sorted(set(numbers))
    assert all(0 <= done <= TOTAL for done in numbers)
