"""Build the custom operations, check them against TensorFlow's own, and time them: ``python -m pipeline.ops``"""

from __future__ import annotations

import argparse
import dataclasses
import time

from benchmarks import ops_checks, ops_timing
from pipeline import ops
from pipeline.core import cli, device
from pipeline.core.errors import PipelineError


def main() -> int:
    on_gpu = device.has_gpu()
    parser = argparse.ArgumentParser(prog="python -m pipeline.ops", description=__doc__)
    parser.add_argument(
        "--rows", type=int, default=65536 if on_gpu else 2048, help="of 1024 columns (%(default)s here)"
    )
    parser.add_argument("--dtypes", nargs="+", choices=ops.DTYPES, default=list(ops.DTYPES))
    parser.add_argument("--no-timing", action="store_true", help="only build and check")
    parser.add_argument("--keep", action="store_true", help="write the figures to benchmarks/results")
    arguments = parser.parse_args()
    if arguments.rows < 1:
        raise PipelineError(f"--rows must be at least 1, got {arguments.rows}.")

    started = time.perf_counter()
    path = ops.build()
    print(f"built: {path} ({time.perf_counter() - started:.1f} s)")
    if not ops.available():
        raise PipelineError("The custom operations were built, but do not run here; the warning above says why.", 1)
    results = ops_checks.run()
    for check in results:
        mark = "ok" if check.passed else "WRONG"
        print(f"{mark:<6} {check.name:<46} {check.difference:.1e} (at most {check.allowed:.0e})")
    wrong = [check.name for check in results if not check.passed]
    if wrong:
        raise PipelineError(f"{len(wrong)} of {len(results)} checks failed: {', '.join(wrong)}.", 1)
    if arguments.no_timing:
        return 0

    shape = (arguments.rows, 1024)
    print(f"\nmicroseconds for {shape[0]} × {shape[1]} = {shape[0] * shape[1] / 2**20:g} Mi elements")
    rows = [row for dtype in arguments.dtypes for row in ops_timing.measure(shape, dtype)]
    print(ops_timing.table(rows))
    bandwidth = max(row.bytes / row.floor for row in rows)
    print(f"\na copy moves {bandwidth / 1e9:,.0f} GB/s; 'of copy' is how much of that our operation reaches")
    if not arguments.keep:
        return 0

    from benchmarks import results

    figures = {
        "shape": list(shape),
        "copy_bytes_per_second": bandwidth,
        "checks": [dataclasses.asdict(check) for check in results],
        "operations": [
            {**dataclasses.asdict(row), "fraction_of_copy": row.fraction_of_copy, "verdict": row.verdict}
            for row in rows
        ],
    }
    print(f"written to {results.save('ops', figures, results.running('pipeline.ops'))}")
    return 0


if __name__ == "__main__":
    cli.run(main)
