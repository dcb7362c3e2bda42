"""Decoding word by word, with what is kept from word to word."""
