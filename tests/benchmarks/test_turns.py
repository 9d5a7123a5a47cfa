"""Candidates that run in turns."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import turns

# Counts steps of 2 ms; its child writes down when it ran.
CANDIDATE = """
import subprocess, sys, time
sys.path.insert(0, sys.argv[1])
from turns import answer_counts
child = "import sys, time\\nwhile True: print(time.monotonic(), flush=True); time.sleep(0.002)"
subprocess.Popen([sys.executable, "-c", child], stdout=open(sys.argv[2], "w"))
steps = 0
answer_counts(lambda: steps, pace="steady")
while True:
    time.sleep(0.002)
    steps += 1
"""


def candidate(script: str, *arguments: object) -> list[str]:
    return [sys.executable, "-c", script, str(Path(turns.__file__).parent), *map(str, arguments)]


@pytest.fixture(autouse=True)
def short_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(turns, "_WARM_S", 0.3)


def test_one_runs_at_a_time_with_all_its_children(tmp_path: Path) -> None:
    commands = {name: candidate(CANDIDATE, tmp_path / name) for name in ("a", "b")}
    made = turns.run_turns(commands, 2, turns=2, turn_s=0.25)
    assert [len(rounds) for rounds in made.values()] == [2, 2]
    for done in (*made["a"], *made["b"]):
        assert 20 < done["frames"] <= 260
        assert 2 <= done["wall_ms"] < 25
        assert done["cpu_ms"] < done["wall_ms"]
        assert done["pace"] == "steady"
    ran = [(float(line), name) for name in "ab" for line in (tmp_path / name).read_text().split()[1:-1]]
    # From the first turn of the second on they alternate: a b, b a, a b, b a; two that ran together would mix.
    names = "".join(name for _, name in sorted(ran))
    changes = sum(left != right for left, right in itertools.pairwise(names))
    assert 3 <= changes <= 12


def test_one_that_ends_is_no_result() -> None:
    with pytest.raises(RuntimeError, match=r"brief ended with status 3"):
        turns.run_turns({"brief": candidate("import sys; sys.exit(3)")}, 1)


def test_one_that_does_nothing_is_no_result() -> None:
    idle = "import sys, time; sys.path.insert(0, sys.argv[1])\nfrom turns import answer_counts\n"
    idle += "answer_counts(lambda: 0)\ntime.sleep(60)"
    with pytest.raises(RuntimeError, match=r"idle did no frame in 0\.\d s"):
        turns.run_turns({"idle": candidate(idle)}, 1, turns=1, turn_s=0.2)
