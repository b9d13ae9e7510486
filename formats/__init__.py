"""Bytes: block codecs, GGUF files. Imports nothing of this project but itself."""
