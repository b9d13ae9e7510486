"""Statistics from running the model. torch and transformers are imported inside functions, never at import time."""
