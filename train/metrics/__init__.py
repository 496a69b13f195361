"""What a run reports: metrics.jsonl (the truth), the console, TensorBoard, Weights & Biases; speed and memory."""

from train.metrics.goodput import Goodput
from train.metrics.jsonl import read_metrics
from train.metrics.monitor import Metrics, NullMetrics
from train.metrics.record import RunIdentity, Value
from train.metrics.throughput import StepTimer, Throughput, memory_gib
from train.metrics.weights_and_biases import replay

__all__ = [
    "Goodput",
    "Metrics",
    "NullMetrics",
    "RunIdentity",
    "StepTimer",
    "Throughput",
    "Value",
    "memory_gib",
    "read_metrics",
    "replay",
]
