"""The project's language models as a family of transformers: `AutoModelForCausalLM` and the rest.

    import wavelet_lm.interop.transformers   # registers the Auto classes
    model = AutoModelForCausalLM.from_pretrained("hf-RUN")

The folder that `wavelet-lm export hf` writes brings a file that imports this one, so that
`trust_remote_code=True` does without that line. The model here holds a `LanguageModel` and reads
with it; the cache holds its state. Context is `stream`: a token sees all of its text.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from wavelet_lm.atomic_files import write_text
from wavelet_lm.config import Config
from wavelet_lm.interop.kinds import MODEL_TYPE
from wavelet_lm.interop.transformers_cache import WaveletLMCache, rows_of
from wavelet_lm.models.base import LanguageModel
from wavelet_lm.models.registry import build_model
from wavelet_lm.models.stored_model import StoredModel
from wavelet_lm.models.wavelet_lm.memory import learning
from wavelet_lm.quiet_imports import quiet_imports

with quiet_imports():
    from transformers import (
        AutoConfig,
        AutoModelForCausalLM,
        GenerationMixin,
        PreTrainedConfig,
        PreTrainedModel,
    )
    from transformers.modeling_outputs import CausalLMOutputWithPast

MODELING_FILE = "modeling_wavelet_lm.py"
MODELING = '''\
"""WaveletLM for transformers: pip install wavelet-lm"""

from wavelet_lm.interop.transformers import WaveletLMConfig, WaveletLMForCausalLM

__all__ = ["WaveletLMConfig", "WaveletLMForCausalLM"]
'''
AUTO_MAP = {
    "AutoConfig": f"{MODELING_FILE[:-3]}.WaveletLMConfig",
    "AutoModelForCausalLM": f"{MODELING_FILE[:-3]}.WaveletLMForCausalLM",
}
NOT_A_TARGET = -100  # how transformers marks a label that does not count


@strict  # so that its validators are asked, not those of its base
class WaveletLMConfig(PreTrainedConfig):
    """What transformers asks of a model, and the project's own config under `network`.

    Args:
        network: a `Config` as JSON has it; it may leave out what is at its default.
        tokenizer: the name of the tokenizer that the model was trained with.
        pads_past_vocabulary: texts are padded with the token `vocab_size`, which is never read.
    """

    model_type = MODEL_TYPE
    keys_to_ignore_at_inference: ClassVar = ["past_key_values"]
    network: dict | None = None
    vocab_size: int = 256
    tokenizer: str | None = None
    pads_past_vocabulary: bool = False
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | None = None
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self.network = dict(self.network or {})
        config = self.own()
        kwargs |= {"hidden_size": config.C, "num_hidden_layers": config.layers}
        if config.model != "wavelet_lm":  # what transformers warns of when a text becomes too long
            kwargs["max_position_embeddings"] = config.block_size
        self.tie_word_embeddings = config.tie_embedding_to_lm_head
        super().__post_init__(**{**kwargs, "auto_map": dict(AUTO_MAP)})

    def validate_token_ids(self) -> None:
        """As every model's, but that padding may be past the vocabulary, for it is never read."""
        if not self.pads_past_vocabulary:
            super().validate_token_ids()

    def own(self) -> Config:
        """The project's config."""
        return Config.from_dict(self.network, source="the network of a transformers config")

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Nothing: the file that a saved model brings imports this one and is no copy of it."""


class WaveletLMForCausalLM(PreTrainedModel, GenerationMixin):
    """A `LanguageModel` of the project, of any kind that its config names, behind `forward`.

    Attributes:
        network: the project's own model, whose weights these are.
    """

    config: WaveletLMConfig
    config_class = WaveletLMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    _is_stateful = True  # refuses assisted generation, which takes tokens back
    _no_split_modules: ClassVar = ["WaveletLM", "MultinodalLM", "GPT"]
    supports_gradient_checkpointing = True

    def __init__(self, config: WaveletLMConfig, *args: Any, **kwargs: Any):
        super().__init__(config, *args, **kwargs)
        self.network: LanguageModel = build_model(config.own(), config.vocab_size)
        names: dict[int, str] = {}
        tied = {}
        for name, parameter in self.named_parameters(remove_duplicate=False):
            if id(parameter) in names:
                tied[name] = names[id(parameter)]
            names.setdefault(id(parameter), name)
        self._tied_weights_keys = tied
        self._without_values = next(self.parameters()).is_meta
        self.gradient_checkpointing = bool(self.network.config.gradient_checkpointing)
        self.post_init()

    @classmethod
    def around(cls, network: LanguageModel, config: WaveletLMConfig) -> WaveletLMForCausalLM:
        """This model around one that is there, whose weights it shares; the config describes it."""
        with torch.device("meta"):
            model = cls(config)
        model.network = network
        model._without_values = False
        return model.eval()

    # --- reading ----------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: WaveletLMCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits of the next token at every position, and the loss.

        Padding is exact: every row is read as if it were alone, from its first token to its last,
        rows that start and end together in one go. Logits at padding are 0.

        Args:
            input_ids: [B, T] int64, texts or, with a cache, what follows.
            attention_mask: [B, past + T], 0 at padding on the left or the right.
            past_key_values: what an earlier call returned; it is changed.
            labels: [B, T], as `input_ids`; shifted here; −100 is no target.
            logits_to_keep: of the last so many positions, 0 = all; or [n] int64 positions.

        Returns:
            `loss` (nats per token), `logits` [B, T, vocab], `past_key_values`.

        Raises:
            ValueError: embeddings in place of tokens, a mask with gaps, padding after a cache.
            UserError: a text longer than what a GPT can read.
        """
        if inputs_embeds is not None or input_ids is None:
            raise ValueError("a WaveletLM reads input_ids; inputs_embeds are not supported")
        if use_cache is None:
            use_cache = self.config.use_cache and not self.training
        if return_dict is None:
            return_dict = self.config.return_dict
        T = input_ids.shape[1]
        if self.config.pads_past_vocabulary:
            input_ids = input_ids.masked_fill(input_ids == self.network.vocab_size, 0)
        cache = past_key_values
        state = None if cache is None else cache.state
        spans = self._spans(attention_mask, T, bool(use_cache), state)
        if spans is None:
            passes, state = self.network.passes(input_ids, state)
        else:
            passes, state = self._read_apart(input_ids, spans)
        if use_cache:
            if cache is None:
                cache = WaveletLMCache()
            if cache.state is None:  # fast weights learn from what is written, not from the prompt
                state = learning(state)
            cache.update(state, T)
        logits = self.network.project(_kept(passes[-1], logits_to_keep))
        loss = None
        if labels is not None:
            judged = passes[:-1] if self.training else []  # each pass has its own prediction
            all_logits = [self.network.project(x) for x in judged] + [logits]
            losses = [
                self.loss_function(logits=y, labels=labels, vocab_size=y.shape[-1], **kwargs)
                for y in all_logits
            ]
            loss = sum(losses) / len(losses)
        if not return_dict:
            return tuple(x for x in (loss, logits, cache if use_cache else None) if x is not None)
        return CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=cache if use_cache else None
        )

    def _spans(
        self, mask: Tensor | None, T: int, keeps_state: bool, state: Any
    ) -> list[tuple[int, int]] | None:
        """Where each row's tokens begin and end among the T; None: all of them are read."""
        if mask is None:
            return None
        if mask.dim() != 2 or mask.shape[1] < T:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}; a WaveletLM takes [batch, length], 1 at"
                " tokens and 0 at padding"
            )
        read = mask[:, -T:] != 0
        if bool(read.all()):
            return None
        if state is not None:
            raise ValueError("padding after a cache is not supported: give every row its own call")
        first, count = read.int().argmax(1), read.sum(1)
        places = torch.arange(T, device=mask.device)
        whole = (places >= first[:, None]) & (places < (first + count)[:, None])
        if bool((whole != read).any()) or bool((count == 0).any()):
            raise ValueError(
                "attention_mask has a gap, or a row without tokens; padding must be at the left or"
                " the right end"
            )
        # What stands right of a text changes nothing of it, only the state.
        ends = (first + count).tolist() if keeps_state else [T] * len(read)
        spans = list(zip(first.tolist(), ends, strict=True))
        return None if set(spans) == {(0, T)} else spans

    def _read_apart(
        self, input_ids: Tensor, spans: list[tuple[int, int]]
    ) -> tuple[list[Tensor], Any]:
        """As `LanguageModel.passes` of input_ids [B, T], zeros where nothing was read."""
        T, order, parts, states = input_ids.shape[1], [], [], []
        for begin, end in dict.fromkeys(spans):
            rows = [i for i, span in enumerate(spans) if span == (begin, end)]
            passes, state = self.network.passes(input_ids[rows, begin:end], None)
            parts.append([nn.functional.pad(x, (0, 0, begin, T - end)) for x in passes])
            states.append(state)
            order += rows
        back = torch.tensor(order, device=input_ids.device).argsort()
        whole = tree_map(lambda *leaf: leaf[0] if leaf[0] is None else torch.cat(leaf), *states)
        return [torch.cat(x)[back] for x in zip(*parts, strict=True)], rows_of(whole, back)

    # --- what transformers asks -------------------------------------------------------------------

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # `forward` makes its own

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> dict[str, Any]:
        """As every model's of input_ids [B, T]; refuses padding on the right, where texts go on."""
        first = kwargs.get("is_first_iteration", False)
        empty = input_ids.shape[1] == 0
        if first and attention_mask is not None and not empty:
            empty = bool((attention_mask == 0).all(1).any())
        if empty:
            raise ValueError("a prompt has no tokens; give every text at least one")
        if first and attention_mask is not None and bool((attention_mask[:, -1] == 0).any()):
            raise ValueError(
                "a batch to be continued is padded on the right; set tokenizer.padding_side ="
                ' "left"'
            )
        return super().prepare_inputs_for_generation(
            input_ids, attention_mask=attention_mask, **kwargs
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """Nothing for a model that was built with values; buffers for one that was built without.

        transformers builds models on the meta device and fills in what the file has. Buffers that
        no file has, tables that follow from the config, are computed again.
        """
        if not self._without_values:
            return
        # Each refuses to be called twice: what is loaded must not be initialised again.
        missing = [n for n, p in module.named_parameters(recurse=False) if not _is_loaded(p)]
        names = {id(m): name for name, m in self.network.named_modules()}
        name = names.get(id(module))
        if missing and name is not None:
            raise ValueError(
                f"the checkpoint has no weights for network.{name}.{missing[0]}; it is not whole"
            )
        buffers = dict(module.named_buffers(recurse=False))
        if buffers and name is not None:
            true = dict(self._computed().get_submodule(name).named_buffers(recurse=False))
            for key, buffer in buffers.items():
                buffer.copy_(true[key])

    def _computed(self) -> LanguageModel:
        """The network without its weights, whose buffers have their values."""
        if "_empty" not in self.__dict__:

            def read(name: str) -> Tensor:
                raise AssertionError(name)

            with torch.device("cpu"):
                empty = StoredModel(self.config.own(), self.config.vocab_size, read).model
            self.__dict__["_empty"] = empty
        return self.__dict__["_empty"]

    def gradient_checkpointing_enable(self, *args: Any, **kwargs: Any) -> None:
        """Every block is computed again in backward, as with the config's key of that name."""
        self._recompute(True)

    def gradient_checkpointing_disable(self) -> None:
        """Nothing is computed again."""
        self._recompute(False)

    def _recompute(self, on: bool) -> None:
        self.gradient_checkpointing = on
        for network in {self.network, *self.network.networks()}:
            network.config = network.config.replace(gradient_checkpointing=on)

    def get_input_embeddings(self) -> nn.Module:
        return self.network.networks()[0].embedding

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._single().embedding = value

    def get_output_embeddings(self) -> nn.Module:
        return self.network.networks()[0].head

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self._single().head = new_embeddings

    def _single(self) -> LanguageModel:
        networks = self.network.networks()
        if len(networks) > 1:
            raise ValueError("the vocabulary of a multinodal model cannot be changed")
        return networks[0]

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Module:
        """As every model's: more tokens, or fewer."""
        self._single()
        embedding = super().resize_token_embeddings(*args, **kwargs)
        self.network.vocab_size = self.config.vocab_size
        return embedding

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """As every model's, and the file by which `trust_remote_code` finds it."""
        super().save_pretrained(save_directory, *args, **kwargs)
        if kwargs.get("is_main_process", True):
            write_text(Path(save_directory) / MODELING_FILE, MODELING)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Nothing, as for the config."""


def _is_loaded(parameter: nn.Parameter) -> bool:
    return getattr(parameter, "_is_hf_initialized", False)


def _kept(x: Tensor, which: int | Tensor) -> Tensor:
    """The last `which` of x [B, T, H], all for 0; or those of these places."""
    if isinstance(which, Tensor):
        return x[:, which]
    return x[:, -which:] if which else x


AutoConfig.register(MODEL_TYPE, WaveletLMConfig)
AutoModelForCausalLM.register(WaveletLMConfig, WaveletLMForCausalLM)
