"""Commands that judge an artifact: beside its source, or by its runtime."""
