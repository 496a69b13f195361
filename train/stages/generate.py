"""Generation: a checkpoint, and a prompt that it continues or a chat with it; text on the console."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from conf.errors import UserError
from data_pipeline.chat_files import end_ids
from train.companions import ranks
from train.config.generate import GenerateConfig
from train.evaluate.subject import Subject, open_subject
from train.inference.cached import CachedDecoder
from train.inference.chat import Answering, ChatFormat, Dialogue, Reader, chat_format
from train.inference.chat_loop import ChatLoop, Lines
from train.inference.generation import Continuation, Request, generate_ids
from train.inference.load import check_divisible, load_decoder, resolve_device, resolve_dtype
from train.inference.sampling import Sampling
from train.inference.text import Console
from train.parallel import ParallelContext, single_process
from train.precision import resolve_precision


def run(config: GenerateConfig) -> int:
    """Continue the prompt, or answer its questions, on stdout; a summary goes to stderr. Returns the exit code.

    Raises UserError for a prompt or a checkpoint that cannot be read or trusted, and for a model that cannot chat.
    """
    prompt = read_prompt(config)
    subject = open_subject(config.checkpoint, None, verify=config.verify)
    check_divisible(subject.model, config.tensor)
    if config.chats:
        chat(config, subject, chat_format(subject, subject.reader.settings), prompt)
    else:
        assert prompt is not None, "the settings ask for one"
        continue_prompt(config, subject, prompt)
    return 0


def continue_prompt(config: GenerateConfig, subject: Subject, prompt: str) -> None:
    """The continuations of a text."""
    tokenizer = subject.tokenizer
    request = Request(
        prompt=(*subject.opening, *tokenizer.encode(prompt)),
        max_new_tokens=config.max_new_tokens,
        sampling=sampling_of(config),
        num_samples=config.num_samples,
        seed=config.seed,
        num_known_ids=subject.known_ids,
    )
    ends = end_ids(tokenizer)
    continuations = [Continuation(tokenizer.stream(), stop=config.stop, ends=ends) for _ in range(request.num_samples)]
    console = Console(sys.stdout, request.num_samples, live=config.stream)
    with ranks_of(config) as context:
        config = settled(config, context)
        decoder = decoder_of(config, subject, context)
        started = time.perf_counter()
        show(decoder, request, continuations, console)
        seconds = time.perf_counter() - started
    num_tokens = sum(continuation.num_tokens for continuation in continuations)
    speed = speed_words(num_tokens, seconds, config, context)
    print(f"{subject.reader.path.name}, {len(request.prompt)} prompt tokens: {speed}", file=sys.stderr)


def chat(config: GenerateConfig, subject: Subject, form: ChatFormat, prompt: str | None) -> None:
    """Answers to the prompt, or to the lines of standard input."""
    system = form.system if config.system is None else config.system or None
    answering = Answering(
        sampling=sampling_of(config), max_new_tokens=config.max_new_tokens, seed=config.seed, stop=config.stop
    )
    with ranks_of(config) as context:
        config = settled(config, context)
        interactive = prompt is None and bool(context.from_first(sys.stdin.isatty()))
        if prompt is None and not interactive and not config.chat:
            raise UserError(
                "prompt: give prompt or prompt_file; standard input is no terminal, chat=true takes its lines as turns"
            )

        def tell(words: str) -> None:
            if context.is_first:
                print(words, file=sys.stderr, flush=True)

        dialogue = Dialogue(Reader(decoder_of(config, subject, context)), form, answering, system=None, tell=tell)
        dialogue.set_system(system)
        loop = ChatLoop(dialogue, context, output=sys.stdout, interactive=interactive, live=config.stream)
        if prompt is not None:
            loop.ask(prompt)
        else:
            if interactive:
                said = "" if system is None else f" The system says: {system}"
                tell(f"{subject.reader.path.name}, written out by {form.template.name}.{said} /help tells the commands.")
            loop.run(Lines(sys.stdin, prompts=interactive))
        tally = dialogue.tally
        told = "1 answer" if tally.answers == 1 else f"{tally.answers} answers"
        tell(f"{subject.reader.path.name}, {told}: {speed_words(tally.tokens, tally.seconds, config, context)}")


def sampling_of(config: GenerateConfig) -> Sampling:
    """How tokens are chosen."""
    return Sampling(temperature=config.temperature, top_k=config.top_k, top_p=config.top_p)


@contextmanager
def ranks_of(config: GenerateConfig) -> Iterator[ParallelContext]:
    """This process alone, or the ranks that share the model."""
    device = resolve_device(config.device)
    if config.tensor == 1:
        yield single_process(device.type)
        return
    with ranks(config.tensor, device.type, tensor_parallel=config.tensor) as context:
        yield context


def settled(config: GenerateConfig, context: ParallelContext) -> GenerateConfig:
    """With the dtype that `auto` is on the first rank, for all of them."""
    return replace(config, dtype=context.from_first(resolve_precision(config.dtype, context.device.type).precision))


def decoder_of(config: GenerateConfig, subject: Subject, context: ParallelContext) -> CachedDecoder:
    """The model with its weights; of them, this rank's part."""
    device = context.device
    decoder = load_decoder(subject.reader, resolve_dtype(config.dtype, device), device=device, tensor=context.tensor)
    return CachedDecoder(decoder, subject.model)


def speed_words(num_tokens: int, seconds: float, config: GenerateConfig, context: ParallelContext) -> str:
    """How much was written, how fast, and on what."""
    rate = num_tokens / seconds if seconds else 0.0
    return f"{num_tokens} tokens in {seconds:.1f} s ({rate:.1f} tokens/s) on {context.device.type} in {config.dtype}"


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


def read_prompt(config: GenerateConfig) -> str | None:
    """The text to continue; None: a chat takes its turns from standard input.

    Raises UserError for a file that cannot be read or holds nothing.
    """
    if config.prompt_file is None:
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
