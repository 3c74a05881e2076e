"""The problem that every rank has a part of: the same numbers on each."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor

ROWS, COLUMNS, D = 11, 37, 16
OPTIONS: dict[str, dict[str, Any]] = {
    "none": {},
    "label_smoothing": {"label_smoothing": 0.2},
    "z_loss": {"z_loss": 1e-2},
    "focal_gamma": {"focal_gamma": 2.0, "label_smoothing": 0.1},
    "softcap": {"softcap": 5.0},
    "weight": {"weight": True, "label_smoothing": 0.1},
    "token_weight": {"token_weight": True},
    "weight_z_loss": {"weight": True, "token_weight": True, "z_loss": 1e-2},
    "num_items": {"num_items": 5},
    "ignore_index": {"ignore_index": 2},
    "scale": {"logit_scale": 0.7},
    "temperature": {"temperature": 0.6, "softcap": 5.0},
    "all": {
        "label_smoothing": 0.1, "z_loss": 1e-3, "softcap": 9.0, "weight": True,
        "token_weight": True, "logit_scale": torch.tensor(1.3),
    },
}  # fmt: skip


class Problem:
    """The same on every rank: whole logits and targets, some of them ignored."""

    def __init__(self, rank: int, ranks: int, dtype: torch.dtype, **options: Any) -> None:
        torch.manual_seed(len(options))
        self.columns = slice(rank * COLUMNS, (rank + 1) * COLUMNS)
        self.classes = ranks * COLUMNS
        self.logits = (3 * torch.randn(ROWS, self.classes)).to(dtype)
        self.hidden = torch.randn(ROWS, D).to(dtype)
        self.weight = (torch.randn(self.classes, D) / 2).to(dtype)
        self.bias = torch.randn(self.classes).to(dtype)
        self.target = torch.randint(0, self.classes, (ROWS,))
        self.target[3::5] = options.get("ignore_index", -100)
        self.options = dict(options)
        if options.pop("token_weight", False):
            self.options["token_weight"] = torch.rand(ROWS)
        if options.pop("weight", False):
            self.options["weight"] = torch.rand(self.classes)
        scale = options.get("logit_scale")
        self.scale = scale.clone().requires_grad_() if isinstance(scale, Tensor) else None
        if self.scale is not None:
            self.options["logit_scale"] = self.scale

    def mine(self) -> dict[str, Any]:
        """The options of this rank."""
        options = dict(self.options)
        if "weight" in options:
            options["weight"] = options["weight"][self.columns]
        return options

    def exact(self) -> dict[str, Any]:
        """The options in float64, with a scale that has a gradient of its own."""
        options = copy.copy(self.options)
        for name in ("weight", "token_weight"):
            if name in options:
                options[name] = options[name].double()
        if self.scale is not None:
            options["logit_scale"] = self.scale.detach().double().requires_grad_()
        return options


def leaf(tensor: Tensor) -> Tensor:
    return tensor.detach().clone().requires_grad_()
