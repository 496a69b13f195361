"""Keeps a run well: the request to stop."""
