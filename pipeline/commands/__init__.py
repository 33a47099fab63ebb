"""Commands that are a single file: `python -m pipeline.compare`, `pipeline.lab`, `pipeline.workers`."""
