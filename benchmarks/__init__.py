"""Benchmarks of every feature against checked rivals, and the report made of them."""
