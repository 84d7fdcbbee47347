"""Versions of what a run folder holds (docs/metrics.md). Imports nothing: readers of runs start at once.

A version goes up when a reader of the older one would misread the newer; new keys alone do not raise it.
"""

SUMMARY_VERSION = 2  # 2: provenance.evaluation.data, the name and the fingerprint of the dataset
METRICS_VERSION = 2  # 2: the file begins with a line {"step": 0, "version": 2}; before, no line had a version
