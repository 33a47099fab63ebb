"""Metrics, figures, the evaluation of a run, the comparison of runs, and the measurements of exported models."""
