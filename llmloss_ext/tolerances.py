"""How far a result may be from float64: the one table, for the tests and for ``llmloss verify``.

Relative to the larger of 1 and the result's magnitude. Losses and statistics are float32 whatever
the half type; gradients are rounded once to the logits' dtype.
"""

import torch

VALUE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
