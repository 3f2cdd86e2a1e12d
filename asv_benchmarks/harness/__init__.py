"""What benchmarks and comparisons share: timing, weights, machines. The folder above is on the path of both."""
