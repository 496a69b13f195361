"""What a checkpoint costs the steps around it: part of `longhaul bench step`, when it is asked for `saves`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

QUIET_STEPS = 6  # between two saves, to compare with


def measure_saves(step: Callable[[], Any], trainer: Any, saves: int) -> dict[str, Any]:
    """Save so many times on the way, on all ranks together; seconds of the steps without a save, with one, and in all.

    A step that a save begins behind, or runs beside, counts as one with a save.
    """
    quiet: list[float] = []
    lost: list[float] = []
    beside: list[float] = []
    _timed(step)  # the caches are full of another's data
    for number in range(saves + 1):
        mine = [_timed(step) for _ in range(QUIET_STEPS)]
        usual = statistics.median(mine)
        trainer.requests.ask_to_save()
        burst = [_timed(step)]
        while trainer.context.sum_over_ranks([int(not trainer.saver.is_idle)])[0] or len(burst) < 2:
            burst.append(_timed(step))
        if number:  # the first one allocates
            quiet += mine
            lost.append(sum(burst) - len(burst) * usual)
            beside += burst[1:]
    return {
        "step_ms": round(1e3 * statistics.median(quiet), 2),
        "step_beside_a_save_ms": round(1e3 * statistics.median(beside), 2),
        "steps_beside_a_save": round(len(beside) / saves, 1),
        "lost_in_all_ms": round(1e3 * statistics.median(lost), 2),
    }


def add_stalls(report: dict[str, Any], stalls: list[float]) -> list[str]:
    """Put the time that the loop was held up into `report["saves"]`; lines for a person."""
    saves = report["saves"]
    stall = statistics.median(stalls)
    saves["stall_ms"] = round(1e3 * stall, 2)
    saves["stall_ms_worst"] = round(1e3 * max(stalls), 2)
    saves["stall_share_of_a_step"] = round(1e3 * stall / saves["step_ms"], 4)
    return [
        f"a checkpoint holds the loop up for {saves['stall_ms']:.1f} ms, {saves['stall_share_of_a_step']:.1%} of a step "
        f"(worst {saves['stall_ms_worst']:.1f} ms)",
        f"a step beside its writing takes {saves['step_beside_a_save_ms']:.1f} ms instead of {saves['step_ms']:.1f}, for "
        f"{saves['steps_beside_a_save']:.1f} steps; {saves['lost_in_all_ms']:.1f} ms are lost in all",
    ]


def _timed(step: Callable[[], Any]) -> float:
    started = time.perf_counter()
    step()
    return time.perf_counter() - started
