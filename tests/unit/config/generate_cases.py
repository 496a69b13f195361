"""Words of `longhaul generate` that break one rule each."""

from __future__ import annotations

GENERATE_CASES: list[tuple[str, list[str], str]] = [
    ("generate", ["checkpoint=''"], "checkpoint='': needs the folder of a checkpoint or of a run"),
    ("generate", ["prompt_file=a"], "prompt: give one of prompt and prompt_file, not both"),
    ("generate", ["prompt=null", "chat=false"], "chat=false: needs a text to continue; give prompt or prompt_file"),
    ("generate", ["system=a"], "system: is of a chat; give chat=true with it"),
    ("generate", ["chat=true", "num_samples=2"], "num_samples=2: a chat has one answer to a question"),
    ("generate", ["prompt=''"], "prompt='': needs at least one character to continue"),
    ("generate", ["max_new_tokens=0"], "max_new_tokens=0: must be at least 1"),
    ("generate", ["temperature=-1"], "temperature=-1.0: must not be negative; 0 takes the likeliest token"),
    ("generate", ["top_k=0"], "top_k=0: must be at least 1; null means all tokens"),
    ("generate", ["top_p=0"], "top_p=0.0: must be above 0 and at most 1; null means all tokens"),
    ("generate", ["temperature=0", "num_samples=2"], "num_samples=2: with temperature=0 all samples are the same"),
    ("generate", ["stop=['']"], "stop: holds an empty text, which ends every continuation at once; remove it"),
    ("generate", ["tensor=0"], "tensor=0: must be at least 1"),
    ("generate", ["num_samples=0"], "num_samples=0: must be at least 1"),
]
