"""Commands in one file: image-pipeline (console.py), and python -m pipeline.compare, pipeline.lab, pipeline.workers."""
