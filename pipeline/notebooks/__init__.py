"""Runs the chapters in `notebooks/` with papermill and writes a report of them."""
