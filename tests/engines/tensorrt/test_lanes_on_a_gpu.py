"""The runner and its lanes over a stand-in engine that is a real kernel: in host memory, and (``gpu``) on real devices.

What only a GPU shows is time: a kernel that takes milliseconds before it reads and again before it writes finds out
who touches a buffer too soon. ``test_device_bindings.py`` runs this file over a driver in host memory, too.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from cuda_engine import CudaLibrary, engine_plan, expected_logits, open_library

from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions
from pipeline.errors import EngineError

ONLY = os.environ.get("EDGEFOLD_TEST_BINDING")
"""As in ``test_device_contract.py``."""
BINDINGS = (
    [ONLY] if ONLY else [pytest.param(name, marks=pytest.mark.gpu) for name in ("pycuda", "cuda-python")]
)
KINDS = BINDINGS if ONLY else ["fake", *BINDINGS]
ROOT = Path(__file__).parents[3]
HW = (12, 12)
LATENCY = EngineOptions()
SHAPES = [1, 1, 1, 3, 3, 3, 1, 1, 8, 8, 2, 2, 2]


def needs(kind: str) -> None:
    if kind != "fake":
        pytest.importorskip("pycuda.driver" if kind == "pycuda" else "cuda.bindings.driver")


@pytest.fixture(params=KINDS)
def library(request):
    needs(request.param)
    with open_library(request.param) as opened:
        opened.spin_us = 2000
        yield opened


def runner_of(library, options=LATENCY, hw=HW):
    return TensorRtRunner(engine_plan(hw), library.api, options, device=library.device)


def images_of(batch, seed, hw=HW):
    return np.random.default_rng(seed).integers(0, 256, (batch, *hw, 3), dtype=np.uint8)


def check(outputs, images):
    assert np.array_equal(outputs["echo"], images)
    assert np.array_equal(outputs["logits"], expected_logits(images))


def test_replays_are_right_also_after_the_shape_has_changed(library):
    with runner_of(library) as runner:
        for seed, batch in enumerate(SHAPES):
            images = images_of(batch, seed)
            check(runner.infer({"pixels": images}), images)
        assert runner.cuda_graphs == "replayed"
        (context,) = library.contexts
        # What came after a shape's second run was nobody's call but the graph's.
        runs = ["executed", "captured"]
        assert context.calls == [part for n in (1, 3, 1, 8, 2) for part in (f"shape {n}", *runs)]


def test_lanes_side_by_side_in_several_shapes(library):
    with runner_of(library, EngineOptions(mode="throughput", threads=4)) as runner:
        for turn in range(2):
            images = [images_of(1 + (seed + turn) % 3, 100 * turn + seed) for seed in range(24)]
            futures = [runner.submit({"pixels": one}) for one in images]
            for one, future in zip(images, futures, strict=True):
                check(future.result(timeout=30), one)
        same = [images_of(1, seed) for seed in range(24)]
        for one, future in [(one, runner.submit({"pixels": one})) for one in same]:
            check(future.result(timeout=30), one)
        assert runner.cuda_graphs == "replayed"
    used = [context.stream for context in library.contexts if context.stream]
    assert len(set(used)) == len(used)


def test_infer_and_submit_from_several_threads(library):
    errors = []

    def work(seed):
        for turn in range(5):
            images = images_of(1 + turn % 2, 10 * seed + turn)
            inputs = {"pixels": images}
            try:
                check(runner.infer(inputs) if turn % 2 else runner.submit(inputs).result(timeout=30), images)
            except Exception as error:
                errors.append(error)

    with runner_of(library, EngineOptions(streams=2)) as runner:
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=60)
    assert errors == []


def test_captures_stand_what_other_threads_allocate_and_free(library):
    """The capture is the thread's own: one of the global mode would be spoiled, and `cuda_graphs` would say so."""
    device, stop, errors = library.device, threading.Event(), []

    def churn():
        try:
            while not stop.is_set():
                with device.current():
                    device.allocate(1 << 20).free()
                    device.allocate_pinned(1 << 16).free()
        except Exception as error:
            errors.append(error)

    library.spin_us = 200
    with runner_of(library, EngineOptions(mode="throughput", threads=3)) as runner:
        thread = threading.Thread(target=churn)
        thread.start()
        try:
            for turn in range(20):
                images = [images_of(1 + turn % 3, seed) for seed in range(9)]
                futures = [runner.submit({"pixels": one}) for one in images]
                for one, future in zip(images, futures, strict=True):
                    check(future.result(timeout=30), one)
        finally:
            stop.set()
            thread.join(timeout=30)
        assert not runner.cuda_graphs.startswith("not used"), runner.cuda_graphs
    assert errors == []
    assert sum(context.calls.count("captured") for context in library.contexts) > 3


def test_an_answer_read_before_synchronizing_would_be_another_ones(library, monkeypatch):
    """That the tests here would find it: without the wait, the outputs are those of the run before."""
    library.spin_us = 20_000
    first, second = images_of(2, 1), images_of(2, 2)
    with library.device.current():
        stream = library.device.create_stream()
        kind = type(stream)
        stream.close()
    with runner_of(library) as runner:
        check(runner.infer({"pixels": first}), first)
        with monkeypatch.context() as patched:
            patched.setattr(kind, "synchronize", lambda self: None)
            early = runner.infer({"pixels": second})
        check(early, first)
        check(runner.infer({"pixels": second}), second)


def test_a_copy_reads_pinned_memory_when_the_stream_comes_to_it(library):
    """Why a frame's buffer is left alone until its future is done: it is changed behind a kernel that takes its time."""
    device, hw = library.device, (128, 128)
    before, after = images_of(1, 1, hw), images_of(1, 2, hw)
    library.spin_us = 20_000
    with runner_of(library, hw=hw) as runner:
        with device.current():
            pinned, scratch = device.allocate_pinned(before.nbytes), device.allocate(3 * before.nbytes)

        def fill(address, stream):
            pinned.array[:] = before.ravel()
            if isinstance(library, CudaLibrary):
                addresses = {"pixels": address, "logits": scratch.address}
                assert library.launch(stream.handle, 1, before.nbytes, addresses) == 0
            device.copy_to_device(address, pinned.array, stream)
            pinned.array[:] = after.ravel()

        for _ in range(3):  # plain, captured, replayed
            outputs = runner.submit_filled([fill]).result(timeout=30)
            assert np.array_equal(outputs["echo"], after)
        with device.current():
            pinned.free()
            scratch.free()


@pytest.mark.gpu
@pytest.mark.keeps_time
@pytest.mark.parametrize("library", ["pycuda", "cuda-python"], indirect=True)
def test_lanes_run_at_the_same_time(library):
    library.spin_us = 5000
    seconds = {}
    for n_streams in (1, 4):
        with runner_of(library, EngineOptions(streams=n_streams)) as runner:
            for _ in range(2):  # warmed up and captured the first time
                begin = time.perf_counter()
                images = [images_of(1, seed) for seed in range(24)]
                futures = [runner.submit({"pixels": one}) for one in images]
                for one, future in zip(images, futures, strict=True):
                    check(future.result(timeout=30), one)
                seconds[n_streams] = time.perf_counter() - begin
    assert seconds[1] >= 0.9 * 24 * 0.005  # the device's timer is coarse
    assert seconds[4] < 0.5 * seconds[1]


def test_out_of_memory_is_named_and_leaves_a_device_that_works(library):
    library.profiles = ((1, 4, 1 << 36),)  # 30 TB of pixels
    with pytest.raises(EngineError, match=r"OUT_OF_MEMORY.*smaller batch or fewer streams"):
        runner_of(library)
    library.profiles = ((1, 4, 8),)
    with runner_of(library) as runner:
        images = images_of(4, 0)
        check(runner.infer({"pixels": images}), images)


@pytest.mark.parametrize("moment", ["plain", "replay", "submitted"])
@pytest.mark.parametrize("binding", BINDINGS)
def test_a_kernel_that_reads_nowhere_ends_the_process_with_the_code_for_a_device_fault(binding, moment):
    needs(binding)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]),
    }
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests/faulting_engine.py"), binding, moment],
        env=environment, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 6, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["told"].startswith("DeviceFaultError: CUDA error 700 (ILLEGAL_ADDRESS"), found
    assert "restart the process" in found["told"]
    assert all(text.startswith("DeviceFaultError") for text in found["afterwards"]), found
