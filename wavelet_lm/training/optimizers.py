"""Optimizers by name, and their state as named tensors for the checkpoint."""

from typing import Any

import torch
from torch import Tensor, nn

from wavelet_lm import roles
from wavelet_lm.config import TrainingConfig
from wavelet_lm.errors import UserError

STATE_BYTES = {"Adagrad": 4, "AdamW": 8, "Muon": 8, "Adagrad8bit": 1, "AdamW8bit": 2}


class Optimizer:
    """One optimizer, or Muon for the matrices beside AdamW for the rest, behind one interface."""

    def __init__(self, model: nn.Module, config: TrainingConfig):
        named = {n: p for n, p in model.named_parameters() if p.requires_grad}
        maps = roles.maps(model)
        matrices = {n: p for n, p in named.items() if p in maps}
        others = {n: p for n, p in named.items() if n not in matrices}
        self.parts: list[torch.optim.Optimizer]
        match config.optimizer:
            case "Adagrad":
                self.parts = [_adagrad(config, _groups(config, named, {}))]
            case "Adagrad8bit":
                self.parts = [_bitsandbytes(config, _groups(config, named, {}))]
            case "AdamW":
                self.parts = [_adamw(config, _groups(config, matrices, others))]
            case "AdamW8bit":
                self.parts = [_bitsandbytes(config, _groups(config, matrices, others))]
            case "Muon":
                self.parts = [_muon(config, matrices), _adamw(config, _groups(config, {}, others))]
        self.names = {p: n for n, p in named.items()}

    def set_lr(self, lr: float) -> None:
        """The learning rate of the next steps."""
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = lr

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for part in self.parts:
            part.zero_grad(set_to_none=True)

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything that the next step depends on: tensors by name, and JSON-ready scalars."""
        tensors: dict[str, Tensor] = {}
        scalars: dict[str, Any] = {}
        for i, part in enumerate(self.parts):
            for parameter, entries in part.state.items():
                for key, value in entries.items():
                    target = tensors if isinstance(value, Tensor) else scalars
                    target[f"{i}/{self.names[parameter]}/{key}"] = value
        return tensors, scalars

    def load_state(self, tensors: dict[str, Tensor], scalars: dict[str, Any]) -> None:
        """The inverse of `state`."""
        for i, part in enumerate(self.parts):
            # torch numbers the parameters of an optimizer in the order of its groups.
            parameters = [p for group in part.param_groups for p in group["params"]]
            numbers = {self.names[p]: number for number, p in enumerate(parameters)}
            state: dict[int, dict[str, Any]] = {}
            for path, value in [*tensors.items(), *scalars.items()]:
                index, name, key = path.split("/")
                if int(index) == i:
                    state.setdefault(numbers[name], {})[key] = value
            part.load_state_dict(
                {"state": state, "param_groups": part.state_dict()["param_groups"]}
            )


def _groups(config: TrainingConfig, decayed: dict, others: dict) -> list[dict[str, Any]]:
    groups = [
        {"params": list(decayed.items()), "weight_decay": config.weight_decay},
        {"params": list(others.items()), "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def _adagrad(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    # torch has a fused Adagrad for the CPU alone; None lets it choose its multi-tensor form.
    fused = True if _device(groups) == "cpu" else None
    return torch.optim.Adagrad(groups, lr=config.lr, eps=config.optimizer_eps, fused=fused)


def _adamw(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    fused = _device(groups) in ("cpu", "cuda")
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=config.adam_betas, eps=config.optimizer_eps, fused=fused
    )


def _muon(config: TrainingConfig, matrices: dict[str, Tensor]) -> torch.optim.Optimizer:
    if not hasattr(torch.optim, "Muon"):
        raise UserError(
            f"optimizer Muon needs torch 2.9 or newer, this is {torch.__version__}; use AdamW"
        )
    # Matching AdamW's update size lets one learning rate serve both halves.
    return torch.optim.Muon(
        list(matrices.items()),
        lr=config.lr,
        weight_decay=config.weight_decay,
        adjust_lr_fn="match_rms_adamw",
    )


def _bitsandbytes(config: TrainingConfig, groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    try:
        import bitsandbytes
    except ImportError:
        raise UserError(
            f"optimizer {config.optimizer} needs bitsandbytes: pip install bitsandbytes"
        ) from None
    groups = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
    options: dict[str, Any] = {"lr": config.lr, "eps": config.optimizer_eps}
    if config.optimizer == "AdamW8bit":
        options["betas"] = config.adam_betas
    return getattr(bitsandbytes.optim, config.optimizer)(groups, **options)


def _device(groups: list[dict[str, Any]]) -> str:
    return groups[0]["params"][0][1].device.type
