"""The only importer of DeepSpeed: a training step in, plain numbers out; the sharded state as fragments."""

from train.engine.bare import BareEngine
from train.engine.engine import Engine, EvaluationResult, StepResult
from train.engine.fragments import Fragment

__all__ = ["BareEngine", "Engine", "EvaluationResult", "Fragment", "StepResult"]
