"""What the quick start promises, checked on the run folder that it left."""

import json
import sys
from pathlib import Path

run = Path(sys.argv[1])
rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
evals = [row["bits_per_byte"] for row in rows if row["event"] == "eval"]
print(f"bits/byte on the validation split: {evals[0]:.3f} before training, {evals[-1]:.3f} after")
assert evals[-1] <= evals[0] / 2, "it did not fall by half"
assert rows[-1]["event"] == "end", "the run did not finish"
text = (run / "generations.txt").read_text()
WORDS = ("self", "return", "    if ", "def ", "):\n", "import ", "None", " = ", "raise ")
marks = [word for word in WORDS if word in text]
print(f"marks of Python in the samples: {marks}")
assert len(marks) >= 5, "the samples do not resemble Python"
assert "python-stdlib" in Path("runs.md").read_text(), "no row in runs.md"
