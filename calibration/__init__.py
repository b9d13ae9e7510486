"""What is measured by running the model, a layer at a time.

text, statistics, sensitivity and evaluation import without torch; stream, passes and super_weights.search, which run
the model, are imported by the functions that need them.
"""
