"""A process whose GPU fails: ``python tests/faulting_engine.py BINDING MOMENT``, for `test_lanes_on_a_gpu`.

The engine's kernel reads an address that is mapped nowhere, at a plain run, in the replay of a graph, or in a run that
was submitted. The process says in JSON what it was told, then and afterwards, and ends with that error's exit code, as
the command does.
"""

from __future__ import annotations

import json
import os
import sys

import numpy as np
from cuda_engine import CudaLibrary, engine_plan

from engines.tensorrt.device import open_device
from engines.tensorrt.runner import TensorRtRunner
from pipeline.artifacts import EngineOptions
from pipeline.errors import EdgefoldError


def main(binding: str, moment: str) -> int:
    device = open_device(binding=binding)
    with device.current():
        library = CudaLibrary(device)
    runner = TensorRtRunner(engine_plan((8, 8)), library.api, EngineOptions(), device=device)
    inputs = {"pixels": np.ones((1, 8, 8, 3), np.uint8)}
    if moment == "replay":
        runner.infer(inputs)
        library.reads_nowhere = True  # captured so
        told = _told(lambda: runner.infer(inputs))
        assert library.contexts[0].calls[-1] == "captured"
    elif moment == "submitted":
        library.reads_nowhere = True
        told = _told(lambda: runner.submit(inputs).result(timeout=30))
    else:
        library.reads_nowhere = True
        told = _told(lambda: runner.infer(inputs))
    library.reads_nowhere = False
    afterwards = [
        _told(lambda: runner.infer(inputs)),
        _told(lambda: runner.submit(inputs).result(timeout=30)),
    ]
    runner.close()
    device.close()
    texts = [f"{type(error).__name__}: {error}" for error in (told, *afterwards)]
    print(json.dumps({"told": texts[0], "afterwards": texts[1:]}), flush=True)
    return told.exit_code if isinstance(told, EdgefoldError) else 1


def _told(run) -> BaseException | None:
    try:
        run()
    except Exception as error:
        return error
    return None


if __name__ == "__main__":
    os._exit(main(*sys.argv[1:]))  # at once, as `apps.cli` does after a fault
