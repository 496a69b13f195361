"""Scores of outputs against truths: numpy and plain Python, no model and no torch. Fine-tuning, evaluation and reports stand on
it."""
