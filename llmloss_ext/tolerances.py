"""How far a result may be from float64: the one table, for tests, ``llmloss verify`` and ``bench``.

Relative to the larger of 1 and the result's magnitude. Losses and statistics are float32 whatever
the half type; gradients are rounded once to the logits' dtype.
"""

import torch

__all__ = [
    "GRADIENT", "GRADIENT_NORM", "GRADIENT_NORM_OF_MODEL", "MEAN_LOSS", "MEAN_LOSS_OF_PRODUCTS",
    "OTHERS_GRADIENT", "OTHERS_LOSS", "PAIR_LOSS", "VALUE",
]  # fmt: skip

VALUE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-6, torch.float16: 2e-6}
GRADIENT = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}

# For the benchmark, at large sizes: the relative error of a mean loss, and that of a row of a
# gradient in the Euclidean norm. 16-bit products round the logits: so does a loss from them.
MEAN_LOSS = 1e-5
MEAN_LOSS_OF_PRODUCTS = {torch.float32: 1e-5, torch.bfloat16: 1e-3, torch.float16: 1e-4}
PAIR_LOSS = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Of a preference loss: the errors of hundreds of tokens' log-probabilities add up."""
GRADIENT_NORM = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 2e-3}
GRADIENT_NORM_OF_MODEL = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 2e-2}
"""Of a whole model, each of whose layers rounds."""
OTHERS_LOSS, OTHERS_GRADIENT = 5e-3, 0.25
"""Beyond these another implementation computes something else. Wide on purpose: eager torch on a
CPU, with its bfloat16 exp, is 20 % off in the gradient of a row whose target has p = 0.99."""
