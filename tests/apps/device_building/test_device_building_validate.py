"""`edgefold validate` on bundles for devices that are not here."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from device_bundles import built

from apps.cli import main
from pipeline.bundle import Bundle


class TestValidate:
    def validated(self, capfd: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
        capfd.readouterr()
        with pytest.raises(SystemExit) as done:
            main(["validate", *map(str, arguments), "--json"])
        printed = capfd.readouterr()
        assert done.value.code == 0, printed.err
        return dict(json.loads(printed.out))

    def test_a_bundle_for_a_device_that_is_not_here_is_emulated_and_says_so(
        self, for_jetson: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tree = self.validated(capfd, for_jetson.path, "--data", workplace / "images")
        assert tree["stages"][-1]["name"] == "jetson-orin-nx int8, emulated"
        assert tree["stages"][-1]["top1"] == 1.0
        assert any("emulated" in note and "no plan yet" in note for note in tree["notes"])

    def test_a_plan_that_cannot_run_here_is_emulated_too(
        self, for_l4: Bundle, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        tree = self.validated(capfd, for_l4.path, "--data", workplace / "images")
        assert tree["stages"][-1]["name"] == "l4 int8, emulated"
        assert any("driver" in note for note in tree["notes"])

    def test_a_cpu_bundle_shows_what_it_would_be_worth_on_a_jetson(
        self, workplace: Path, capfd: pytest.CaptureFixture[str]
    ) -> None:
        bundle = built(workplace, "cpu", eval_data=None)
        tree = self.validated(capfd, bundle.path, "--data", workplace / "images", "--as", "jetson-orin")
        assert tree["stages"][-1]["name"] == "jetson-orin int8, emulated"
        assert tree["stages"][-1]["top1"] == 1.0
        # Symmetric int8 is another graph than the CPU's: its logits are not the same.
        plain = self.validated(capfd, bundle.path, "--data", workplace / "images")
        assert tree["total"]["sqnr_db"] != plain["total"]["sqnr_db"]

    @pytest.mark.parametrize(
        ("precision", "target", "code", "words"),
        [
            ("int8", "cpu", 2, "needs no emulation"),
            ("int8", "jetson-nona", 4, "jetson-nano"),
            ("fp32", "l4", 2, "no calibration table"),
        ],
    )
    def test_what_cannot_be_emulated_says_why(
        self,
        workplace: Path,
        capfd: pytest.CaptureFixture[str],
        precision: str,
        target: str,
        code: int,
        words: str,
    ) -> None:
        bundle = built(workplace, f"cpu-{precision}", precision=precision, eval_data=None)
        with pytest.raises(SystemExit) as stopped:
            main(["validate", str(bundle.path), "--data", str(workplace / "images"), "--as", target])
        assert stopped.value.code == code
        assert words in " ".join(capfd.readouterr().err.split())
