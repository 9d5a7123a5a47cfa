"""What the TensorRT runner does besides the contract, over a device and a library in host memory."""

from __future__ import annotations

import threading

import numpy as np
import onnx.parser
import pytest
from fake_device import FakeDevice
from fake_tensorrt import FakeLibrary, TensorFormat, TensorLocation

from engines.tensorrt import runner as runner_module
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions
from pipeline.errors import DeviceFaultError, EngineError, UsageError

LATENCY = EngineOptions()


class Bench:
    """A fake device, a library on it, and runners of the tiny model."""

    def __init__(self, tiny, **library):
        self.tiny = tiny
        self.device = FakeDevice()
        self.library = FakeLibrary(self.device, **library)
        self.plan = tiny.artifact.path.read_bytes()

    def runner(self, options=LATENCY, plan=None):
        plan = self.plan if plan is None else plan
        return TensorRtRunner(plan, self.library.api, options, device=self.device)

    def check(self, runner, batch=1, seed=0):
        sample = self.tiny.sample(batch, seed)
        np.testing.assert_allclose(
            runner.infer(sample)["logits"], self.tiny.expected(sample["input"]), atol=self.tiny.atol, rtol=0
        )


@pytest.fixture
def bench(tiny):
    return Bench(tiny)


@pytest.fixture
def make_bench(make_tiny):
    return lambda kind="fp32", batch="batch", **library: Bench(make_tiny(kind, batch), **library)


class TestGraphs:
    def test_a_plain_run_then_a_capture_then_only_replays(self, bench):
        with bench.runner() as runner:
            (context,) = bench.library.contexts
            assert runner.cuda_graphs == "captured at the second run"
            for seed in range(5):
                bench.check(runner, seed=seed)
            assert context.calls == ["shape 1", "executed", "captured"]
            assert bench.device.log.count("cuGraphLaunch") == 4
            assert runner.cuda_graphs == "replayed"

    def test_another_shape_runs_plainly_before_it_is_captured(self, bench):
        with bench.runner() as runner:
            (context,) = bench.library.contexts
            for seed, batch in enumerate([1, 1, 1, 3, 3, 3, 1, 1]):
                bench.check(runner, batch, seed)
        per_shape = ["executed", "captured"]
        assert context.calls == ["shape 1", *per_shape, "shape 3", *per_shape, "shape 1", *per_shape]
        assert bench.device.live == 0, "every graph was destroyed"

    def test_a_refused_capture_is_noted_and_costs_nothing_else(self, make_bench):
        bench = make_bench(refuses_capture=True)
        with bench.runner() as runner:
            for seed in range(4):
                bench.check(runner, seed=seed)
            assert bench.library.contexts[0].calls.count("captured") == 1, "not tried again"
            assert runner.cuda_graphs.startswith("not used: TensorRT refused to be captured")
            assert "not permitted when stream is capturing" in runner.cuda_graphs
        assert bench.device.live == 0

    @pytest.mark.parametrize("call", ["cuStreamEndCapture"])
    def test_a_capture_that_the_driver_refuses(self, bench, call):
        with bench.runner() as runner:
            bench.check(runner)
            bench.device.fail(call, 901)
            for seed in range(3):
                bench.check(runner, seed=seed)
            assert "STREAM_CAPTURE_INVALIDATED" in runner.cuda_graphs

    def test_a_fault_while_capturing_is_a_fault(self, bench):
        with bench.runner() as runner:
            bench.check(runner)
            bench.device.fail("cuStreamEndCapture", 719)
            with pytest.raises(DeviceFaultError, match="LAUNCH_FAILED"):
                bench.check(runner)


class TestLifetimes:
    def test_closing_ends_everything_in_order_inside_the_context(self, bench):
        runner = bench.runner(EngineOptions(mode="throughput", threads=2))
        for seed in range(3):
            bench.check(runner, seed=seed)
        bench.library.contexts.clear()
        bench.device.log.clear()
        runner.close()
        assert bench.device.live == 0
        assert bench.library.events == ["context", "context", "engine", "runtime"]
        log = bench.device.log
        assert log.index("cuGraphExecDestroy") < log.index("context destroyed") < log.index("cuMemFree")
        assert not bench.device.closed, "the device is the caller's"

    def test_a_device_of_its_own_is_closed(self, bench, monkeypatch):
        monkeypatch.setattr(runner_module, "open_device", lambda: bench.device)
        TensorRtRunner(bench.plan, bench.library.api, LATENCY).close()
        assert bench.device.closed
        bench.device.closed = False
        with pytest.raises(EngineError):
            TensorRtRunner(b"garbage", bench.library.api, LATENCY)
        assert bench.device.closed

    @pytest.mark.parametrize("failing", ["cuStreamCreate", "cuMemAlloc", "cuMemHostAlloc"])
    def test_out_of_memory_while_loading_leaks_nothing(self, bench, failing):
        bench.device.fail(failing, 2)
        with pytest.raises(EngineError, match=r"OUT_OF_MEMORY.*smaller batch or fewer streams"):
            bench.runner()
        assert bench.device.live == 0

    def test_out_of_memory_at_a_later_context_leaks_nothing(self, make_bench):
        bench = make_bench(n_contexts=2)
        with pytest.raises(EngineError, match=r"no execution context.*OutOfMemory.*fewer streams"):
            bench.runner(EngineOptions(mode="throughput", threads=3))
        assert bench.device.live == 0

    def test_a_closed_runner_says_so(self, bench):
        runner = bench.runner()
        runner.close()
        runner.close()
        assert runner.cuda_graphs == "closed"
        with pytest.raises(EngineError, match="closed"):
            runner.infer_filled(lambda address, stream: None)


class TestStreams:
    def test_one_context_and_one_stream_each(self, bench):
        with bench.runner(EngineOptions(mode="throughput", threads=3)) as runner:
            assert runner.n_streams == len(bench.library.contexts) == 3
            samples = [bench.tiny.sample(1 + seed % 3, seed) for seed in range(40)]
            futures = [runner.submit(sample) for sample in samples]
            for sample, future in zip(samples, futures, strict=True):
                logits = future.result(timeout=30)["logits"]
                expected = bench.tiny.expected(sample["input"])
                np.testing.assert_allclose(logits, expected, atol=bench.tiny.atol, rtol=0)
        used = [context.stream for context in bench.library.contexts if context.stream]
        assert len(set(used)) == len(used)

    def test_throughput_without_threads_has_two_and_latency_one(self, bench):
        with bench.runner(EngineOptions(mode="throughput")) as runner:
            assert runner.n_streams == 2
        with bench.runner(EngineOptions(threads=7)) as runner:
            assert runner.n_streams == 1

    def test_no_thread_is_left_with_the_context(self, bench):
        depths = []
        with bench.runner() as runner:

            def look(_future):
                depths.append(bench.device.depth())

            runner.submit(bench.tiny.sample(1, 0)).add_done_callback(look)
            bench.check(runner)
        assert depths == [0]
        assert bench.device.depth() == 0

    def test_counts_below_one(self, bench):
        with pytest.raises(UsageError, match="threads is 0"):
            bench.runner(EngineOptions(threads=0))


class TestShapes:
    def test_a_batch_beyond_the_profile_names_its_range(self, bench):
        with bench.runner() as runner:
            with pytest.raises(EngineError, match=r"batch of 9, the engine was built for 1 to 8.*split"):
                runner.infer(bench.tiny.sample(9, 0))
            bench.check(runner, 8)

    def test_the_profile_that_admits_the_batch_is_used(self, make_bench):
        bench = make_bench(profiles=((1, 1, 1), (2, 8, 16)))
        with bench.runner(EngineOptions(batch=16)) as runner:
            assert bench.library.contexts[0].profile == 1
            assert runner.inputs[0].shape[0] == 16
            for seed in range(3):
                bench.check(runner, 16, seed)
        with pytest.raises(EngineError, match="for batches 1 to 1, 2 to 16; 17 was asked for"):
            bench.runner(EngineOptions(batch=17))

    def test_a_fixed_batch_is_never_set(self, make_bench):
        bench = make_bench(batch=2)
        with bench.runner() as runner:
            bench.check(runner, 2)
            bench.check(runner, 2, 1)
        assert bench.library.contexts[0].calls == ["executed", "captured"]


class TestRefusals:
    def test_a_plan_that_cannot_be_deserialized(self, bench):
        with pytest.raises(
            EngineError, match=r"by TensorRT 10\.16\.2 on Fake GPU: .*magicTag.*edgefold finish"
        ):
            bench.runner(plan=b"some other plan")

    def test_formats_and_places_that_are_not_served(self, bench):
        bench.library.formats["input"] = TensorFormat.CHW32
        with pytest.raises(EngineError, match=r"'input' has the format CHW32, only LINEAR"):
            bench.runner()
        bench.library.formats.clear()
        bench.library.locations["logits"] = TensorLocation.HOST
        with pytest.raises(EngineError, match="'logits' is a shape tensor"):
            bench.runner()

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (
                "g (float[batch,side] x) => (float[batch,side] y) { y = Relu(x) }",
                r"'x' has the shape \[-1, -1\]",
            ),
            ("g (float[2,4] x) => (bfloat16[2,4] y) { y = Cast<to=16>(x) }", "'y' is BF16"),
        ],
    )
    def test_interfaces_that_are_not_served(self, bench, text, words):
        plan = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {text}').SerializeToString()
        with pytest.raises(EngineError, match=words):
            bench.runner(plan=plan)

    def test_a_refused_run_says_why_and_the_next_one_works(self, bench):
        with bench.runner() as runner:
            bench.library.fail_next = "Error Code 1: Myelin ([impl.cpp] no tactic)"
            with pytest.raises(
                EngineError, match="TensorRT refused to run: IExecutionContext: Error Code 1: Myelin"
            ):
                bench.check(runner)
            bench.check(runner)
            bench.library.fail_next = "once more"
            bench.library.contexts[0].warm = True
            sample = bench.tiny.sample(3, 0)
            assert isinstance(runner.submit(sample).exception(timeout=30), EngineError)
            bench.check(runner, 3)

    @pytest.mark.parametrize(
        "call", ["cuMemcpyHtoDAsync", "cuStreamBeginCapture", "cuGraphLaunch", "cuMemcpyDtoHAsync"]
    )
    def test_a_failure_halfway_leaves_nothing_under_way(self, make_bench, call):
        """What was enqueued before it reads and writes buffers that the next run, on another stream, may be given."""
        bench = make_bench("int8")

        def fill(address, stream):
            bench.device.copy_to_device(address, pinned.array, stream)
            ran.append(stream)

        with bench.runner() as runner:
            bench.check(runner)
            with bench.device.current():
                pinned, ran = bench.device.allocate_pinned(12 * 12 * 3), []
            pinned.array[:] = 7
            fills = [fill, fill] if call == "cuMemcpyHtoDAsync" else [fill]
            if len(fills) == 2:
                fills.insert(1, lambda address, stream: bench.device.fail(call, 2))
            else:
                bench.device.fail(call, 2)
            with pytest.raises(EngineError, match="OUT_OF_MEMORY"):
                runner.submit_filled(fills).result(timeout=30)
            assert ran[0].queue == []
            bench.check(runner)
            with bench.device.current():
                pinned.free()


class TestFaults:
    @pytest.mark.parametrize("call", ["cuMemcpyHtoDAsync", "cuStreamSynchronize", "cuMemcpyDtoHAsync"])
    def test_a_sticky_error_is_a_device_fault_and_closing_is_quiet(self, bench, call):
        runner = bench.runner()
        bench.check(runner)
        bench.device.fail(call, 700)
        with pytest.raises(DeviceFaultError, match=r"ILLEGAL_ADDRESS.*restart the process"):
            bench.check(runner)
        assert isinstance(runner.submit(bench.tiny.sample(1, 0)).exception(timeout=30), DeviceFaultError), (
            "and so is everything after it"
        )
        runner.close()

    def test_a_fault_that_tensorrt_only_calls_a_failure(self, bench):
        """`execute_async_v3` returns False; the device says that it is a fault."""
        with bench.runner() as runner:
            bench.library.fault_next = 719
            with pytest.raises(DeviceFaultError, match="LAUNCH_FAILED"):
                bench.check(runner)


class TestRtx:
    @pytest.fixture
    def bench(self, make_bench):
        return make_bench(rtx=True)

    def test_it_replays_graphs_by_itself(self, bench):
        with bench.runner(EngineOptions(mode="throughput", threads=2)) as runner:
            for seed in range(3):
                bench.check(runner, seed=seed)
            assert runner.cuda_graphs == "left to TensorRT-RTX"
        configs = [context.config for context in bench.library.contexts]
        assert [config.cuda_graph_strategy.name for config in configs] == ["WHOLE_GRAPH_CAPTURE"] * 2
        assert len(bench.library.caches) == 1
        assert all(config.cache is bench.library.caches[0] for config in configs)
        assert not any("captured" in context.calls for context in bench.library.contexts)
        assert "cuStreamBeginCapture" not in bench.device.log

    def test_compiled_kernels_are_kept_and_found_again(self, bench, tmp_path):
        options = EngineOptions(cache_dir=tmp_path)
        bench.runner(options).close()
        bench.library.caches[0].content = b"compiled never"
        bench.runner(options).close()
        assert bench.library.caches[1].content == b"compiled now"
        (entry,) = tmp_path.glob("*.blob")
        before = entry.stat().st_mtime_ns
        bench.runner(options).close()
        assert entry.stat().st_mtime_ns >= before  # read, and not written again: the bytes are the same
        assert entry.read_bytes().endswith(b"compiled now")

    def test_a_cache_of_another_driver_is_replaced(self, bench, tmp_path, monkeypatch):
        options = EngineOptions(cache_dir=tmp_path)
        bench.runner(options).close()
        monkeypatch.setattr("fake_tensorrt.FakeRuntimeCache.accepts", b"newer", raising=False)
        monkeypatch.setattr("fake_tensorrt.FakeRuntimeCache.__init__", _newer)
        with bench.runner(options) as runner:
            bench.check(runner)
        (entry,) = tmp_path.glob("*.blob")
        assert entry.read_bytes().endswith(b"newer kernels")


def _newer(self):
    self.content, self.accepts = b"newer kernels", b"newer"


class TestFilling:
    def test_pixels_may_come_from_a_kernel(self, make_bench):
        bench = make_bench("int8")
        sample = bench.tiny.sample(1, 5)["input"]
        shifted = sample + np.uint8(9)
        with bench.runner() as runner, bench.device.current():
            source = bench.device.allocate(sample.nbytes)
            bench.device.view(source.address, sample.nbytes)[:] = sample.ravel()
            kernel = bench.device.load_kernel(b"\x7fELF", "add_bytes")

            def fill(address, stream):
                arguments = [
                    np.uint64(address),
                    np.uint64(source.address),
                    np.int32(sample.nbytes),
                    np.int32(9),
                ]
                kernel.launch((1, 1, 1), (64, 1, 1), 0, arguments, stream)

            for _ in range(3):  # plain, captured, replayed
                logits = runner.infer_filled(fill)["logits"]
                np.testing.assert_allclose(logits, bench.tiny.expected(shifted), atol=bench.tiny.atol, rtol=0)
            bench.check(runner)  # and from the host in between
            logits = runner.infer_filled(fill)["logits"]
            np.testing.assert_allclose(logits, bench.tiny.expected(shifted), atol=bench.tiny.atol, rtol=0)
            source.free()

    def test_only_one_input_and_one_image(self, make_bench):
        bench = make_bench(batch=2)
        with bench.runner() as runner, pytest.raises(EngineError, match=r"batch of 1, .* for 2 to 2"):
            runner.infer_filled(lambda address, stream: None)
        two = "g (float[1,4] a, float[1,4] b) => (float[1,4] y) { y = Add(a, b) }"
        plan = onnx.parser.parse_model(f'<ir_version: 9, opset_import: ["" : 18]> {two}').SerializeToString()
        with bench.runner(plan=plan) as runner:
            with pytest.raises(EngineError, match=r"\['a', 'b'\]; only one input"):
                runner.infer_filled(lambda address, stream: None)
            ones = np.ones((1, 4), np.float32)
            assert (runner.infer({"a": ones, "b": 2 * ones})["y"] == 3).all()


def test_infer_while_the_pool_is_busy_waits(bench):
    with bench.runner() as runner:
        futures = [runner.submit(bench.tiny.sample(1, seed)) for seed in range(2)]
        errors = []

        def work():
            try:
                bench.check(runner, seed=7)
            except AssertionError as error:
                errors.append(error)

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(timeout=30)
        assert errors == []
        assert all(future.result(timeout=30) for future in futures)
