"""Statistics from running the model.

importance, imatrix_file, corpus and quality import without torch; stream, observer and weights, which run the model,
are imported by the functions that need them.
"""
