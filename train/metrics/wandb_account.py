"""Whether Weights & Biases is used, and whether there is a key. Reads what `wandb login` left; does not import it."""

from __future__ import annotations

import netrc
from collections.abc import Mapping
from pathlib import Path
from typing import Literal
from urllib.parse import urlsplit

from train.config.monitor import WandbConfig

Mode = Literal["online", "offline", "disabled"]

_MODE_WORDS: dict[str, Mode] = {
    "online": "online",
    "run": "online",
    "offline": "offline",
    "dryrun": "offline",
    "disabled": "disabled",
}


def resolve_mode(config: WandbConfig, environment: Mapping[str, str]) -> Mode:
    """The mode that `auto` stands for on this machine; any other is taken as it is."""
    if config.mode != "auto":
        return config.mode
    wished = _MODE_WORDS.get(environment.get("WANDB_MODE", "").lower())
    return wished or ("online" if has_key(environment) else "offline")


def has_key(environment: Mapping[str, str]) -> bool:
    """Whether wandb would find credentials without asking anybody; the key itself is not kept."""
    if environment.get("WANDB_API_KEY") or environment.get("WANDB_IDENTITY_TOKEN_FILE"):
        return True
    host = urlsplit(environment.get("WANDB_BASE_URL") or "https://api.wandb.ai").netloc
    named = environment.get("NETRC")
    files = [Path(named).expanduser()] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in files:
        try:
            if netrc.netrc(str(file)).hosts.get(host):
                return True
        except (OSError, netrc.NetrcParseError):
            continue
    return False
