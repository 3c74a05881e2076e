"""The device that a command runs on."""

from __future__ import annotations

import torch

from .. import cross_entropy
from .errors import UserError, first_line


def open_device(name: str) -> torch.device:
    """Returns a device that torch can use and that this build has kernels for.

    Args:
        name: "cpu", "cuda" or "cuda:1".

    Raises:
        UserError: The device cannot be used; the message says why.
    """
    wrong = UserError(f"--device must be cpu or cuda, got {name or 'nothing'}")
    if name.partition(":")[0] not in ("cpu", "cuda"):  # torch warns of some that it knows
        raise wrong
    try:
        device = torch.device(name)
    except (RuntimeError, ValueError):
        raise wrong from None
    try:
        target = torch.zeros(1, dtype=torch.int64, device=device)
        cross_entropy(torch.zeros(1, 2, device=device), target)
    except NotImplementedError:
        raise UserError(
            f"--device {name}: this build of llmloss_ext has no kernels for {device.type}"
        ) from None
    except ValueError as error:  # an instruction set that does not exist
        raise UserError(first_line(error)) from error
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {name}: {first_line(error)}") from error
    return device
