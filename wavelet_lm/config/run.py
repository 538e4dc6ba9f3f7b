"""The options of a run: its data, its training, and how its texts and weights are made."""

from __future__ import annotations

from dataclasses import dataclass

from wavelet_lm.config.option import option
from wavelet_lm.user_cache import DEFAULT_CACHE

BITS = (2, 4, 8, 16)
# What a factor of logits may be, with room to spare in float32, in which they are computed with.
# The largest puts all but the first of them out of reach anyway.
SMALLEST, LARGEST = 1e-30, 1e30


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The text and how it becomes batches of tokens."""

    dataset: str = option(
        "wikitext-103",
        "built-in name (python-stdlib, wikitext-103, wikitext-2, pg19, text8, enwik8, tinystories,"
        " openwebtext), a file or folder of text (of what the tokenizer reads), or a hub data set"
        " NAME[:CONFIG]",
    )
    tokenizer: str = option(
        "auto",
        "gpt2, sentencepiece:VOCAB, bytes, char, or auto: what suits the data set; for files of"
        " audio mulaw or pcm8, of music midi, of EnCodec's codes encodec[:CODEBOOK], of images"
        " pixels or pixels_rgb",
    )
    split: tuple[float, ...] = option(
        (0.9, 0.05, 0.05),
        "train, valid, test fractions of data that has no splits of its own",
        minimum=0,
        maximum=1,
    )
    document_separator: str | None = option(
        None,
        "a text in the data at which a document ends, such as <|endoftext|>; the tokenizer's own"
        " separator stands there instead",
    )
    data_order: str = option(
        "random", "random crops, or sequential streams", choices=("random", "sequential")
    )
    block_size: int = option(256, "positions of a training window", minimum=1)
    repeated_passages: float = option(
        0.0,
        "share of the training windows in which a passage comes a second time, so that looking"
        " back pays",
        minimum=0,
        maximum=1,
    )
    carry_state: bool = option(
        False,
        "with data_order sequential, a window begins with the state that the text before it left;"
        " no gradient goes back there",
    )
    cache_dir: str = option(
        DEFAULT_CACHE,
        "folder of the encoded texts, which are rebuilt when missing; the default is in"
        " XDG_CACHE_HOME where that is set",
    )


@dataclass(frozen=True, kw_only=True)
class TrainingConfig:
    """Optimisation, its schedule, and what a run writes."""

    epochs: float = option(5, "passes over the training tokens", above=0)
    max_steps: int | None = option(None, "optimizer steps, in place of epochs", minimum=1)
    micro_batch_size: int = option(8, "windows per forward pass", minimum=1)
    grad_accum: int = option(1, "forward passes per optimizer step", minimum=1)
    optimizer: str = option(
        "Adagrad",
        "optimizer; Muon takes the matrices and leaves the rest to AdamW",
        choices=("Adagrad", "AdamW", "Muon", "Adagrad8bit", "AdamW8bit"),
    )
    optimizer_eps: float = option(2e-13, "its epsilon", above=0)
    adam_betas: tuple[float, ...] = option(
        (0.9, 0.95), "moment decays of AdamW", minimum=0, maximum=0.99999
    )
    lr: float = option(0.01, "peak learning rate", above=0)
    min_lr: float = option(2e-4, "learning rate at the end of the cosine", minimum=0)
    optimizer_offload: bool = option(
        False,
        "keep the optimizer's state in the CPU's memory and bring it to the GPU weight by weight",
    )
    optimizer_in_backward: bool = option(
        False,
        "step each weight as soon as backward has its gradient, and free that; needs grad_accum 1"
        " and grad_clip 0",
    )
    weight_decay: float = option(
        1e-6, "weight decay: Adagrad's on all parameters, the others' on matrices", minimum=0
    )
    weight_decay_mode: str = option(
        "coupled",
        "Adagrad's: coupled adds the decay to the gradient, as published; decoupled shrinks the"
        " weights by lr · weight_decay, as AdamW and Muon always do",
        choices=("coupled", "decoupled"),
    )
    warmup_fraction: float = option(
        0.3, "share of the steps with a linear warm-up", minimum=0, maximum=1
    )
    grad_clip: float = option(1.0, "largest gradient norm, 0 = no clipping", minimum=0)
    use_amp: bool = option(True, "mixed precision (autocast)")
    amp_dtype: str = option(
        "auto",
        "its type; auto = bf16 where the GPU has it, else fp16, and fp32 on a CPU; fp8 = bf16, with"
        " the linear layers' products in float8 (torchao) on GPUs that have them",
        choices=("auto", "fp16", "bf16", "fp32", "fp8"),
    )
    allow_tf32: bool = option(True, "TensorFloat-32 for float32 products on CUDA")
    compile: bool | str = option(
        "auto",
        "torch.compile: true stops where it cannot, auto compiles on CUDA where it can",
        choices=("auto", True, False),
    )
    device: str = option("auto", "auto, cpu, cuda or cuda:N; auto takes the GPU if there is one")
    parallel: str = option(
        "auto",
        "how several processes (torchrun) share one model: ddp keeps the whole of it in each, fsdp"
        " a share; auto = ddp where it fits, else fsdp; none = one process",
        choices=("auto", "none", "ddp", "fsdp"),
    )
    fsdp_reshard: bool = option(
        True, "fsdp: give the gathered weights of a block back between forward and backward"
    )
    fsdp_cpu_offload: bool = option(
        False, "fsdp: keep weights, gradients and optimizer state in the memory of the CPU"
    )
    rank_logs: bool = option(False, "of several processes each writes a log of its own")
    threads: int | str = option(
        "auto",
        "threads that compute on the CPU; auto = as many as it has cores for this process and its"
        " quota allows, or OMP_NUM_THREADS",
        minimum=1,
        maximum=1024,
        word="auto",
    )
    seed: int = option(1337, "seed of every random generator", minimum=0, maximum=2**32 - 1)
    eval_interval: int = option(250, "steps between validations", minimum=1)
    eval_batches: int = option(
        50,
        "batches of a validation, of micro_batch_size · grad_accum windows each, evenly spaced, the"
        " same each time",
        minimum=1,
    )
    log_interval: int = option(10, "steps between lines of metrics.jsonl", minimum=1)
    track: str = option(
        "none",
        "who else gets the metrics: TensorBoard, Weights & Biases (offline unless WANDB_MODE says"
        " otherwise) or trackio",
        choices=("none", "tensorboard", "wandb", "trackio"),
    )
    sample_interval: int = option(
        0, "steps between samples, texts of generation_prompt; 0 = one at the end alone", minimum=0
    )
    loss_plot: bool = option(
        True, "draw the losses to loss.png at the end of a run, where matplotlib is installed"
    )
    save_interval: int = option(1000, "steps between saves of the last checkpoint", minimum=1)
    keep_checkpoints: int = option(
        1, "saves of the training state that are kept, the newest ones", minimum=1
    )
    skip_warmup_saves: bool = option(True, "write no best checkpoint during warm-up")
    init_from: str = option(
        "", "run, checkpoint file or hf://user/name whose weights to start from"
    )
    out_dir: str = option("logs", "folder in which the run folder is made")
    runs_file: str | None = option("runs.md", "table to which a finished run adds its row")
    benchmark_only: bool = option(False, "evaluate benchmark_run_dir and do not train")
    benchmark_run_dir: str = option("", "run folder for benchmark_only")


@dataclass(frozen=True, kw_only=True)
class GenerationConfig:
    """The sample at the end of training, and the defaults of generate.py for the run."""

    generation_prompt: str = option("The history of", "text to continue")
    num_new_tokens: int = option(512, "tokens to generate", minimum=1)
    temperature: float = option(
        1.0, "softmax temperature, 0 = the likeliest token", minimum=0, maximum=LARGEST
    )
    top_k: int = option(0, "sample among the k likeliest tokens, 0 = all", minimum=0)
    top_p: float = option(
        0.95,
        "sample among the fewest tokens that hold this probability",
        minimum=SMALLEST,
        maximum=1,
    )
    repetition_penalty: float = option(
        1.1,
        "divides the positive logits of tokens seen before, multiplies the others; 1 = none",
        minimum=SMALLEST,
        maximum=LARGEST,
    )


@dataclass(frozen=True, kw_only=True)
class QuantizationConfig:
    """How generate.py and evaluation quantize the weights of the run, unless told otherwise."""

    quantize_enabled: bool = option(False, "read the run with quantized weights (--ptq8)")
    quantize_backend: str = option(
        "native",
        "whose products read them; bitsandbytes has 8 and 4 bits (LLM.int8, NF4), torchao 8",
        choices=("native", "torchao", "bitsandbytes"),
    )
    quantize_bits: int = option(8, "bits of a weight, 16 = not quantized", choices=BITS)
    quantize_mixer_coarse_bits: int | None = option(
        None, "those of the mixers of scales 0 to 2; none = quantize_bits", choices=BITS
    )
    quantize_mixer_mid_bits: int | None = option(
        None, "of the mixers of scales 3 to 5", choices=BITS
    )
    quantize_mixer_fine_bits: int | None = option(
        None, "of the mixers of the other scales", choices=BITS
    )
    quantize_mlp_bits: int | None = option(None, "of the MLPs", choices=BITS)
    quantize_lifting_bits: int | None = option(None, "of the lifting nets", choices=BITS)
    quantize_embedding_bits: int | None = option(
        None, "of the embedding, and of a head that is tied to it", choices=BITS
    )
    quantize_group_size: int = option(
        64, "weights of a row that share a scale, below 8 bits", choices=(32, 64, 128, 256)
    )
