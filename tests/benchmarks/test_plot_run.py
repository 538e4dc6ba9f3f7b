"""The plot of a run, from the lines that training wrote."""

import json

import plot_run
import pytest

from wavelet_lm.errors import UserError


def test_the_moving_median_is_that_of_the_neighbours():
    assert plot_run.moving_median([9.0, 1.0, 5.0, 7.0], 3) == [5.0, 5.0, 5.0, 6.0]
    assert plot_run.moving_median([2.0], 15) == [2.0]


def lines(n, torn=""):
    rows = [{"event": "eval", "step": 0, "val_loss": 5.5, "bits_per_byte": 8.0}]
    for step in range(1, n):
        rows.append({"event": "train", "step": step, "loss": 5 / step, "lr": 0.1})
        rows[-1] |= {"tokens_per_second": 100.0, "seconds": step}
    rows.append({"event": "eval", "step": n, "val_loss": 1.0})  # of what has no bytes
    return "".join(json.dumps(row) + "\n" for row in rows) + torn


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_runs_are_drawn_side_by_side_also_while_they_train(tmp_path, monkeypatch, capsys, ending):
    for name, n in (("one", 3), ("other", 20)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text(lines(n, torn='{"event": "tr'))
    target = tmp_path / f"both{ending}"
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    arguments = ["plot_run.py", one, "--beside", other, "--plot", str(target)]
    monkeypatch.setattr("sys.argv", arguments)
    plot_run.main()
    assert target.stat().st_size > 1000
    assert capsys.readouterr().out.strip() == str(target)


def test_a_folder_without_metrics_is_named(tmp_path):
    with pytest.raises(UserError, match=r"no metrics\.jsonl with a training step"):
        plot_run.metrics(str(tmp_path))


def test_the_run_of_a_classifier_is_named(tmp_path):
    rows = (
        '{"event": "train", "step": 1, "loss": 2.0}\n{"event": "eval", "step": 1, "score": 0.5}\n'
    )
    (tmp_path / "metrics.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(UserError, match="is the run of a classifier"):
        plot_run.metrics(str(tmp_path))
