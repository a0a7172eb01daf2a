"""Data: where it comes from, how it is decoded, the letters we ship."""
