"""How far two engines' answers to the golden frames are apart, where both run the same graph.

    python benchmarks/golden_limits.py BUNDLE ...

writes benchmarks/results/golden_limits.json: SQNR in dB of the logits of ONNX Runtime, and of OpenVINO computing Q/DQ as
written, against the answers that the build kept in the bundle. `pipeline.golden.LOGITS_LIMIT_DB` is set below the least of
them. Nothing is timed.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from harness import machine_stamp, write_results

import engines
from engines.openvino import EMULATOR
from pipeline.artifacts import EngineArtifact, EngineOptions
from pipeline.bundle import open_bundle
from pipeline.golden import LOGITS_LIMIT_DB, golden_logits
from pipeline.golden_frames import read_golden
from pipeline.metrics import sqnr_db


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bundles", nargs="+", type=Path)
    rows = []
    for path in parser.parse_args().bundles:
        bundle = open_bundle(path)
        golden, manifest = read_golden(bundle), bundle.manifest
        assert golden is not None, f"{path} has no golden frames"
        backends = {
            "openvino": engines.get_backend("openvino"),
            "onnxruntime": engines.get_backend("onnxruntime"),
            "openvino, Q/DQ as written": EMULATOR,
        }
        for file, expected in golden.logits.items():
            sha256 = bundle.sha256(file)
            for name, backend in backends.items():
                artifact = EngineArtifact(
                    bundle.file(file), sha256, sha256, backend.name, backend.fingerprint()
                )
                with backend.load(artifact, EngineOptions()) as runner:
                    logits = golden_logits(golden, runner, manifest.preprocess, manifest.input_color)
                found = sqnr_db(expected, logits)
                rows.append(
                    {
                        "model": manifest.name,
                        "weights": manifest.model.weights,
                        "file": file,
                        "engine": name,
                        "sqnr_db": None if math.isinf(found) else round(found, 1),
                    }
                )
                print(rows[-1])
    write_results(
        "golden_limits",
        {
            "machine": machine_stamp(),
            "limits_db": LOGITS_LIMIT_DB,
            "sqnr_db null": "the same to the bit",
            "rows": rows,
        },
    )


if __name__ == "__main__":
    main()
