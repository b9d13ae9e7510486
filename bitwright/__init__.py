"""One command from a Hugging Face checkpoint to the smallest artifact that still behaves.

The packages of this folder are links to those beside it.
"""
