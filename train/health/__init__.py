"""Keeps a run well: the request to stop, and the eye on the loss."""
