"""What every device does: the fake one of the runner's tests, both bindings, and (``gpu``) real ones.

``test_device_bindings.py`` runs this file again in a process of its own, over a driver in host memory.
"""

from __future__ import annotations

import os
import threading

import numpy as np
import pytest
from fake_device import FakeDevice

from engines.tensorrt.device import open_device
from engines.tensorrt.nvrtc import compile_kernels
from pipeline.errors import DeviceFaultError, EngineError, UnsupportedError

ONLY = os.environ.get("EDGEFOLD_TEST_BINDING")
"""Set by ``test_device_bindings.py``: this binding alone, over the driver without a GPU."""
KINDS = (
    [ONLY]
    if ONLY
    else ["fake", *(pytest.param(name, marks=pytest.mark.gpu) for name in ("pycuda", "cuda-python"))]
)
SOURCE = r"""
extern "C" __global__ void add_bytes(unsigned char *out, const unsigned char *in, int n, int add) {
    for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < n; i += gridDim.x * blockDim.x) out[i] = in[i] + add;
}
"""


@pytest.fixture(params=KINDS)
def device(request):
    if request.param == "fake":
        opened = FakeDevice()
    else:
        if request.param == "pycuda":
            pytest.importorskip("pycuda.driver")
        opened = open_device(binding=request.param)
    yield opened
    opened.close()


@pytest.fixture
def image(request, device):
    """A kernel's image: real for a real GPU; the others look at no more than its first bytes."""
    if ONLY or isinstance(device, FakeDevice):
        return b"\x7fELF"
    return compile_kernels(SOURCE, "add_bytes.cu", device.identity.sm).cubin


@pytest.fixture
def parts(device):
    """Made and freed with the context current."""
    with device.current():
        stream = device.create_stream()
        pinned = [device.allocate_pinned(1000) for _ in range(2)]
        memory = [device.allocate(1000) for _ in range(2)]
    yield stream, pinned, memory
    with device.current():
        for one in (*pinned, *memory):
            one.free()
            one.free()  # harmless
        stream.close()


def test_says_which_gpu_it_is(device):
    identity = device.identity
    assert identity.name
    assert 50 <= identity.sm < 200
    assert identity.cuda.replace(".", "").isdigit()
    assert identity.driver == "unknown" or identity.driver[0].isdigit()


def test_copies_there_and_back_happen_by_the_time_of_synchronize(device, parts):
    stream, (source, target), (memory, _) = parts
    assert memory.address % 256 == 0
    assert memory.n_bytes == 1000
    assert source.array.shape == (1000,)
    with device.current():
        for seed in range(3):  # the same buffers again
            source.array[:] = np.random.default_rng(seed).integers(0, 256, 1000)
            target.array[:] = 0
            device.copy_to_device(memory.address, source.array, stream)
            device.copy_to_host(target.array, memory.address, stream)
            stream.synchronize()
            assert np.array_equal(target.array, source.array)


def test_copies_of_parts(device, parts):
    stream, (source, target), (memory, _) = parts
    source.array[:], target.array[:] = 7, 0
    with device.current():
        device.copy_to_device(memory.address, source.array, stream)
        device.copy_to_host(target.array[:12].view(np.float32), memory.address + 100, stream)
        stream.synchronize()
    assert target.array.tolist() == [7] * 12 + [0] * 988


def test_a_kernel_gets_its_arguments(device, parts, image):
    stream, (source, target), (first, second) = parts
    source.array[:] = np.arange(1000) % 256
    with device.current():
        kernel = device.load_kernel(image, "add_bytes")
        device.copy_to_device(first.address, source.array, stream)
        arguments = [np.uint64(second.address), np.uint64(first.address), np.int32(1000), np.int32(77)]
        kernel.launch((4, 1, 1), (64, 1, 1), 0, arguments, stream)
        device.copy_to_host(target.array, second.address, stream)
        stream.synchronize()
    assert np.array_equal(target.array, source.array + np.uint8(77))


def test_a_graph_replays_on_what_the_buffers_hold_then(device, parts, image):
    stream, (source, target), (first, second) = parts
    with device.current():
        kernel = device.load_kernel(image, "add_bytes")
        target.array[:], source.array[:] = 0, 1
        stream.begin_capture()
        device.copy_to_device(first.address, source.array, stream)
        arguments = [np.uint64(second.address), np.uint64(first.address), np.int32(1000), np.int32(5)]
        kernel.launch((1, 1, 1), (256, 1, 1), 0, arguments, stream)
        device.copy_to_host(target.array, second.address, stream)
        graph = stream.end_capture()
        stream.synchronize()
        assert not target.array.any(), "captured work ran"
        for value in (10, 20):
            source.array[:] = value
            graph.launch(stream)
            stream.synchronize()
            assert (target.array == value + 5).all()
        graph.close()


def test_synchronizing_spoils_a_capture_and_the_stream_recovers(device, parts):
    stream, (source, target), (memory, _) = parts
    with device.current():
        stream.begin_capture()
        with pytest.raises(EngineError, match=r"STREAM_CAPTURE_UNSUPPORTED.*cannot be captured"):
            stream.synchronize()
        with pytest.raises(EngineError, match="STREAM_CAPTURE_INVALIDATED"):
            stream.end_capture()
        source.array[:] = 3
        device.copy_to_device(memory.address, source.array, stream)
        device.copy_to_host(target.array, memory.address, stream)
        stream.synchronize()
    assert (target.array == 3).all()


def test_events_measure_a_stream(device, parts):
    stream, (source, _), (memory, _) = parts
    with device.current():
        start, end = device.create_event(), device.create_event()
        start.record(stream)
        device.copy_to_device(memory.address, source.array, stream)
        end.record(stream)
        end.synchronize()
        assert 0 < end.elapsed_ms(start) < 1000
        start.close()
        end.close()


def test_nothing_works_outside_of_the_context(device):
    for call in (lambda: device.allocate(16), lambda: device.allocate_pinned(16), device.create_stream):
        with pytest.raises(EngineError, match=r"INVALID_CONTEXT|no currently active context"):
            call()
    with device.current(), device.current():  # nested
        device.allocate(16).free()


def test_each_thread_enters_by_itself(device):
    seen: list[object] = []

    def work() -> None:
        try:
            device.allocate(16)
        except EngineError as error:
            seen.append(error)
        with device.current():
            memory = device.allocate(16)
            seen.append(memory.n_bytes)
            memory.free()

    with device.current():
        thread = threading.Thread(target=work)
        thread.start()
        thread.join(timeout=30)
    assert isinstance(seen[0], EngineError)
    assert seen[1] == 16


def test_the_context_is_left_when_the_block_fails(device):
    with pytest.raises(KeyError), device.current():
        raise KeyError("anything")
    with pytest.raises(EngineError):
        device.allocate(16)


def test_out_of_memory_says_what_to_do(device):
    with device.current():
        for allocate in (device.allocate, device.allocate_pinned):
            with pytest.raises(EngineError, match=r"OUT_OF_MEMORY.*smaller batch"):
                allocate(1 << 50)


def test_an_image_for_another_gpu_and_a_name_that_is_not_in_it(device, image):
    with device.current():
        with pytest.raises(UnsupportedError, match=r"INVALID_IMAGE|INVALID_PTX|NO_BINARY_FOR_GPU"):
            device.load_kernel(b"this is no image", "add_bytes")
        with pytest.raises(EngineError, match="NOT_FOUND"):
            device.load_kernel(image, "no_such_kernel")


def test_closing_twice(device):
    device.close()
    device.close()


def test_an_illegal_address_is_a_device_fault_for_ever(device):
    """The last test: where the driver is a library, its process is done for."""
    if not ONLY and not isinstance(device, FakeDevice):
        pytest.skip("a fault ends the CUDA context of the whole process")
    with device.current():
        stream, pinned = device.create_stream(), device.allocate_pinned(64)
        device.copy_to_device(4096, pinned.array, stream)
        with pytest.raises(DeviceFaultError, match=r"ILLEGAL_ADDRESS.*restart the process") as caught:
            stream.synchronize()
        assert caught.value.exit_code == 6
        with pytest.raises(DeviceFaultError):
            device.allocate(16)
    with pytest.raises(DeviceFaultError), device.current():
        pass
    device.close()
