"""Judges of what a model wrote. Nothing here evaluates text in this process."""
