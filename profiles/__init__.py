"""Decisions: what a tensor is (vocabulary), what a profile wants (schema), and the plan that follows."""
