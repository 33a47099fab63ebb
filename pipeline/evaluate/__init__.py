"""Metrics, figures, and the comparison of runs."""
