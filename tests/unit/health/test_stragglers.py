"""Which host is slow, from the computing time of the ranks."""

from __future__ import annotations

import pytest

from train.health.stragglers import Stragglers, summary
from train.parallel import single_process


def test_the_slow_host_is_named_and_not_the_one_with_one_slow_rank() -> None:
    busy = [("a", 1.0), ("a", 1.4), ("a", 1.0), ("b", 1.3), ("b", 1.3), ("b", 1.3), ("c", 1.0), ("c", 1.0), ("c", 1.0)]
    fields = summary(busy)
    assert fields["slowest_host"] == "b" and fields["slowest_rank"] == 1
    assert fields["straggler_ratio"] == pytest.approx(1.4)


def test_gathers_the_median_of_the_steps_since_the_last_time() -> None:
    stragglers = Stragglers(single_process(), 3)
    assert stragglers.after(1, 1.0) == {} == stragglers.after(2, 9.0)
    assert stragglers.after(3, 1.0)["busy_seconds_max"] == 1.0
    assert stragglers.after(6, 5.0)["busy_seconds_median"] == 5.0


def test_none_never_gathers() -> None:
    assert Stragglers(single_process(), None).after(50, 1.0) == {}
