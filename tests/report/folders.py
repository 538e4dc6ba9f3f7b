"""Run folders as training leaves them, made in a moment."""

import json
import math

from tests.conftest import tiny_config

SCALES = {
    "name": "block 1",
    "scales": ["a", "d1", "d0"],
    "weights": [1.0, 0.5, 2.0],
    "lags": [[], [2.5], [1.0]],
}


def run_folder(path, steps, total=40, *, ends=True, lr=0.01, **overrides):
    """Of a run of `steps` steps; `ends`: whether it came to its end."""
    path.mkdir(parents=True)
    config = tiny_config(max_steps=total, lr=lr, micro_batch_size=4, grad_accum=2, **overrides)
    (path / "config.json").write_text(config.to_json())
    about = {"date": f"2026-11-2{steps % 7}T10:00:00+00:00", "torch": "2.13.0", "lr": lr}
    (path / "environment.json").write_text(json.dumps(about))
    (path / "log.txt").write_text("2026-11-27 10:00:00  <b>begun</b>\n")
    rows = []
    for step in range(steps + 1):
        if step:
            row = {"event": "train", "step": step, "loss": 5 - step / 20, "lr": lr}
            row |= {"grad_norm": 1.5, "memory_bytes": 2**20, "tokens_per_second": 100.0}
            rows.append({**row, "seconds": step / 2})
        if step % 10 == 0:
            loss = 5.5 - step / 20
            rows.append({"event": "eval", "step": step, "val_loss": loss})
            rows[-1]["bits_per_byte"] = loss / math.log(2)
            rows.append({"event": "scales", "step": step, "blocks": [SCALES]})
        if step and step % 20 == 0:
            text = {"prompt": "The ", "text": f"</script><i>{step}\0"}
            rows.append({"event": "sample", "step": step, **text})
    if ends:
        rows.append({"event": "test", "step": steps, "n_params": 1234})
        rows[-1]["sliding"] = {"bits_per_byte": 2.5}
        rows.append({"event": "end", "step": steps, "seconds": steps / 2})
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
