"""What the compiler makes of the kernels, with no GPU: compiled ahead of time for every target, and counted."""
