"""Generated audio, music, codes and images: a file as prompt, and a file that continues it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from wavelet_lm.atomic_files import check_writable
from wavelet_lm.cli.terminal import Output, speed, stop_if_interrupted
from wavelet_lm.data.modalities import Modality
from wavelet_lm.data.tokenizers import load_modality
from wavelet_lm.errors import UserError
from wavelet_lm.inference.completion import Writer
from wavelet_lm.inference.generation_options import GenerationOptions
from wavelet_lm.inference.reading import Reading

TEXT_FLAGS = ("prompt", "prompts", "interactive", "stop", "clean_spacing")


def run_modality(options: GenerationOptions) -> Modality | None:
    """What the run writes files of, None for text; the options are checked against it.

    Raises:
        UserError: flags of the one with a run of the other, a file of another kind, no folder.
    """
    modality = load_modality(options.checkpoint)
    if modality is None:
        if options.out is not None:
            raise UserError(
                f"--out {options.out}: this run writes text, to standard output; use > FILE"
            )
        return None
    # What --strategies sets by itself does no harm.
    ours = {"clean_spacing"} if options.strategies else set()
    for flag in TEXT_FLAGS:
        if getattr(options, flag) not in (None, False, ()) and flag not in ours:
            advice = "leave it out"
            if flag in ("prompt", "prompts"):
                advice = f"give a prompt as --prompt_file FILE{modality.suffixes[0]}"
            raise UserError(
                f"--{flag} is for text, and this run writes {modality.kind} ({modality.name});"
                f" {advice}"
            )
    if options.prompt_file is not None:
        modality.check(Path(options.prompt_file))
    if options.out is not None:
        _check_out(Path(options.out), modality)
        check_writable(_out(options, options.n))  # whose name is the longest
    elif not options.json and options.num_tokens != 0:
        raise UserError(
            f"this run writes {modality.kind} ({modality.name}); say where: --out"
            f" FILE{modality.output}, or --json for the tokens alone"
        )
    return modality


def _check_out(out: Path, modality: Modality) -> None:
    if out.suffix.lower() != modality.output:
        raise UserError(
            f"--out {out}: {modality.name} is written as {modality.output}; give such a name"
        )
    check_writable(out)


def continue_file(
    writer: Writer,
    modality: Modality,
    options: GenerationOptions,
    output: Output,
    before: Reading | None = None,
) -> None:
    """Continue the prompt's file, and write each sample with the prompt before it to `--out`.

    Without a prompt a piece starts from the modality's own token, which is not written.

    Args:
        before: what was read of a piece that the prompt follows.

    Raises:
        KeyboardInterrupt: after Ctrl-C, once what there is was written.
        UserError: output that is not finite, a file that cannot be read or written.
    """
    prompt, n_hidden = options.prompt_file or "", 0
    if prompt:
        reading = writer.read([modality.read_prompt(Path(prompt))], before)
    elif before is not None:
        reading = before
    else:
        reading, n_hidden = writer.read([[modality.start]]), 1
    if options.save_state is not None:
        writer.save(options.save_state, reading, whole=True)
    requests = [r for r in options.requests(writer.model.config) if r.num_tokens]
    if not requests:
        output.log(speed(reading, []))
    for first in range(0, len(requests), options.batch_size):
        group = requests[first : first + options.batch_size]
        with output.naming_the_checkpoint():
            rows = writer.fork(reading, [0] * len(group))
            completions = writer.write(rows, group)
        for i, completion in enumerate(completions, first + 1):
            file = _out(options, i)
            if file is not None:
                tokens = [*reading.texts[0], *completion.tokens][n_hidden:]
                modality.write(file, tokens)
                output.log(f"wrote {file}: {len(tokens):,} tokens")
            named = dataclasses.replace(completion, text=str(file or ""))
            output.keep(prompt, named, writer.strategy.sampling)
            output.done(prompt, named)
        output.log(speed(reading if first == 0 else None, completions))
        stop_if_interrupted(completions, group)


def _out(options: GenerationOptions, number: int) -> Path | None:
    """Where sample `number` goes; of several each has its number in its name."""
    if options.out is None:
        return None
    path = Path(options.out)
    return path if options.n == 1 else path.with_name(f"{path.stem}_{number}{path.suffix}")
