"""Commands in one file: image-pipeline (console.py), and python -m pipeline.compare, find_lr, lab, workers."""
