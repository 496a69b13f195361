"""Pretraining on one engine: configuration, plan, launcher, model, engine, checkpoints, loop, stages."""
