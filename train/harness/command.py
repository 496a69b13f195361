"""lm-eval's own command line, with our model among its models.

Its releases up to 0.4.13 know no models of other packages; later ones find ours by the entry point `lm_eval.models` and need
this no more.
"""

from __future__ import annotations

import sys

from conf.errors import UserError

EXIT_USER_ERROR = 93


def main() -> int:
    """`lm_eval ...`; returns the exit code."""
    import lm_eval.models  # noqa: F401  (it registers its own models when it finds no other)
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "longhaul" not in model_registry:
        model_registry.register("longhaul", target="train.harness.model:LonghaulLM")
    try:
        cli_evaluate()
    except UserError as error:
        print(f"lm_eval: {error}", file=sys.stderr)
        return EXIT_USER_ERROR
    return 0
