"""What this library claims, measured. `python -m benchmarks list` names the benchmarks."""
