"""The page with everything that it can show."""

import pytest
from report_parts import bundle_manifest, measured, table

from apps.report import LatencyRow, render_report
from pipeline.validation_result import AssumedPart


@pytest.fixture(scope="module")
def full_page(tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    render_report(
        path,
        validation=measured(
            assumed=[AssumedPart("preprocessing", "same by construction")], notes=["by index"]
        ),
        manifest=bundle_manifest(),
        max_drop_points=0.5,
        calibration=table(),
        latency=[
            LatencyRow("OpenVINO", "fp32", 1, 4.0, 5.0, 6.0, 250.0),
            LatencyRow("OpenVINO", "int8", 1, 1.0, 1.2, 1.5, 1000.0),
        ],
        commands=["edgefold build inception_v3 --out <dir>"],
    )
    return path.read_text()
