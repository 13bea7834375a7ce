"""From rows to figures: pure functions on DataFrames, usable on any result folder, old ones included."""

from orchestrator.analysis.aggregate import aggregate
from orchestrator.analysis.statistics import clustered_standard_error, percentile, sample_floor

__all__ = ["aggregate", "clustered_standard_error", "percentile", "sample_floor"]
