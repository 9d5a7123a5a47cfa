"""Every way a worker process can end, with real processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from engines.tensorrt.builder import build_plan
from engines.tensorrt.jobs import BuildJob, ProbeJob, job_from_json, job_to_json
from engines.tensorrt.options import BatchProfile, TensorRtOptions
from engines.tensorrt.process import run_job
from pipeline.errors import EngineError, UnsupportedError

_TIMEOUT_S = 60.0


def quiet(*told):
    """No progress."""


def test_jobs_survive_the_pipe(tmp_path):
    options = TensorRtOptions(
        sms=(80, 89), profiles=(BatchProfile(1, 2, 3),), workspace_bytes=1 << 30, timing_cache_dir=tmp_path
    )
    job = BuildJob("tensorrt_rtx", tmp_path / "m", "0" * 64, tmp_path / "p", options, tmp_path / "t")
    for one in (job, ProbeJob("tensorrt", tmp_path / "p", "1" * 64)):
        line = job_to_json(one)
        assert line.endswith(b"\n")
        assert line.count(b"\n") == 1
        assert job_from_json(line) == one


@pytest.mark.parametrize("name", ["SIGSEGV", "SIGABRT"])
def test_a_crash_has_a_name(fake_tensorrt, orin, make_model, tmp_path, name):
    (tmp_path / "p").write_bytes(b"old")
    with pytest.raises(EngineError, match=rf"crashed with {name}; it last wrote: about to fall"):
        build_plan(fake_tensorrt(signal=name), make_model(), tmp_path / "p", TensorRtOptions(), quiet)
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx", "p"}
    assert (tmp_path / "p").read_bytes() == b"old"


def test_killed_for_memory_is_tried_with_less_workspace(fake_tensorrt, orin, make_model, tmp_path):
    options = TensorRtOptions(workspace_bytes=256 << 20)
    with pytest.raises(EngineError, match=r"of 256 MiB, of 128 MiB; .*SIGKILL.*when memory runs out"):
        build_plan(fake_tensorrt(signal="SIGKILL"), make_model(), tmp_path / "p", options, quiet)


def test_the_workers_own_errors_keep_their_class(fake_tensorrt, monkeypatch, tmp_path):
    fake_tensorrt()
    monkeypatch.setenv("EDGEFOLD_FAKE_TENSORRT", '{"version": "8.6.2"}')
    outcome = run_job(ProbeJob("tensorrt", tmp_path / "p", "0" * 64), quiet)
    assert isinstance(outcome.error, UnsupportedError)
    assert not outcome.out_of_memory


def test_a_job_that_cannot_be_read(monkeypatch, tmp_path):
    monkeypatch.setattr("engines.tensorrt.process.job_to_json", lambda job: b'{"no": "job"}\n')
    outcome = run_job(ProbeJob("tensorrt", tmp_path / "p", "0" * 64), quiet)
    assert "exit code 1; it last wrote:" in str(outcome.error)


def test_a_death_in_the_middle_of_a_word(monkeypatch, tmp_path):
    code = 'import os; os.write(1, b\'{"event": "prog\'); os.kill(os.getpid(), 11)'
    monkeypatch.setattr("engines.tensorrt.process._BOOTSTRAP", code)
    outcome = run_job(ProbeJob("tensorrt", tmp_path / "p", "0" * 64), quiet)
    assert "crashed with SIGSEGV" in str(outcome.error)


def test_a_full_disk(fake_tensorrt, make_model, tmp_path):
    fake_tensorrt()
    model = make_model()
    full = tmp_path / "plan"
    full.symlink_to("/dev/full")
    job = BuildJob("tensorrt", model.path, model.sha256, full, TensorRtOptions(), None)
    outcome = run_job(job, quiet)
    assert isinstance(outcome.error, EngineError)
    assert "writing the plan failed: No space left on device" in str(outcome.error)


class _CancelledError(Exception):
    pass


def test_an_interrupt_ends_the_worker_and_leaves_nothing(fake_tensorrt, orin, make_model, tmp_path):
    """Ctrl-C arrives as an exception wherever the parent is: here, in the progress callback."""
    before = _children()

    def cancel(what, done, total):
        if done:
            raise _CancelledError

    with pytest.raises(_CancelledError):
        build_plan(fake_tensorrt(), make_model(), tmp_path / "p", TensorRtOptions(), cancel)
    assert {path.name for path in tmp_path.iterdir()} == {"graph.onnx"}
    assert _children() <= before


def test_a_worker_whose_parent_is_killed_cleans_up(make_model, tmp_path):
    """With kill -9 nobody can tell the worker: it sees its standard input close."""
    model = make_model()
    fake = tmp_path / "site"
    fake.mkdir()
    started = tmp_path / "started"
    # A library that takes for ever and, as TensorRT's bindings do while they build, releases the interpreter.
    (fake / "tensorrt.py").write_text(
        f"import pathlib, time\n__version__ = '10.3.0'\npathlib.Path({str(started)!r}).touch()\ntime.sleep(600)\n"
    )
    temporary = tmp_path / "plan.tmp"
    temporary.touch()
    parent = f"""
        import sys; sys.path[:0] = {[str(fake)]!r}
        from pathlib import Path
        from engines.tensorrt.jobs import BuildJob
        from engines.tensorrt.options import TensorRtOptions
        from engines.tensorrt.process import run_job
        run_job(BuildJob("tensorrt", Path({str(model.path)!r}), {model.sha256!r}, Path({str(temporary)!r}),
                         TensorRtOptions(), None), print)
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(parent)])
    try:
        _wait_until(started.exists)
        (worker,) = _children(process.pid)
    finally:
        process.kill()
        process.wait()
    _wait_until(lambda: not temporary.exists())
    _wait_until(lambda: not _is_running(worker))


def test_sigint_is_the_parents_to_handle(make_model, tmp_path):
    """A terminal sends Ctrl-C to both; the worker goes on until its parent ends it."""
    fake = tmp_path / "site"
    fake.mkdir()
    (fake / "tensorrt.py").write_text(
        "import os, signal\n__version__ = '10.3.0'\nos.kill(os.getpid(), signal.SIGINT)\nILogger = None\n"
    )
    sys.path.insert(0, str(fake))
    try:
        outcome = run_job(ProbeJob("tensorrt", tmp_path / "absent", "0" * 64), quiet)
    finally:
        sys.path.remove(str(fake))
    assert isinstance(outcome.error, EngineError)
    assert "No such file" in str(outcome.error)  # it went on to read the plan


def _children(pid: int | None = None) -> set[int]:
    listing = Path(f"/proc/{pid or os.getpid()}/task").glob("*/children")
    return {int(child) for path in listing for child in path.read_text().split()}


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False
    return state != "Z"


def _wait_until(condition) -> None:
    deadline = time.monotonic() + _TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "nothing happened in time"
        time.sleep(0.02)
