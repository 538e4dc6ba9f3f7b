"""Write on with model.onnx: python THIS "a text" [tokens]; numbers where it does not read bytes."""

import argparse
import json
from pathlib import Path

import numpy as np


def main(text: str, wanted: int) -> None:
    """Print the text and so many tokens more, each the likeliest."""
    import onnxruntime

    here = Path(__file__).parent
    names = json.loads((here / "model.json").read_text())
    session = onnxruntime.InferenceSession(here / "model.onnx")
    state = {leaf["input"]: np.zeros(leaf["shape"], leaf["dtype"]) for leaf in names["state"]}
    outputs = [names["logits"]["output"], *(leaf["output"] for leaf in names["state"])]
    reads_bytes = names["tokenizer"] == "bytes"
    tokens = list(text.encode()) if reads_bytes else [int(number) for number in text.split()]
    n_given = len(tokens)
    for n in range(n_given + wanted - 1):
        feed = {names["token"]["input"]: np.array([tokens[n]], np.int64), **state}
        logits, *after = session.run(outputs, feed)
        state = dict(zip(state, after, strict=True))
        if n + 1 == len(tokens):
            tokens.append(int(logits[0].argmax()))
    print(bytes(tokens).decode(errors="replace") if reads_bytes else tokens)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("text")
    parser.add_argument("tokens", nargs="?", type=int, default=200)
    main(*vars(parser.parse_args()).values())
