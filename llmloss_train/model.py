"""A small GPT: pre-norm, causal, learned positions, tied embedding."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, arange, nn

T = TypeVar("T")


class Attention(nn.Module):
    """Self-attention, causal by default."""

    def __init__(self, dim: int, heads: int) -> None:
        """``heads`` divides ``dim``."""
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind(0)
        y = F.scaled_dot_product_attention(query, key, value, is_causal=causal)
        return self.out(y.transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a feed-forward layer, each added to its input."""

    def __init__(self, dim: int, heads: int) -> None:
        """Makes a block of width ``dim``."""
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attention = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, 4 * dim, bias=False)
        self.down = nn.Linear(4 * dim, dim, bias=False)

    def forward(self, x: Tensor, causal: bool = True) -> Tensor:
        """(B, S, D) to (B, S, D)."""
        x = x + self.attention(self.norm1(x), causal)
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Further(nn.Module):
    """The hidden states that predict one token further: a block over the shared ones.

    As in Gloeckle et al. 2024; the head is shared.
    """

    def __init__(self, dim: int, heads: int) -> None:
        """``heads`` divides ``dim``."""
        super().__init__()
        self.block = Block(dim, heads)
        self.norm = nn.LayerNorm(dim)

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, S, D) to (B, S, D), normalised."""
        return self.norm(self.block(hidden))


class Discriminator(nn.Module):
    """Scores how much a token looks like the one that follows in the text."""

    def __init__(self, dim: int) -> None:
        """Of hidden states and embeddings of width ``dim``."""
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.inner = nn.Linear(2 * dim, 4 * dim)
        self.score = nn.Linear(4 * dim, 1)

    def forward(self, hidden: Tensor, token: Tensor) -> Tensor:
        """Hidden states and the embeddings of tokens, (B, S, D) each, to (B, S)."""
        both = torch.cat([hidden, self.norm(token)], -1)
        return self.score(F.leaky_relu(self.inner(both), 0.2)).squeeze(-1)


def parameter_count(
    vocab_size: int, seq_len: int, dim: int, layers: int, further: int, is_judged: bool
) -> int:
    """The number of parameters of a `GPT`, without making it."""
    block, norm = 12 * dim * dim + 4 * dim, 2 * dim
    judge = is_judged * (norm + (2 * dim + 1) * 4 * dim + 4 * dim + 1)
    return (vocab_size + seq_len) * dim + layers * block + norm + further * (block + norm) + judge


class GPT(nn.Module):
    """Predicts the next token.

    There are no logits: `llmloss_train.losses` computes the projection by ``head.weight`` and the
    loss together.

    The embedding is tied to the head. With 131,072 tokens, the two hold nearly all parameters:
    tying them halves the memory and the optimiser's time. It also trains the vectors of rare tokens
    at every step, through the head.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        dim: int,
        layers: int,
        heads: int,
        further: int = 0,
        is_judged: bool = False,
    ) -> None:
        """Draws the weights from torch's generator.

        Args:
            vocab_size: V.
            seq_len: The longest sequence.
            dim: D.
            layers: Blocks.
            heads: Of each block; they divide D.
            further: For so many tokens more.
            is_judged: Whether there is a discriminator beside the model.
        """
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, dim)
        self.positions = nn.Embedding(seq_len, dim)
        self.blocks = nn.ModuleList(Block(dim, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab_size, bias=False)
        self.head.weight = self.embedding.weight
        self.further = nn.ModuleList(Further(dim, heads) for _ in range(further))
        self.discriminator = Discriminator(dim) if is_judged else None
        self._initialise(layers + (further > 0))

    def _initialise(self, layers: int) -> None:
        """As in GPT-2: std 0.02, scaled down where 2 * layers branches join the residual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                continue
            joins_residual = name.endswith(("out.weight", "down.weight"))
            nn.init.normal_(parameter, std=0.02 / (2 * layers) ** 0.5 if joins_residual else 0.02)

    def forward(self, ids: Tensor, use: Callable[[Tensor, Tensor], T]) -> T:
        """What ``use`` makes of the hidden states (B, S, D) of ids (B, S) and the head's (V, D).

        A loss is computed in here: where processes share the weights (`llmloss_train.parallel`),
        the head's may be whole during the forward pass only.
        """
        return use(self.hidden(ids), self.head.weight)

    def hidden(self, ids: Tensor, causal: bool = True) -> Tensor:
        """Normalised hidden states (B, S, D) of token ids (B, S)."""
        x = self.embedding(ids) + self.positions(arange(ids.shape[1], device=ids.device))
        for block in self.blocks:
            x = block(x, causal)
        return self.norm(x)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, object]]:
        """Groups for the optimiser: matrices decay; scales and shifts of the norms do not."""
        parameters = list(self.parameters())
        return [
            {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
