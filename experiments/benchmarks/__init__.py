"""Side-by-side timings, with their results in `results/`."""
