"""lm-eval's own command line, with our model among its models.

Its releases up to 0.4.13 know no models of other packages; later ones find ours by the entry point `lm_eval.models` and need
this no more.
"""

from __future__ import annotations

import sys

from conf.errors import UserError
from train.outcome import ExitCode
from train.stoppable import Stopped, stoppable


def main() -> int:
    """`lm_eval ...`; returns the exit code. Ranks that the model has started end with it, also when it is stopped."""
    try:
        with stoppable():
            _evaluate()
    except UserError as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return ExitCode.DO_NOT_RESTART
    except Stopped as request:
        print(f"lm_eval: stopped by {request}; nothing was kept, the same command begins anew", file=sys.stderr)
        return ExitCode.RESUMABLE
    return ExitCode.FINISHED


def _evaluate() -> None:
    import lm_eval.models  # noqa: F401  (it registers its own models when it finds no other)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "longhaul" not in model_registry:
        model_registry.register("longhaul", target="train.harness.model:LonghaulLM")
    cli_evaluate()
