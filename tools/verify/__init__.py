"""Verification that a bundle computes what its checkpoint computes.

Each check compares two neighbours on the bundle's own files (``checks.py`` lists them). Each is
run, or the report says why this machine cannot; ``visistage verify`` writes it beside the files.
"""
