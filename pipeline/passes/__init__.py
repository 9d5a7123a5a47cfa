"""Graph passes: what is linear and constant goes into the layers, each step verified."""

from pipeline.passes.driver import DEFAULT_PASSES, fold, run_passes
from pipeline.passes.graph_pass import GraphPass, PassRecord, RewriteReport, Tolerance
from pipeline.passes.preprocess import fold_preprocess

__all__ = [
    "DEFAULT_PASSES",
    "GraphPass",
    "PassRecord",
    "RewriteReport",
    "Tolerance",
    "fold",
    "fold_preprocess",
    "run_passes",
]
