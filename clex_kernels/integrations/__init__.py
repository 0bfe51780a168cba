"""Models of other libraries on these kernels."""
