"""Measurements of llama_lab; each module prints one JSON line a case."""
