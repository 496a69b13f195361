"""lm-eval over our own inference: the model under its name there, its tasks within an evaluation. Owns lm_eval."""
