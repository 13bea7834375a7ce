"""From rows to figures: pure functions on DataFrames, usable on any result folder, old ones included."""

from orchestrator.analysis.aggregate import aggregate
from orchestrator.analysis.anchors import corrected, findings_in_words, worker_trends
from orchestrator.analysis.compare import compare
from orchestrator.analysis.statistics import (
    accuracy_interval,
    clustered_standard_error,
    half_width_95,
    holm,
    percentile,
    sample_floor,
    wilson_interval,
)
from orchestrator.analysis.validation import (
    validate_accuracy_benefits,
    validate_distortion,
    validate_token_utilization,
)

__all__ = [
    "accuracy_interval",
    "aggregate",
    "clustered_standard_error",
    "compare",
    "corrected",
    "findings_in_words",
    "half_width_95",
    "holm",
    "percentile",
    "sample_floor",
    "validate_accuracy_benefits",
    "validate_distortion",
    "validate_token_utilization",
    "wilson_interval",
    "worker_trends",
]
