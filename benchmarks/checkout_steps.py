"""Training steps of the checkout that PYTHONPATH names, as many as standard input asks for.

    PYTHONPATH=CHECKOUT python benchmarks/checkout_steps.py CONFIG VOCABULARY eager|compiled

`checkouts.py` starts it and compares; so it uses no more of the project than every version has. For
every number n that comes on a line it takes n steps and writes, as JSON, two lists: the seconds of
CPU time of each, and the losses.
"""

import json
import sys
import time
from pathlib import Path

import torch

from wavelet_lm.config import Config
from wavelet_lm.models.registry import build_model
from wavelet_lm.training.optimizers import Optimizer

N_BATCHES = 16


def main() -> None:
    file, vocab_size, mode = sys.argv[1:]
    torch.set_num_threads(1)
    keys = json.loads(Path(file).read_text(encoding="utf-8"))
    config = Config.from_dict(keys, source=file)
    torch.manual_seed(0)
    model = build_model(config, int(vocab_size)).train()
    optimizer = Optimizer(model, config)
    optimizer.set_lr(config.lr)
    loss_of = torch.compile(model.loss) if mode == "compiled" else model.loss
    shape = (N_BATCHES, config.micro_batch_size, config.block_size + 1)
    batches = torch.randint(int(vocab_size), shape, generator=torch.Generator().manual_seed(1))
    step = 0
    for line in sys.stdin:
        seconds, losses = [], []
        for _ in range(int(line)):
            tokens = batches[step % N_BATCHES]
            started = time.process_time()
            loss, _ = loss_of(tokens[:, :-1], tokens[:, 1:])
            loss.backward()
            for part in optimizer.parts:
                part.step()
            optimizer.zero_grad()
            losses.append(loss.item())
            seconds.append(time.process_time() - started)
            step += 1
        print(json.dumps([seconds, losses]), flush=True)


if __name__ == "__main__":
    main()
