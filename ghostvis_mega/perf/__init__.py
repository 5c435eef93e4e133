"""Hardware peaks, estimates and benchmarks."""
