"""Datasets: sources, decoding, the Parquet cache, statistics.

Use `pipeline.data.load.load_dataset`.
"""
