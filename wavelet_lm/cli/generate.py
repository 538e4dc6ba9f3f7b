"""Continue a prompt with a trained WaveletLM: `python generate.py logs/RUN`."""

import functools
import sys

from wavelet_lm.atomic_files import check_writable
from wavelet_lm.cli.generation_flags import parse_options
from wavelet_lm.cli.interactive import converse
from wavelet_lm.cli.modality_files import continue_file, run_modality
from wavelet_lm.cli.terminal import Output, read_prompt, write_batch, write_samples
from wavelet_lm.devices import resolve_device
from wavelet_lm.hub_paths import is_in_hub
from wavelet_lm.inference.build_engine import open_writer
from wavelet_lm.models.checkpoint import find_checkpoint
from wavelet_lm.threads import use_threads
from wavelet_lm.training.provenance import command_line


def main() -> None:
    sys.stdout.reconfigure(errors="replace")  # a terminal that is not UTF-8 shows "?"
    options = parse_options(__doc__)
    modality = run_modality(options)
    prompts = [] if modality else options.read_prompts()
    output = Output(
        write=lambda text: print(text, end="", flush=True),
        log=functools.partial(print, file=sys.stderr),
        checkpoint=find_checkpoint(options.checkpoint),
        command=command_line(),
        as_json=options.json or options.prompts is not None,
        record=not (options.no_record or is_in_hub(options.checkpoint)),
        metrics=bool(options.metrics),
    )
    use_threads(options.threads)
    if options.save_state is not None:
        check_writable(options.save_state)
    writer = open_writer(options, resolve_device(options.device), output.log)
    config, size = writer.model.config, options.batch_size
    before = None if options.load_state is None else writer.load(options.load_state)

    if modality:
        continue_file(writer, modality, options, output, before)
        return
    if options.prompts is not None:
        jobs = [(prompt, r) for prompt in prompts for r in options.requests(config, prompt)]
        write_batch(writer, jobs, output, batch_size=size, before=before)
        return
    default = config.generation_prompt if before is None and not options.interactive else ""
    prompt, requests = prompts[0].text if prompts else default, options.requests(config)
    reading = before
    if prompts or not options.interactive:
        reading = read_prompt(writer, prompt, before, output.log)
    save = functools.partial(writer.save, options.save_state) if options.save_state else _nowhere
    if options.interactive:
        converse(writer, requests[0], output, reading, save=save)
    else:
        save(reading)
        echo = options.prompt is not None or not prompts
        write_samples(writer, reading, prompt, requests, output, batch_size=size, echo=echo)


def _nowhere(reading: object) -> None:
    pass
