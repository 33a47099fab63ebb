"""A trained run becomes files that ship: SavedModel, TFLite and TF-TRT, and one helper that predicts with any of them.

Every artifact takes uint8 pixels and holds its own normalisation and class names. `export` reads runs, data sets and
networks, never the training loop.
"""

import pipeline  # noqa: F401  (first of all: Ctrl-C during the imports is a sentence)
