"""Benchmark cases, one op a file."""
