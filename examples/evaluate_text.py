"""Evaluation of a text file: perplexity, top-k accuracy, calibration, a ranking of candidates.

    python examples/evaluate_text.py [FILE]

A small byte-level GPT is trained on the first part of the file (by default, of this one) and
evaluated on the rest.
"""

import sys
from pathlib import Path

import torch

from llmloss_ext import linear_cross_entropy, linear_log_probs, linear_token_stats
from llmloss_ext.metrics import CorpusPerplexity, ReliabilityBins, length_normalized_score
from llmloss_train.model import GPT

LENGTH = 64
path = Path(sys.argv[1] if len(sys.argv) > 1 else __file__)
data = torch.tensor(list(path.read_bytes()))
cut = int(0.8 * len(data))
if cut < LENGTH + 1 or len(data) - cut < 2:
    sys.exit(f"{path} is too short: {len(data)} bytes, at least {2 * LENGTH} are needed")

torch.manual_seed(0)
model = GPT(256, LENGTH, dim=64, layers=2, heads=4)
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
for _ in range(150):
    starts = torch.randint(0, cut - LENGTH, (16,))
    tokens = torch.stack([data[s : s + LENGTH] for s in starts.tolist()])
    linear_cross_entropy(model.hidden(tokens), model.head.weight, tokens, shift=1).backward()
    optimizer.step()
    optimizer.zero_grad()

perplexity, reliability, ranks = CorpusPerplexity(), ReliabilityBins(), []
with torch.no_grad():
    for window in data[cut:].split(LENGTH):
        hidden = model.hidden(window.unsqueeze(0))
        stats = linear_token_stats(
            hidden, model.head.weight, window.unsqueeze(0), shift=1, with_rank=True
        )
        perplexity.update(stats.log_prob[:, :-1])  # the last byte of a window predicts nothing
        assert stats.rank is not None  # with_rank
        ranks.append(stats.rank[0, :-1])
        # The likeliest byte's logit is one row of the head: a small product beside that of all.
        best = (hidden * model.head.weight[stats.argmax]).sum(-1)
        confidence = (best - stats.lse).exp()[:, :-1]
        reliability.update(confidence, stats.rank[:, :-1] == 0)
    rank = torch.cat(ranks)
    print(f"{path.name}: perplexity {perplexity.compute():.2f} a byte over {len(rank)} bytes")
    for k in (1, 5, 10):
        print(f"top-{k:<2} accuracy {(rank < k).double().mean().item():.1%}")
    print(f"expected calibration error {reliability.expected_calibration_error().item():.1%}")

    scores = {}
    for candidate in ("import torch", "import zebra", "qqqq"):
        tokens = torch.tensor([list(candidate.encode())])
        log_probs = linear_log_probs(model.hidden(tokens), model.head.weight, tokens, shift=1)
        scores[candidate] = length_normalized_score(log_probs[0, :-1], alpha=1.0).item()
for candidate, score in sorted(scores.items(), key=lambda item: -item[1]):
    print(f"{score:8.3f}  {candidate}")
