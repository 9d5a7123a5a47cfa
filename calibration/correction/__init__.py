"""What is done to a model so that less is lost when it becomes int8."""

from calibration.correction.correcting import Corrector, placed_graph
from calibration.correction.records import (
    AUTO,
    CORRECTIONS,
    CorrectionRecord,
    checked_corrections,
    parse_corrections,
)

__all__ = [
    "AUTO",
    "CORRECTIONS",
    "CorrectionRecord",
    "Corrector",
    "checked_corrections",
    "parse_corrections",
    "placed_graph",
]
