"""The device that a command runs on."""

from __future__ import annotations

import torch

from .. import cross_entropy
from .errors import UserError


def open_device(name: str) -> torch.device:
    """Returns a device that torch can use and that this build has kernels for.

    Args:
        name: "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: The device cannot be used; the message says why.
    """
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"--device must be cpu or cuda, got {name}") from None
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"--device must be cpu or cuda, got {name}")
    try:
        target = torch.zeros(1, dtype=torch.int64, device=device)
        cross_entropy(torch.zeros(1, 2, device=device), target)
    except NotImplementedError:
        raise UserError(
            f"--device {name}: this build of llmloss_ext has no kernels for {device.type}"
        ) from None
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device
