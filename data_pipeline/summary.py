"""What `prepare` tells the person who started it: the plan before, the result after."""

from __future__ import annotations

import shlex

from data_pipeline.config import PrepareConfig
from data_pipeline.inputs import Inputs
from data_pipeline.io import free_bytes, readable_bytes
from data_pipeline.manifest import Manifest
from data_pipeline.workspace import estimated_bytes


def print_plan(config: PrepareConfig, inputs: Inputs, *, workers: int) -> None:
    """What will be read, made and written."""
    tokenizer = config.tokenizer
    if inputs.total_bytes:
        what = f"{inputs.num_files:,} files, {readable_bytes(inputs.total_bytes)}"
    else:
        what = f"{len(inputs.units)} shards of {', '.join(config.corpus.paths)}"
    needed = estimated_bytes(inputs)
    room = "an unknown amount" if needed is None else f"about {readable_bytes(needed)} at the peak"
    source = (
        f"tokenizer of {tokenizer.path}" if tokenizer.path else f"byte-level BPE of {tokenizer.vocab_size} ids, to be trained"
    )
    lines = [
        f"corpus     {config.corpus.name}: {what}, {len(inputs.units)} units of work for {workers} processes",
        f"tokenizer  {source}",
        f"output     {config.output_folder}: {room}, {readable_bytes(free_bytes(config.output_folder))} free",
    ]
    if inputs.rejected:
        lines.append(f"set aside  {len(inputs.rejected)} that cannot be read, the first: {inputs.rejected[0].reason}")
    if len(inputs.units) < workers:
        lines.append(f"note       only {len(inputs.units)} processes have work: one file is read by one process")
    if config.dry_run:
        lines.append("dry run    nothing was written")
    print("\n".join(lines))


def print_summary(manifest: Manifest, *, megabytes_per_second: float, seconds: float) -> None:
    """The funnel, the sizes, and which command comes next."""
    total = max(1, manifest.funnel[0].documents)
    lines = [f"prepared {manifest.name} in {seconds:.1f} s", "", f"  {'':<18}{'documents':>12}{'':>8}{'text':>12}"]
    for row in manifest.funnel:
        share = f"{row.documents / total:.1%}"
        lines.append(f"  {row.step:<18}{row.documents:>12,}{share:>8}{readable_bytes(row.text_bytes):>12}")
    lines += [
        "",
        f"  tokens      {manifest.num_tokens('train'):,} train, {manifest.num_tokens('validation'):,} validation, "
        f"{manifest.bytes_per_token:.2f} bytes of text each",
        f"  tokenizer   {manifest.vocab_size:,} ids, end of document {manifest.eod_token} = {manifest.eod_id}",
        f"  encoder     {manifest.engine}, {megabytes_per_second:.1f} MB/s on one core",
        f"  shards      {len(manifest.shards)} of {manifest.dtype}, fingerprint {manifest.fingerprint[:12]}",
        f"  lies in     {manifest.folder}",
    ]
    if not manifest.num_documents("validation"):
        lines.append(
            "  note        no document was held out, so there will be no validation loss: give more documents, or part"
            " large files with corpus.document_separator"
        )
    rejected = sum(row.documents for row in manifest.funnel[1:] if row.step not in ("train", "held out"))
    if rejected:
        lines.append(f"  set aside   {rejected:,}, each with its reason in {manifest.folder / 'rejected.jsonl'}")
    lines += ["", f"next: longhaul pretrain {shlex.quote(f'data.sources=[{{path: {manifest.folder}}}]')}"]
    print("\n".join(lines))
