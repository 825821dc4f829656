"""Comparing runs by their files: a ranked table, the difference of two runs, and a page. Nothing here imports torch."""
