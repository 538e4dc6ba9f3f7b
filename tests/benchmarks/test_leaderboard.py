"""The leaderboard: rows of equal size, schedules by the clock, runs that are kept."""

import dataclasses
import json
import math
import os
import sys

import leaderboard
import leaderboard_models as models
import leaderboard_trial as trials
import numpy as np
import pytest
import torch
from torch import nn

from wavelet_lm import UserError
from wavelet_lm.config import Config, ModelConfig
from wavelet_lm.data.dataset import TokenizedText, TokenSplit
from wavelet_lm.data.tokenizers import ByteTokenizer
from wavelet_lm.models.cost import breakdown

CPU = torch.device("cpu")
GPT = {"model": "gpt", "C": 16, "layers": 1, "heads": 2, "head_hidden": 0}
WAVELETS = {"C": 16, "layers": 1, "levels": 1, "mlp_expansion": 1, "per_scale_mixer_widths": None}
TINY = {
    "small_gpt": models.Row("a GPT", GPT, bounded=True),
    "small_wavelets": models.Row("wavelets", {**WAVELETS, **models.NO_MEMORIES}),
}
SIZE = 3_200
OWN = [name for name, row in models.ROWS.items() if not row.library]
LIBRARY = [name for name, row in models.ROWS.items() if row.library]


@pytest.fixture
def tiny(monkeypatch):
    """Two rows that train in no time."""
    monkeypatch.setattr(models, "ROWS", dict(TINY))
    monkeypatch.setattr(leaderboard, "SIZE", SIZE)
    monkeypatch.setattr(leaderboard, "BAND", 0.3)


@pytest.fixture
def command(tiny, tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen jugs. " * 60, encoding="utf-8")

    def run(*more):
        flags = ["--corpus", text, "--cache_dir", tmp_path / "cache", "--context", 16]
        flags += ["--rows", "small_gpt,small_wavelets", "--batches", 2, "--jobs", 0]
        flags += ["--valid_tokens", 64, "--test_tokens", 80, "--band", 0.3, *more]
        monkeypatch.setattr(sys, "argv", ["leaderboard.py", *map(str, flags)])
        leaderboard.main()
        return capsys.readouterr()

    return run


def data_of(n=600):
    split = TokenSplit(np.random.default_rng(0).integers(256, size=n).astype(np.uint8), n)
    return TokenizedText("noise", ByteTokenizer(), split, split, split)


def settings_of(**changes):
    values = {"dataset": "", "tokenizer": "bytes", "context": 16, "split": (0.9, 0.05, 0.05)}
    values |= {"cache_dir": "", "device": "cpu", "compile": False, "weight_decay": 0.1}
    values |= {"warmup": 0.25, "final_lr": 0.1, "valid_tokens": 64, "test_tokens": None}
    return trials.Settings(**{**values, "size": SIZE, "band": 0.3, **changes})


def trial_of(row="small_gpt", **changes):
    values = {"kind": "seconds", "amount": 10.0, "optimizer": "AdamW", "lr": 1e-3, "batch": 2}
    return trials.Trial(row=row, **{**values, "seed": 0, "final": False, **changes})


def training_of(trial, now=None, seen=None):
    settings, data = settings_of(), data_of()
    torch.manual_seed(0)
    model = models.build_row(trial.row, 256, settings.context)
    config = settings.config(optimizer=trial.optimizer, lr=trial.lr, micro_batch_size=trial.batch)
    training = trials.Training(model, config, data, settings, trial, 1000, now)
    if seen is not None:
        loss = training.loss_function
        training.loss_function = lambda x, y: seen.append((x, y)) or loss(x, y)
    return training


# --- the whole program ---------------------------------------------------------------------------


def test_it_finds_rates_trains_tests_and_goes_on_where_it_was_stopped(
    command, tmp_path, monkeypatch
):
    pytest.importorskip("matplotlib")
    file, image = tmp_path / "board.json", tmp_path / "board.png"
    flags = ("--minutes", 0.006, "--trial_minutes", 0.002, "--lrs", "1e-4,1e-2", "--seeds", "0,1")
    flags += ("--json", file)
    out = command(*flags, "--flops", 3e7, "--plot", image).out
    assert "Equal time" in out and "Equal FLOPs" in out and "± " in out
    assert image.read_bytes().startswith(b"\x89PNG")
    kept = json.loads(file.read_text())
    assert len(kept["runs"]) == 2 * 2 * (2 + 2)
    rows = [row for row in kept["rows"] if row["kind"] == "seconds"]
    assert sorted(row["row"] for row in rows) == ["small_gpt", "small_wavelets"]
    assert rows[0]["sliding"] <= rows[1]["sliding"]
    for row in rows:
        assert row["lr"] == 1e-2 and row["at_the_edge"] and row["seeds"] == [0, 1]
        assert (row["streaming"] is None) == (row["row"] == "small_gpt")
    for run in kept["runs"].values():
        assert ("test" in run) == run["final"]
        if run["final"]:
            assert len(run["curve"]) <= trials.N_POINTS
            tests = run["test"]
            assert tests["bytes"] == 79  # of 80 tokens, and the first is no target
        cost = run["curve"][-1][run["kind"]] / run["step"]
        assert abs(run[run["kind"]] - run["amount"]) < max(cost, 0.2 * run["amount"])

    started = []

    def again(trial, settings, data):
        started.append(trial)
        return next(run for run in kept["runs"].values() if run["seed"] == trial.seed)

    monkeypatch.setattr(leaderboard, "run_trial", again)
    command(*flags, "--flops", 3e7)
    assert started == []
    gone = next(key for key, run in kept["runs"].items() if run["final"] and run["seed"] == 1)
    del kept["runs"][gone]
    file.write_text(json.dumps(kept))
    command(*flags, "--flops", 3e7)
    assert [leaderboard.key_of(trial) for trial in started] == [gone]
    with pytest.raises(UserError, match=r"made with warmup 0\.05, not 0\.5"):
        command(*flags, "--warmup", 0.5)


class FakeProcess:
    """A process that has ended: what it has left in its file, and what `wait` looks at."""

    exitcode = 0

    def __init__(self, trial, settings, path):
        self.sentinel, end = os.pipe()
        os.close(end)
        data = leaderboard.prepare_data(settings.config(), log=lambda line: None)
        path.write_text(json.dumps(leaderboard.attempt(trial, settings, data)))

    def join(self):
        os.close(self.sentinel)


def test_runs_side_by_side_are_all_kept(command, tmp_path, monkeypatch):
    file = tmp_path / "board.json"
    monkeypatch.setattr(leaderboard, "start_process", FakeProcess)
    flags = ("--lrs", "1e-3", "--seeds", "0,1", "--jobs", 2, "--json", file)
    command(*flags, "--minutes", 0.001)
    kept = json.loads(file.read_text())["runs"]
    runs = sorted((run["row"], run["seed"]) for run in kept.values())
    assert runs == [(row, seed) for row in TINY for seed in (0, 1)]


@pytest.mark.slow
def test_processes_run_rows_of_the_table(tmp_path, monkeypatch, capsys):
    text = tmp_path / "text.txt"
    text.write_text("pack my box with five dozen jugs. " * 200, encoding="utf-8")
    file = tmp_path / "board.json"
    flags = f"--corpus {text} --cache_dir {tmp_path / 'cache'} --context 16 --rows gpt --lrs 1e-3"
    flags += f" --minutes 0.01 --seeds 0,1 --jobs 2 --valid_tokens 64 --json {file}"
    monkeypatch.setattr(sys, "argv", ["leaderboard.py", *flags.split()])
    leaderboard.main()
    runs = json.loads(file.read_text())["runs"].values()
    assert sorted(run["seed"] for run in runs) == [0, 1]


def test_rows_are_asked_to_recall(command, tmp_path, monkeypatch):
    monkeypatch.setattr(trials, "RECALL_EXAMPLES", 16)
    file = tmp_path / "board.json"
    flags = ("--minutes", 0.001, "--seeds", 0, "--lrs", "1e-3", "--recall_steps", 2)
    out = command(*flags, "--json", file).out
    row = json.loads(file.read_text())["rows"][0]
    assert 0 <= row["recall"] < 0.2 and f"{row['recall']:.1%}" in out


def test_the_summary_is_of_all_runs_whatever_command_ran_them(command, tmp_path, monkeypatch):
    file = tmp_path / "board.json"
    flags = ("--minutes", 0.001, "--lrs", "1e-3", "--json", file)
    for row, seeds in (("small_gpt", "0"), ("small_wavelets", "1"), ("small_gpt", "1")):
        out = command(*flags, "--rows", row, "--seeds", seeds).out
        assert [name for name in TINY if name in out] == [row]
    kept = json.loads(file.read_text())
    rows = {row["row"]: row for row in kept["rows"]}
    assert {name: row["seeds"] for name, row in rows.items()} == {
        "small_gpt": [0, 1],
        "small_wavelets": [1],
    }
    for name, row in rows.items():
        scores = [r["test"]["sliding"] for r in kept["runs"].values() if r["row"] == name]
        assert row["sliding"] == pytest.approx(sum(scores) / len(scores))
        assert not row["at_the_edge"]
    changed = dataclasses.replace(TINY["small_gpt"], keys={**GPT, "layers": 2})
    monkeypatch.setitem(models.ROWS, "small_gpt", changed)
    assert [row["row"] for row in leaderboard.summary(kept["runs"])] == ["small_wavelets"]
    monkeypatch.delitem(models.ROWS, "small_gpt")
    assert [row["row"] for row in leaderboard.summary(kept["runs"])] == ["small_wavelets"]


def test_a_row_is_its_setting_with_the_best_whole_run(tiny):
    """Of two settings that were trained for the whole time; edges are of what was tried."""
    runs, test = {}, {"sliding": 2.0, "streaming": None}
    figures = dict.fromkeys(("n_params", "body_params", "step", "tokens", "flops"), 1)
    figures |= dict.fromkeys(("seconds", "tokens_per_second", "matrix_rate"), 1.0)
    figures |= {"training_bytes": None, "decode_milliseconds": 1.0, "needles": None, "test": test}
    for seed, lr, final, loss in (
        (1, 1e-3, True, 1.1),  # the first seed decides, and it comes later
        (0, 1e-3, True, 1.5),
        (0, 1e-2, True, 1.4),
        (1, 1e-2, True, None),
        (0, 1e-1, False, 1.0),
    ):
        trial = trial_of(lr=lr, final=final, seed=seed)
        record = {"diverged": "nan"} if loss is None else {"valid_bits_per_byte": loss, **figures}
        runs[leaderboard.key_of(trial)] = trial.about() | record
    (row,) = leaderboard.summary(runs)
    assert (row["lr"], row["seeds"], row["diverged"]) == (1e-2, [0], 1)
    assert row["valid_bits_per_byte"] == 1.4 and not row["at_the_edge"]
    del runs[leaderboard.key_of(trial_of(lr=1e-1))]
    assert leaderboard.summary(runs)[0]["at_the_edge"]


def test_two_programs_add_to_one_file(tmp_path):
    file = str(tmp_path / "board.json")
    first, second = (leaderboard.Store(file, {"a": 1}, lambda store: []) for _ in range(2))
    first.add("one", {"x": 1})
    second.add("two", {"x": 2})
    first.reload()
    assert first.runs == second.runs == {"one": {"x": 1}, "two": {"x": 2}}
    with pytest.raises(UserError, match="made with a 1, not 2"):
        leaderboard.Store(file, {"a": 2}, lambda store: [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ((), "for how long"),
        (("--trial_minutes", 1), "a sweep serves a table"),
        (("--minutes", 1, "--rows", "gtp"), "there is no row 'gtp'"),
        (("--minutes", 1, "--rows", "small_gpt+leyers=2"), "unknown key 'leyers'"),
        (("--minutes", 1, "--rows", "small_gpt+lr=2"), "lr is no key of the network"),
        (
            ("--minutes", 1, "--rows", "small_gpt+layers=3"),
            "has .* parameters beside its embedding",
        ),
        (("--minutes", 1, "--lrs", "1e-3,fast"), "'fast' is not a number above 0"),
        (("--minutes", 1, "--optimizers", "SGD"), "'SGD' is none of Adagrad"),
        (("--minutes", 1, "--json", "nowhere/board.json"), "there is no folder nowhere"),
        (("--minutes", 1, "--split", "0.9,0.1,0"), "has no test split"),
    ],
)
def test_bad_input_is_refused_before_training(command, flags, message):
    with pytest.raises(UserError, match=message):
        command(*flags)


# --- the plan ------------------------------------------------------------------------------------


def test_rows_take_turns_and_the_best_setting_is_trained():
    budget = leaderboard.Budget("seconds", 60, 10)
    plan = leaderboard.Plan(
        ("gpt", "linear"), (budget,), ("AdamW", "Muon"), (1e-3, 1e-2), (8,), (3, 4)
    )
    jobs = plan.jobs({})
    assert [t.row for t in jobs] == ["gpt", "linear"] * 4
    assert {(t.amount, t.seed, t.final) for t in jobs} == {(10, 3, False)}
    runs = {leaderboard.key_of(t): {"valid_bits_per_byte": 2.0} for t in jobs}
    best = next(t for t in jobs if (t.row, t.optimizer, t.lr) == ("gpt", "Muon", 1e-3))
    runs[leaderboard.key_of(best)]["valid_bits_per_byte"] = 1.0
    other = next(t for t in jobs if (t.row, t.optimizer, t.lr) == ("linear", "AdamW", 1e-3))
    runs[leaderboard.key_of(other)] = {"diverged": "the loss is nan"}
    whole = plan.jobs(runs)
    assert [(t.row, t.seed) for t in whole] == [
        ("gpt", 3),
        ("linear", 3),
        ("gpt", 4),
        ("linear", 4),
    ]
    assert (whole[0].optimizer, whole[0].lr, whole[0].amount) == ("Muon", 1e-3, 60)
    assert whole[1].lr != 1e-3 or whole[1].optimizer != "AdamW"
    assert all(t.final for t in whole)
    del runs[leaderboard.key_of(other)]  # without all of its trials a row has no whole run
    assert [t.row for t in plan.jobs(runs)] == ["linear", "gpt", "gpt"]


def test_whole_runs_decide_between_finalists():
    """Of three rates the trials drop the worst; whole runs of one seed turn the others round."""
    budget = leaderboard.Budget("seconds", 60, 10)
    plan = leaderboard.Plan(
        ("gpt",), (budget,), ("AdamW",), (1e-4, 1e-3, 1e-2), (8,), (3, 4), finalists=2
    )
    assert plan.n_runs() == 3 + 2 + 1
    runs = {}
    for trial in plan.jobs({}):
        runs[leaderboard.key_of(trial)] = {"valid_bits_per_byte": 3.0 - math.log10(trial.lr)}
    whole = plan.jobs(runs)
    assert [(t.lr, t.seed, t.final) for t in whole] == [(1e-2, 3, True), (1e-3, 3, True)]
    first, second = map(leaderboard.key_of, whole)
    runs[first] = {"valid_bits_per_byte": 2.0}
    assert plan.jobs(runs) == whole[1:]  # the other seed waits for the decision
    assert [t.lr for t in plan.counted("gpt", budget, runs)] == [1e-2, 1e-2]
    runs[second] = {"valid_bits_per_byte": 1.9}
    assert [(t.lr, t.seed) for t in plan.jobs(runs)] == [(1e-3, 4)]
    assert [(t.lr, t.seed) for t in plan.counted("gpt", budget, runs)] == [(1e-3, 3), (1e-3, 4)]
    runs[second] = {"diverged": "the validation loss is nan"}
    assert [(t.lr, t.seed) for t in plan.jobs(runs)] == [(1e-2, 4)]


def test_a_table_says_which_rows_wait_for_finalists(command, tmp_path):
    file = tmp_path / "board.json"
    flags = ("--minutes", 0.003, "--trial_minutes", 0.001, "--lrs", "1e-4,1e-2", "--seeds", 0)
    flags += ("--json", file)
    command(*flags)
    kept = json.loads(file.read_text())["runs"]
    out = command(*flags, "--finalists", 2).out
    both = json.loads(file.read_text())
    assert len(both["runs"]) == len(kept) + 2 and "†" not in out
    for row in both["rows"]:
        ends = {
            run["lr"]: run["valid_bits_per_byte"]
            for run in both["runs"].values()
            if run["row"] == row["row"] and run["final"]
        }
        assert len(ends) == 2 and row["lr"] == min(ends, key=ends.get)
    plan = leaderboard.Plan(
        tuple(TINY), (leaderboard.Budget("seconds", 0.18, 0.06),), ("AdamW",), (1e-4, 1e-2), (2,),
        (0,), finalists=2,
    )  # fmt: skip
    text = leaderboard.report(plan, kept)
    assert text.count("†") == 3 and "† whole runs of its other finalists are missing" in text


def test_a_row_that_has_changed_has_other_runs(monkeypatch):
    before = leaderboard.key_of(trial_of("gpt"))
    assert leaderboard.key_of(trial_of("gpt")) == before
    changed = models.Row("gpt", {**models.ROWS["gpt"].keys, "layers": 5}, bounded=True)
    monkeypatch.setitem(models.ROWS, "gpt", changed)
    assert leaderboard.key_of(trial_of("gpt")) != before


# --- training ------------------------------------------------------------------------------------


def test_the_rate_follows_the_time_that_is_spent(tiny):
    """Steps of 1 second, then of 3, on a clock of our own: 10 seconds are fewer steps than 10."""
    ticks = iter(np.cumsum([0, 1, 0, 1, 0, 1, 0, 1] + [0, 3] * 50).tolist())
    training = training_of(trial_of(amount=10.0, lr=1.0), now=lambda: next(ticks))
    training._backward = lambda step: None
    training.validate = lambda: 1.0
    curve = training.run(3)
    assert training.step == 6 and training.clock.seconds == 10.0
    # A step's rate is that of where it ends, as the steps before it were long on average.
    ends = [0.01, 2, 3, 4, 4 + 4 / 4, 7 + 7 / 5]
    assert training.lrs == pytest.approx([expected_rate(end / 10) for end in ends])
    assert [point["seconds"] for point in curve] == [1.0, 2.0, 10.0]


def expected_rate(progress, warmup=0.25, final=0.1):
    if progress < warmup:
        return progress / warmup
    return final + (1 - final) * math.cos(math.pi / 2 * (progress - warmup) / (1 - warmup)) ** 2


def test_a_budget_of_flops_is_spent_whatever_the_clock_says(tiny):
    training = training_of(trial_of(kind="flops", amount=10 * 1000 * 2 * 16, lr=1.0))
    training.run(2)
    assert training.step == 10
    assert training.lrs[-1] == pytest.approx(0.1)


def test_all_rows_read_the_same_windows(tiny):
    seen = []
    for row in TINY:
        windows = []
        training = training_of(trial_of(row, kind="flops", amount=4 * 32_000), seen=windows)
        training.warm_up()
        training.run(2)
        seen.append((windows, training.validation))
    (first, valid), (second, valid_too) = seen
    assert len(first) == len(second) == 4 + trials.WARM_UP_STEPS
    for one, other in zip(first + valid, second + valid_too, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(first[-1][0], first[-2][0])


def test_warming_up_changes_nothing(tiny):
    training = training_of(trial_of())
    before = {name: p.clone() for name, p in training.model.named_parameters()}
    state = torch.get_rng_state()
    training.warm_up()
    assert torch.equal(torch.get_rng_state(), state) and training.clock.seconds == 0
    assert all(torch.equal(p, before[name]) for name, p in training.model.named_parameters())
    assert all(p.grad is None for p in training.model.parameters())


def test_a_run_that_diverges_says_so(tiny, monkeypatch):
    monkeypatch.setattr(trials.Training, "validate", lambda self: math.nan)
    record = trials.run_trial(trial_of(kind="flops", amount=1e7), settings_of(), data_of())
    assert "nan" in record["diverged"] and "valid_bits_per_byte" not in record


def test_flops_are_those_of_the_products():
    """Of a linear head: forward, and two of its size backward."""
    C, V, T = 8, 32, 5

    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(V, C), nn.Linear(C, V)

        def loss(self, idx, targets):
            logits = self.head(self.embedding(idx))
            return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten()), None

    assert trials.flops_per_token(Head(), T) == 3 * 2 * C * V


@pytest.mark.parametrize("name", ["gpt", "wavelet_gpt:haar", "linear"])
def test_flops_are_those_of_the_breakdown(name):
    """Which counts by the names of the weights. Transforms without weights count only here."""
    values = {**models.COMMON, **models.ROWS[name].keys, "block_size": 24}
    expected = breakdown(Config.from_dict(values), 64).total.flops
    assert trials.flops_per_token(models.build_row(name, 64, 24), 24) == expected


def test_the_recipes_preset_is_its_row():
    """All that the model reads but the mean of a window before, which neither has."""
    row = Config.from_dict({**models.COMMON, **models.ROWS["efficient"].keys, "block_size": 256})
    preset = Config.from_json("configs/efficient_cpu.json")
    names = [field.name for field in dataclasses.fields(ModelConfig)]
    differ = {name for name in names if getattr(row, name) != getattr(preset, name)}
    assert differ <= {"decompose_bypass_cross_window"}


def test_flops_of_a_delta_memory_are_counted():
    """As the breakdown has them; PyTorch's own counter does not know the operators."""
    keys = {**models.COMMON, **models.ROWS["efficient"].keys, "block_size": 24}
    config = Config.from_dict(keys)
    expected = breakdown(config, 64).total.flops
    assert trials.flops_per_token(models.build_row("efficient", 64, 24), 24) == expected


def test_a_text_read_as_one_stream_is_scored_once(tiny):
    """In chunks of any size what one forward pass says."""
    model = models.build_row("small_wavelets+decompose_bypass=false", 256, 16).eval()
    tokens = np.random.default_rng(1).integers(256, size=41)
    idx = torch.from_numpy(tokens)[None]
    expected = float(model.token_losses(idx[:, :-1], idx[:, 1:]).double().sum())
    for chunk in (7, 8, 40, 100):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(trials, "STREAM_CHUNK", chunk)
            assert trials.stream_nats(model, tokens) == pytest.approx(expected, rel=1e-5)


def test_needles_are_the_same_for_all_rows_and_far_only_for_those_that_read_as_far(
    tiny, monkeypatch
):
    text = b" ".join(b"It was the %dth day of a long voyage, and cold." % i for i in range(60))
    split = TokenSplit(np.frombuffer(text, np.uint8), len(text))
    data = TokenizedText("days", ByteTokenizer(), split, split, split)
    settings, asked = settings_of(context=256), []
    real = trials.evaluate
    monkeypatch.setattr(
        trials,
        "evaluate",
        lambda *a, **k: asked.append(a[2][:4]) or real(a[0], a[1], a[2][:4], **k),
    )
    rows = [trials.needles(models.build_row(name, 256, 256), data, settings) for name in TINY]
    assert [[row["distance"] for row in found] for found in rows] == [[64], [64, 1024]]
    assert asked[0] == asked[1] and len(asked[0]) == 4
    assert trials.needles(models.build_row("small_gpt", 256, 16), data, settings_of()) is None


# --- the rows ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("context", [256, 1024])
def test_rows_are_of_equal_size(name, context):
    with torch.device("meta"):
        model = models.build_row(name, 256, context)
    models.check_size(name, model, models.SIZE, models.BAND)
    assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize("name", LIBRARY)
def test_rows_of_a_library_compute_what_they_should(name):
    """Losses of the logits, the same in chunks, equal sizes, names that the optimizer knows."""
    pytest.importorskip("transformers")
    model = models.build_row(name, 64, 48).eval()
    models.check_size(name, model, models.SIZE, models.BAND)
    assert [n for n, _ in model.named_parameters() if n.startswith(models.TABLES)] == [
        "embedding.weight"
    ]
    idx = torch.randint(64, (2, 40))
    with torch.inference_mode():
        logits, _ = model(idx)
        state, parts = None, []
        for chunk in idx.split((5, 1, 20, 1, 13), dim=1):
            part, state = model(chunk, state)
            parts.append(part)
    assert torch.allclose(torch.cat(parts, 1), logits, atol=1e-4)
    expected = nn.functional.cross_entropy(logits.flatten(0, 1), idx.flatten(), reduction="none")
    assert torch.allclose(model.token_losses(idx, idx).flatten(), expected, atol=1e-4)
    loss, _ = model.loss(idx, idx)
    assert loss.item() == pytest.approx(expected.mean().item(), rel=1e-4)
    at = torch.tensor([[3, 9], [0, 39]])
    some, _ = model.loss(idx, idx.gather(1, at), None, at)
    picked = expected.view_as(idx).gather(1, at).mean()
    assert some.item() == pytest.approx(picked.item(), rel=1e-4)
    changed = torch.cat((idx[:, :30], (idx[:, 30:] + 1) % 64), 1)
    with torch.inference_mode():
        assert torch.allclose(model(changed)[0][:, :30], logits[:, :30], atol=1e-5)


def test_a_missing_library_is_named_with_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match=r'install it with .*"\.\[bench\]"'):
        models.build_row("transformer", 64, 16)


def test_keys_of_a_row_can_be_changed():
    assert models.find_row("linear+levels=3+mlp_expansion=2").keys["levels"] == 3
    assert models.find_row("transformer+num_hidden_layers=3").keys["num_hidden_layers"] == 3
    with pytest.raises(UserError, match="did you mean head_dim"):
        models.find_row("transformer+head_dimm=3")
    with pytest.raises(UserError, match="RWKV-4 alone"):
        models.find_row("rwkv7")
