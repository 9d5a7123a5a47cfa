"""The benchmark of a GPU's lanes over a driver in host memory: that it runs, not what it measures."""

from __future__ import annotations

import json
import subprocess
import sys

import host_driver
import pytest

REHEARSAL = """
import sys
from pathlib import Path
import cuda_lanes
from engines.tensorrt import preprocess
from engines.tensorrt.nvrtc import CompiledKernels

def pageable(device, n_bytes):
    return device.allocate_pinned(n_bytes).array  # this driver refuses to copy any other

preprocess.preprocess_kernels = lambda sm: CompiledKernels(sm, b"\\x7fELF", b"")
cuda_lanes.pageable, cuda_lanes.COPY_BYTES = pageable, 1 << 20
cuda_lanes.write_results = lambda name, tree: Path(sys.argv[1]).write_text(cuda_lanes.json.dumps(tree))
cuda_lanes.main(["--binding", sys.argv[2], "--rounds", "1", "--seconds", "0.01"])
"""


@pytest.mark.parametrize("binding", ["cuda-python", "pycuda"])
def test_every_part_runs(tmp_path, binding):
    host_driver.needs(binding)
    driver = host_driver.build(tmp_path)
    done = subprocess.run(
        [sys.executable, "-c", REHEARSAL, tmp_path / "found.json", binding],
        env=host_driver.environment(driver, binding),
        cwd=host_driver.ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["device"]["name"] == "Fake GPU"
    assert [row["lanes"] for row in found["throughput"]] == [1, 2, 3, 4] * 2
    assert {row["cuda_graphs"] for row in found["throughput"]} == {"replayed"}
    replays = {row["replayed"]: row["cuda_graphs"].startswith("replayed") for row in found["latency"]}
    assert replays == {True: True, False: False}
    assert all(rate > 0 for rate in found["copies"].values())
    assert len(found["overlap"]) == 4
    assert found["frames"]["frames_per_s_2_lanes_1_feeding_thread"] > 0
