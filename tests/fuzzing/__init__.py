"""Random calls of every public function, and what judges them; tests/fuzz_calls.py runs them."""
