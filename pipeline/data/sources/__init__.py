"""One file per source of images; `pipeline.data.load` finds them by name."""
