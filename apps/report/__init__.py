"""What a validation found, for people: wording, terminal tables and the HTML report."""

from apps.report.page import LatencyRow, render_report
from apps.report.terminal import print_agreement, print_validation
from apps.report.wording import Verdict, verdict

__all__ = ["LatencyRow", "Verdict", "print_agreement", "print_validation", "render_report", "verdict"]
