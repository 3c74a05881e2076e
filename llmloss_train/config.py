"""The settings of a run. The defaults are those of the demo."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from llmloss_ext.cli import UserError

DTYPES = ("float32", "bfloat16")
LOSSES = ("linear", "logits", "torch")
PARALLEL = ("none", "ddp", "fsdp", "tp")
SPIKES = ("mark", "skip", "lower", "off")

# The weights and the data order depend on these, so a resumed run cannot change them.
_FIXED = ("layers", "heads", "dim", "seq_len", "seed", "mtp", "adversarial")


@dataclass(frozen=True)
class TrainConfig:
    """The settings of a run, which its checkpoints store.

    The defaults take less than four minutes on two cores. Nearly all of this time goes into the
    head (6 * dim * 131072 operations per token), so the model is narrow.
    """

    text: tuple[str, ...] = ()
    max_tokens: int = 1_000_000
    steps: int = 180
    batch_size: int = 4
    seq_len: int = 256
    accumulate: int = 1
    lr: float = 3e-3
    clip: float = 1.0
    layers: int = 2
    heads: int = 4
    dim: int = 128
    seed: int = 0
    dtype: str = "float32"
    loss: str = "linear"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    focal_gamma: float = 0.0
    confidence_penalty: float = 0.0
    contrastive: float = 0.0
    mlm: float = 0.0
    mtp: int = 0
    adversarial: float = 0.0
    on_spike: str = "mark"
    spike_threshold: float = 4.0
    device: str = "cpu"
    parallel: str = "none"
    threads: int = 0
    eval_every: int = 45
    log_every: int = 5
    save_every: int = 45

    def __post_init__(self) -> None:
        """Checks the options against each other.

        Raises:
            UserError: The heads do not divide the width, sequences are too short for an objective,
                or an objective does not work on several processes.
        """
        if self.dim % self.heads:
            raise UserError(f"--dim {self.dim} is not divisible by --heads {self.heads}")
        if self.mtp >= self.seq_len:
            raise UserError(
                f"--mtp {self.mtp} predicts further than --seq-len {self.seq_len} reaches"
            )
        if self.adversarial and self.parallel != "none":
            raise UserError(
                f"--adversarial works in one process only: not with --parallel {self.parallel}"
            )
        if self.contrastive and self.seq_len < 2:
            raise UserError(
                "--contrastive compares the halves of sequences: --seq-len must be >= 2"
            )

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for a checkpoint."""
        return asdict(self) | {"text": list(self.text)}

    def describe(self) -> str:
        """Describes the model and its training in one line."""
        batch = f"{self.batch_size} x {self.seq_len}"
        if self.accumulate > 1:
            batch = f"{self.accumulate} x {batch}"
        return (
            f"{self.layers} layers, dim {self.dim}, {self.heads} heads, batch {batch} tokens, "
            f"{self.dtype}, loss {self.loss}"
        )


def resumed(saved: dict[str, Any], given: dict[str, Any]) -> TrainConfig:
    """The settings of a resumed run: those of the checkpoint, overridden by the given options.

    How the processes share the work is not inherited: there may be another number of them now.

    Args:
        saved: The result of `TrainConfig.to_dict`.
        given: The options on the command line, by field name.

    Raises:
        UserError: An option that a resumed run cannot change differs from the checkpoint's.
    """
    known = {field.name for field in fields(TrainConfig)} - {"parallel"}
    config = TrainConfig(**{k: v for k, v in saved.items() if k in known})
    for name in _FIXED:
        if name in given and given[name] != getattr(config, name):
            option = "--" + name.replace("_", "-")
            raise UserError(
                f"{option} {given[name]} differs from the checkpoint's {getattr(config, name)}: "
                "leave it out, or train into another --out"
            )
    return replace(config, **({"text": tuple(saved["text"])} | given))
