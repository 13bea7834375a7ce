"""From rows to figures: pure functions on DataFrames, usable on any result folder, old ones included."""

from orchestrator.analysis.aggregate import aggregate
from orchestrator.analysis.anchors import corrected, findings_in_words, worker_trends
from orchestrator.analysis.statistics import clustered_standard_error, half_width_95, percentile, sample_floor
from orchestrator.analysis.validation import (
    validate_accuracy_benefits,
    validate_distortion,
    validate_token_utilization,
)

__all__ = [
    "aggregate",
    "clustered_standard_error",
    "corrected",
    "findings_in_words",
    "half_width_95",
    "percentile",
    "sample_floor",
    "validate_accuracy_benefits",
    "validate_distortion",
    "validate_token_utilization",
    "worker_trends",
]
