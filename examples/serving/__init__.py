"""A serving loop with continuous batching over the paged cache of raw keys."""
