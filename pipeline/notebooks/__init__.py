"""Run the notebooks in `notebooks/` with papermill, and write an HTML report of them."""
