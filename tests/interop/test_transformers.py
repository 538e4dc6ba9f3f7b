"""The project's models in transformers' own hands: loading, generation, training, adapters."""

import copy
import os
import subprocess
import sys

import pytest
import torch

os.environ.setdefault("HF_HUB_OFFLINE", "1")
transformers = pytest.importorskip("transformers")

from hypothesis import HealthCheck, given, settings  # noqa: E402

from tests.cli.commands import typed  # noqa: E402
from tests.conftest import ROOT, perturb, tiny_config  # noqa: E402
from tests.models.test_properties import V, configs  # noqa: E402
from tests.training.runs import some_text  # noqa: E402
from wavelet_lm import UserError, build_model, load_model, load_tokenizer  # noqa: E402
from wavelet_lm.data.tokenizers import ByteTokenizer, CharTokenizer  # noqa: E402
from wavelet_lm.inference.engine import Engine  # noqa: E402
from wavelet_lm.interop.transformers import (  # noqa: E402
    WaveletLMConfig,
    WaveletLMForCausalLM,
)
from wavelet_lm.interop.transformers_folder import export_hf, run_of_folder  # noqa: E402
from wavelet_lm.models.checkpoint import save_checkpoint  # noqa: E402

transformers.utils.logging.disable_progress_bar()
PARTS = {  # every matrix that is not read by its own module alone, and each kind of model
    "headline": {},
    "delta": {"delta_memory": True, "delta_heads": 2, "delta_key_dim": 4, "delta_value_dim": 4},
    "tied": {"tie_embedding_to_lm_head": True, "shared_lifting_weights": True},
    "cells": {"multinodal_enabled": True, "multinodal_num_cells": 2, "multinodal_cell_dim": 16},
    "gpt": {"model": "gpt"},
    "wavelet_gpt": {"model": "wavelet_gpt"},
}


def model_of(vocab_size=256, **overrides):
    torch.manual_seed(0)
    model = build_model(tiny_config(**{"block_size": 64, **overrides}), vocab_size)
    return perturb(model).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run, `run`, and the folder of transformers that the command makes of it, `hf`."""
    path = tmp_path_factory.mktemp("folder")
    model = model_of(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    ByteTokenizer().save(path / "run" / "tokenizer")
    save_checkpoint(path / "run" / "best.safetensors", model, {})
    export_hf(model, ByteTokenizer(), path / "hf")
    return path


@pytest.fixture(scope="module")
def loaded(folder):
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    return auto, transformers.AutoTokenizer.from_pretrained(folder / "hf")


def logits_of(model, idx):
    with torch.no_grad():
        return model(idx).logits


IDX = torch.randint(256, (3, 30), generator=torch.Generator().manual_seed(1))


# --- loading and saving ---------------------------------------------------------------------------


@settings(max_examples=8, suppress_health_check=list(HealthCheck), derandomize=True)
@given(config=configs())
def test_any_model_is_loaded_bit_for_bit(config, tmp_path_factory):
    """Through the meta device, where what no file holds has to be computed again."""
    path = tmp_path_factory.mktemp("any")
    network = perturb(build_model(config, V)).eval()
    described = WaveletLMConfig(network=config.to_dict(), vocab_size=V)
    WaveletLMForCausalLM.around(network, described).save_pretrained(path)
    auto = transformers.AutoModelForCausalLM.from_pretrained(path)
    assert not auto.training
    back = {**dict(auto.network.named_parameters()), **dict(auto.network.named_buffers())}
    for name, values in [*network.named_parameters(), *network.named_buffers()]:
        assert torch.equal(values, back.pop(name)), name
    assert not back
    idx = IDX[:, :20] % V  # a product may round otherwise where its matrix lies elsewhere
    torch.testing.assert_close(logits_of(auto, idx), network(idx)[0], atol=1e-6, rtol=1e-5)


def test_a_process_that_knows_nothing_loads_the_folder(folder, tmp_path):
    program = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
model = AutoModelForCausalLM.from_pretrained({str(folder / "hf")!r}, trust_remote_code=True)
model.save_pretrained({str(tmp_path / "again")!r})
again = AutoModelForCausalLM.from_pretrained({str(tmp_path / "again")!r}, trust_remote_code=True)
idx = torch.arange(20)[None]
assert torch.equal(model(idx).logits, again(idx).logits)
tokenizer = AutoTokenizer.from_pretrained({str(folder / "hf")!r})
write = pipeline("text-generation", model=model, tokenizer=tokenizer, batch_size=2)
written = write(["a b", "def main"], max_new_tokens=4, do_sample=False)
print([row[0]["generated_text"] for row in written])
"""
    places = {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env = {**os.environ, **places, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", program], env=env, capture_output=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    engine = Engine(load_model(folder / "run"), ByteTokenizer(), context="stream")
    expected = [
        p + engine.generate(p, num_tokens=4, temperature=0, repetition_penalty=1.2)
        for p in ("a b", "def main")
    ]
    assert done.stdout.splitlines()[-1] == repr(expected)


def test_nothing_is_said_of_libraries_that_are_not_used(checkout):
    pytest.importorskip("torchao")  # which transformers loads with any model
    program = "from wavelet_lm.cli.main import main; main()"
    command = [sys.executable, "-c", program, "export", "hf", "logs/RUN", "--out", "hf-RUN"]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stdout) == (0, "hf-RUN\n"), done.stderr
    assert "torchao" not in done.stderr and "Enum" not in done.stderr


def test_where_data_lay_is_not_exported(tmp_path):
    model = model_of(dataset=str(tmp_path / "letters.txt"))
    export_hf(model, ByteTokenizer(), tmp_path / "hf")
    written = [file for file in (tmp_path / "hf").rglob("*") if file.is_file()]
    assert [file for file in written if str(tmp_path).encode() in file.read_bytes()] == []
    assert "letters.txt, windows of" in (tmp_path / "hf" / "README.md").read_text()


def test_the_command_makes_it_and_convert_brings_it_back(checkout):
    assert typed("export", "hf", "logs/RUN", "--out", "hf-RUN") == "hf-RUN\n"
    card = (checkout / "hf-RUN" / "README.md").read_text()
    assert "library_name: transformers" in card and 'from_pretrained("hf-RUN"' in card
    typed("convert", "hf-RUN", "--out", "logs/BACK")
    there, back = load_model("logs/RUN"), load_model("logs/BACK")
    idx = IDX[:, :9]
    assert torch.equal(there(idx)[0], back(idx)[0])
    assert load_tokenizer("logs/BACK").name == "bytes"


def test_what_cannot_be_written_or_read_is_one_line(folder, tmp_path):
    model = model_of()
    with pytest.raises(UserError, match="already there"):
        export_hf(model, ByteTokenizer(), folder / "hf")
    with torch.no_grad():
        next(model.parameters())[0] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        export_hf(model, ByteTokenizer(), tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    cut = tmp_path / "cut"
    cut.mkdir()
    (cut / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        run_of_folder(cut, tmp_path / "run")
    (cut / "model.safetensors").write_bytes(
        (folder / "hf" / "model.safetensors").read_bytes()[:-100]
    )
    with pytest.raises(UserError, match="truncated"):
        run_of_folder(cut, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_missing_weights_are_not_made_up(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    (tmp_path / "config.json").write_bytes((folder / "hf" / "config.json").read_bytes())
    tensors = load_file(folder / "hf" / "model.safetensors")
    tensors.pop("network.blocks.1.norm1.weight")
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match=r"blocks\.1\.norm1\.weight"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


def test_other_types_and_devices(folder):
    load = transformers.AutoModelForCausalLM.from_pretrained
    half = load(folder / "hf", dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    full = load(folder / "hf", device_map="auto")
    exact = logits_of(full, IDX)
    error = (logits_of(half, IDX).float() - exact).norm() / exact.norm()
    assert error < 0.05
    text = half.generate(IDX, max_new_tokens=4, do_sample=False)
    assert text.shape == (3, 34)


# --- generation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("part", PARTS)
def test_greedy_is_the_text_of_the_project(part, tmp_path):
    model, tokenizer = model_of(**PARTS[part]), ByteTokenizer()
    export_hf(model, tokenizer, tmp_path / "hf")
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    fast = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
    engine = Engine(model, tokenizer, context="stream")
    prompts = ["a", "def main(", "né\n\n"]
    expected = engine.generate_batch(prompts, num_tokens=40, temperature=0, repetition_penalty=1.1)
    batch = fast(prompts, return_tensors="pt", padding=True)
    length = batch["input_ids"].shape[1]
    written = auto.generate(**batch, max_new_tokens=40, do_sample=False)
    assert [tokenizer.decode(row[length:].tolist()) for row in written] == expected


def test_the_runs_own_options_are_the_defaults(loaded):
    options = loaded[0].generation_config
    assert (options.do_sample, options.temperature, options.top_p) == (True, 0.8, 0.9)
    assert (options.repetition_penalty, options.max_new_tokens) == (1.2, 512)


def test_sampling_draws_from_the_distribution_of_the_project(loaded, folder):
    """10,000 draws of the first token, and the probabilities that the project gives it."""
    from wavelet_lm.inference.sampling.logits import SamplingOptions, probabilities

    auto, model = loaded[0], load_model(folder / "run")
    idx = IDX[:1]
    torch.manual_seed(0)
    drawn = auto.generate(idx, max_new_tokens=1, do_sample=True, num_return_sequences=10_000)[:, -1]
    seen = torch.zeros(1, 256, dtype=torch.bool).index_fill(1, idx[0], True)
    options = SamplingOptions(temperature=0.8, top_p=0.9, repetition_penalty=1.2)
    p = probabilities(model(idx)[0][:, -1], seen, options)[0]
    counts = torch.bincount(drawn, minlength=256)
    assert not counts[p == 0].any()
    assert ((counts - 10_000 * p).abs() <= 5 * (10_000 * p * (1 - p)).sqrt() + 1).all()


def test_beams_are_those_of_a_search_without_state(loaded):
    auto = loaded[0]
    options = {"max_new_tokens": 12, "do_sample": False, "num_beams": 4, "num_return_sequences": 2}
    states = auto.generate(IDX[:2], **options, use_cache=True)
    assert torch.equal(states, auto.generate(IDX[:2], **options, use_cache=False))


def test_padding_changes_nothing(loaded):
    """Rows of a batch, padded on the left, right or both sides, are what they are alone."""
    auto = loaded[0]
    lengths, T = [5, 12, 5, 9], 12
    for left in (0, 1):
        idx = torch.full((4, T), 256)
        mask = torch.zeros(4, T, dtype=torch.int64)
        spans = [(T - n, T) if left else (0, n) for n in lengths]
        for row, (begin, end) in enumerate(spans):
            idx[row, begin:end], mask[row, begin:end] = IDX[row % 3, : end - begin], 1
        out = auto(idx, attention_mask=mask, use_cache=True)
        after = auto(IDX[:1, :1].expand(4, 1), past_key_values=out.past_key_values)
        for row, (begin, end) in enumerate(spans):
            alone = auto(IDX[row % 3 : row % 3 + 1, : end - begin], use_cache=True)
            torch.testing.assert_close(out.logits[row, begin:end], alone.logits[0])
            then = auto(IDX[:1, :1], past_key_values=alone.past_key_values)
            torch.testing.assert_close(after.logits[row], then.logits[0])


def test_a_cache_goes_on_and_is_forked(loaded):
    auto = loaded[0]
    whole = logits_of(auto, IDX)
    cache = auto(IDX[:, :10], use_cache=True).past_key_values
    fork = copy.deepcopy(cache)
    for part in (IDX[:, 10:11], IDX[:, 11:20], IDX[:, 20:]):
        out = auto(part, past_key_values=cache)
    torch.testing.assert_close(out.logits, whole[:, 20:], atol=1e-5, rtol=1e-4)
    assert (cache.get_seq_length(), fork.get_seq_length()) == (30, 10)
    text = auto.generate(IDX, max_new_tokens=3, do_sample=False)
    on = auto.generate(IDX, past_key_values=fork, max_new_tokens=3, do_sample=False)
    assert torch.equal(text, on)


def test_what_a_state_cannot_do_is_refused(loaded, tmp_path):
    auto = loaded[0]
    batch = {"input_ids": IDX[:2], "attention_mask": torch.ones(2, 30, dtype=torch.int64)}
    batch["attention_mask"][0, -3:] = 0
    with pytest.raises(ValueError, match="padding_side"):
        auto.generate(**batch, max_new_tokens=2)
    for empty in ({"input_ids": IDX[:1, :0]}, {**batch, "attention_mask": 0 * IDX[:2]}):
        with pytest.raises(ValueError, match="a prompt has no tokens"):
            auto.generate(**empty, max_new_tokens=2)
    batch["attention_mask"][0, -1] = 1
    with pytest.raises(ValueError, match="gap"):
        auto(**batch)
    with pytest.raises(ValueError, match="stateful"):
        auto.generate(IDX[:1], assistant_model=auto, max_new_tokens=2)
    with pytest.raises(ValueError, match="inputs_embeds"):
        auto(inputs_embeds=torch.zeros(1, 2, 16))
    gpt = model_of(model="gpt")
    export_hf(gpt, ByteTokenizer(), tmp_path / "gpt")
    short = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "gpt")
    with pytest.raises(UserError, match="too long for this GPT"):
        short.generate(IDX[:1], max_new_tokens=64)


def test_fast_weights_learn_from_what_is_written_alone(tmp_path):
    model = model_of(fwpkm_inference_updates=True, fwpkm_chunk_size=8, fwpkm_update_lr=50.0)
    export_hf(model, ByteTokenizer(), tmp_path / "hf")
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    engine = Engine(model, ByteTokenizer(), context="stream")
    expected = engine.generate("a text", num_tokens=40, temperature=0, repetition_penalty=1.0)
    resting = Engine(model, ByteTokenizer(), context="stream", fwpkm_inference_updates=False)
    options = {"num_tokens": 40, "temperature": 0, "repetition_penalty": 1.0}
    assert expected != resting.generate("a text", **options)
    idx = torch.tensor([list(b"a text")])
    written = auto.generate(idx, max_new_tokens=40, do_sample=False, repetition_penalty=1.0)
    assert ByteTokenizer().decode(written[0, 6:].tolist()) == expected


# --- training -------------------------------------------------------------------------------------


class Windows(torch.utils.data.Dataset):
    def __init__(self, text, tokenizer):
        self.tokens = torch.tensor(tokenizer.encode(text))

    def __len__(self):
        return len(self.tokens) // 32

    def __getitem__(self, i):
        window = self.tokens[32 * i : 32 * i + 32]
        return {"input_ids": window, "labels": window}


def trained(model, folder, tokenizer, processing_class=None, **options):
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        max_steps=40,
        learning_rate=3e-3,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        **options,
    )
    data = Windows(some_text(2000), tokenizer)
    trainer = transformers.Trainer(
        model,
        arguments,
        train_dataset=data,
        eval_dataset=data,
        processing_class=processing_class,
    )
    trainer.train()
    return trainer


def test_trainer_lowers_the_loss_and_its_checkpoint_comes_back(tmp_path):
    tokenizer = CharTokenizer.of([some_text(2000)])
    torch.manual_seed(0)
    model = build_model(tiny_config(block_size=32, fwpkm_enabled=False), tokenizer.vocab_size)
    export_hf(model, tokenizer, tmp_path / "hf")
    auto = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    trainer = trained(auto, tmp_path / "out", tokenizer, gradient_checkpointing=True)
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
    saved = tmp_path / "out" / "checkpoint-40"
    # as with `processing_class`: a tokenizer of transformers, which is none of ours
    (saved / "tokenizer.json").write_text("{}", encoding="utf-8")
    with pytest.raises(UserError, match="--tokenizer"):
        run_of_folder(saved, tmp_path / "RUN")
    run_of_folder(saved, tmp_path / "RUN", str(tmp_path / "hf"))
    back = load_model(tmp_path / "RUN")
    idx = torch.tensor([load_tokenizer(tmp_path / "RUN").encode("a quick brown fox")])
    auto.eval()
    assert torch.equal(back(idx)[0], logits_of(auto, idx))
    loss = auto(idx, labels=idx).loss
    torch.testing.assert_close(loss, back.loss(idx[:, :-1], idx[:, 1:])[0])


def test_the_tokens_for_padding_and_ends_need_no_word(folder, tmp_path, caplog, monkeypatch):
    """Padding past the vocabulary is meant: neither loading nor Trainer warns of it."""
    monkeypatch.setattr(transformers.logging.get_logger("transformers"), "propagate", True)
    transformers.utils.logging.warning_once.cache_clear()
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "hf")
    assert auto.config.pad_token_id == tokenizer.pad_token_id == 256
    trained(auto, tmp_path, ByteTokenizer(), processing_class=tokenizer)
    assert "oken" not in caplog.text


def test_the_loss_in_training_judges_every_pass():
    config = tiny_config(loop_iterations=2, fwpkm_enabled=False)
    torch.manual_seed(0)
    network = perturb(build_model(config, 256))
    described = WaveletLMConfig(network=config.to_dict(), vocab_size=256)
    auto = WaveletLMForCausalLM.around(network, described).train()
    for module in auto.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    loss = auto(IDX, labels=IDX).loss
    torch.testing.assert_close(loss, network.loss(IDX[:, :-1], IDX[:, 1:])[0])


@pytest.mark.parametrize("part", PARTS)
def test_adapters_act_and_are_merged(part):
    peft = pytest.importorskip("peft")
    config = tiny_config(block_size=64, **PARTS[part])
    torch.manual_seed(0)
    network = perturb(build_model(config, 256)).eval()
    described = WaveletLMConfig(network=config.to_dict(), vocab_size=256)
    auto = WaveletLMForCausalLM.around(network, described)
    before = logits_of(auto, IDX)
    matrices = {  # the first block has no mean before it to mix
        name
        for name, module in auto.named_modules()
        if isinstance(module, torch.nn.Linear) and module.weight.requires_grad
    }
    if config.tie_embedding_to_lm_head:  # merging would change the embedding as well
        matrices -= {"network.head"}
    adapted = peft.get_peft_model(
        auto, peft.LoraConfig(r=2, target_modules=sorted(matrices))
    ).eval()
    torch.testing.assert_close(logits_of(adapted, IDX), before)  # adapters start at zero
    for name, p in adapted.named_parameters():
        if "lora_" in name:
            with torch.no_grad():
                p += 0.05 * torch.randn_like(p)
    unmerged = logits_of(adapted, IDX)
    assert (unmerged - before).abs().max() > 1e-2
    loss = adapted(IDX, labels=IDX).loss
    loss.backward()
    without = [n for n, p in adapted.named_parameters() if "lora_" in n and p.grad is None]
    assert without == []
    torch.testing.assert_close(logits_of(adapted.merge_and_unload(), IDX), unmerged)


def test_torchao_quantizes_it(tmp_path):
    pytest.importorskip("torchao")
    from torchao.quantization import Int8WeightOnlyConfig

    model = model_of(C=32, **PARTS["delta"])
    export_hf(model, ByteTokenizer(), tmp_path / "hf")
    load = transformers.AutoModelForCausalLM.from_pretrained
    full = load(tmp_path / "hf")
    how = transformers.TorchAoConfig(Int8WeightOnlyConfig())
    few = load(tmp_path / "hf", quantization_config=how)
    changed = [n for n, p in few.named_parameters() if type(p) is not torch.nn.Parameter]
    assert any("mlp" in name for name in changed)
    assert any("delta_memory.query" in name for name in changed)
    exact, near = logits_of(full, IDX), logits_of(few, IDX)
    assert 0 < (near - exact).norm() / exact.norm() < 0.05
    assert few.generate(IDX, max_new_tokens=3, do_sample=False).shape == (3, 33)


def test_more_tokens_can_be_added(folder):
    auto = transformers.AutoModelForCausalLM.from_pretrained(folder / "hf")
    before = logits_of(auto, IDX)
    auto.resize_token_embeddings(260)
    assert torch.equal(logits_of(auto, IDX)[..., :256], before)
    assert auto.network.vocab_size == 260
