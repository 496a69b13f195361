"""Generation: a checkpoint, a prompt, text on the console."""

from __future__ import annotations

import sys
import time
from contextlib import nullcontext
from pathlib import Path

from conf.errors import UserError
from data_pipeline.tokenizer import Tokenizer
from train.checkpoint.manifest import resolve_checkpoint
from train.checkpoint.reader import CheckpointReader
from train.companions import ranks
from train.config.generate import GenerateConfig
from train.config.imported import ImportedConfig
from train.inference.cached import CachedDecoder
from train.inference.generation import Continuation, Request, generate_ids
from train.inference.load import check_divisible, load_decoder, resolve_device, resolve_dtype
from train.inference.sampling import Sampling
from train.inference.special import special_id
from train.inference.text import Console
from train.parallel import single_process


def run(config: GenerateConfig) -> int:
    """Continue the prompt on stdout; a summary goes to stderr. Returns the exit code.

    Raises UserError for a prompt or a checkpoint that cannot be read or trusted.
    """
    prompt = read_prompt(config)
    device = resolve_device(config.device)
    reader = CheckpointReader(resolve_checkpoint(config.checkpoint))
    if config.verify:
        reader.verify()
    tokenizer = Tokenizer(reader.tokenizer_folder)
    # Our runs read documents without an opening; models from elsewhere have learned to expect theirs.
    opening = tokenizer.opening() if isinstance(reader.settings, ImportedConfig) else []
    request = Request(
        prompt=(*opening, *tokenizer.encode(prompt)),
        max_new_tokens=config.max_new_tokens,
        sampling=Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p),
        num_samples=config.num_samples,
        seed=config.seed,
        num_known_ids=min(tokenizer.vocab_size, reader.model.vocab_size),
    )
    check_divisible(reader.model, config.tensor)
    end = special_id(tokenizer, "eos_token")
    ends = () if end is None else (end,)
    continuations = [Continuation(tokenizer.stream(), stop=config.stop, ends=ends) for _ in range(request.num_samples)]
    console = Console(sys.stdout, request.num_samples, live=config.stream)
    alone = nullcontext(single_process(device.type))
    shared = ranks(config.tensor, device.type, tensor_parallel=config.tensor)
    with alone if config.tensor == 1 else shared as context:
        dtype = resolve_dtype(config.dtype, device)
        decoder = load_decoder(reader, dtype, device=context.device, tensor=context.tensor)
        started = time.perf_counter()
        show(CachedDecoder(decoder, reader.model), request, continuations, console)
        seconds = time.perf_counter() - started
    num_tokens = sum(continuation.num_tokens for continuation in continuations)
    print(
        f"{reader.path.name}, {len(request.prompt)} prompt tokens: {num_tokens} tokens in {seconds:.1f} s "
        f"({num_tokens / seconds:.1f} tokens/s) on {device.type}",
        file=sys.stderr,
    )
    return 0


def show(decoder: CachedDecoder, request: Request, continuations: list[Continuation], console: Console) -> None:
    """Generate until every sample has reached its end, showing the text as it becomes certain."""
    for ids in generate_ids(decoder, request):
        for sample, (continuation, token_id) in enumerate(zip(continuations, ids, strict=True)):
            if continuation.finished:
                continue
            console.show(sample, continuation.push(token_id))
            if continuation.finished:
                console.finish(sample)
        if all(continuation.finished for continuation in continuations):
            return
    for sample, continuation in enumerate(continuations):
        if not continuation.finished:
            console.show(sample, continuation.finish())
            console.finish(sample)


def read_prompt(config: GenerateConfig) -> str:
    """The text to continue. Raises UserError for a file that cannot be read or holds nothing."""
    if config.prompt is not None:
        return config.prompt
    path = Path(config.prompt_file)
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"prompt_file={path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError as error:
        raise UserError(f"prompt_file={path}: is not UTF-8 (byte {error.start})") from None
    if not text:
        raise UserError(f"prompt_file={path}: is empty; it needs at least one character to continue")
    return text
