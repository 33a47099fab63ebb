"""One command a question; the answers are kept in `benchmarks/results`, with the machine and the versions."""
