"""One command a question; the answers are kept in `benchmarks/results`, with the machine and the versions."""

import pipeline  # noqa: F401  (first of all: Ctrl-C during the imports is a sentence)
