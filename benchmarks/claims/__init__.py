"""Benchmarks of soundness and quality."""
