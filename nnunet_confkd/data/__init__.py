"""Data sets: reading, checking, mixing, weakening and planning them."""
