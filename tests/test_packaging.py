"""What an installation brings: the packages by name, the weights, the report's template."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("wheel")
    # A copy: setuptools writes its build folder beside the sources.
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(folder),
        str(source),
    ]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path).namelist()


def test_the_wheel_has_four_packages_and_nothing_else(wheel: list[str]) -> None:
    top_level = {name.split("/")[0] for name in wheel if ".dist-info" not in name}
    assert top_level == {"apps", "calibration", "engines", "pipeline"}


def test_the_wheel_carries_weights_and_template(wheel: list[str]) -> None:
    for name in (
        "pipeline/models/weights/inception_resnet_lite.signs.safetensors",
        "pipeline/models/weights/inception_resnet_lite.signs.json",
        "apps/report/report.html.j2",
        "apps/report/report.css.j2",
        "apps/streaming/serve/static/page.html",
        "apps/streaming/serve/static/page.js",
        "calibration/placement/cpu.py",
        "engines/tensorrt/preprocess.cu",
        "pipeline/passes/residual_scale.py",
    ):
        assert name in wheel
