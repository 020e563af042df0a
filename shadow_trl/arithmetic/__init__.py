"""The numbers: `grafted = instruct + scale * (tuned - base)` on tensors, rounding, sums, low rank. No files."""
