"""What is measured, against what: `python -m benchmarks.NAME` prints a table and writes JSON."""
