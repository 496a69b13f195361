"""The only importer of DeepSpeed: a training step in, plain numbers out; the sharded state as fragments."""

from train.engine.bare import BareEngine
from train.engine.contract import Answers, EvaluationResult, StepResult
from train.engine.engine import Engine
from train.engine.fragments import Fragment

__all__ = ["Answers", "BareEngine", "Engine", "EvaluationResult", "Fragment", "StepResult"]
