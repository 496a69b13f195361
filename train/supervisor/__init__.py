"""The local process supervisor: starts the ranks of a run on this machine and sees them through to an outcome."""

from train.supervisor.policy import Restarts, run_attempt, supervise

__all__ = ["Restarts", "run_attempt", "supervise"]
