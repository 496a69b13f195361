"""Small made-up tasks that tell what a model has learned to do. Pure numpy: items, questions, scores; no model and no torch."""

from train.probes.tasks import CHANCE, Probe, make_probes

__all__ = ["CHANCE", "Probe", "make_probes"]
