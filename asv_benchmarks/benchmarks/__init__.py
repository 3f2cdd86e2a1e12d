"""Benchmarks that asv runs; README.md in the folder above says how."""
