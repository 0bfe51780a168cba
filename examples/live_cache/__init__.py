"""A small byte-level model whose RoPE changes with length, read over a live cache past its trained length."""
