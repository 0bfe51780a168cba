"""Small byte-level Llamas trained at one length and read at up to 16 times of it, under several rotary methods."""
