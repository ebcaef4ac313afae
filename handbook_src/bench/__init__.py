"""Measuring: interleaved timings, races at equal budget, the workshop of the kernels."""
