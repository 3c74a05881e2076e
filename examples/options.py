"""Shows each option on one batch of logits, checked against plain torch.

python examples/options.py
"""

import math

import torch
import torch.nn.functional as F

from llmloss_ext import cross_entropy, linear_log_probs, token_stats
from llmloss_ext.losses import (
    LabelSmoothingCrossEntropy,
    UncertaintyWeights,
    check_probabilities,
    confidence_penalty_loss,
    conflict_backward,
    conflict_loss,
    create_causal_mask,
    entropy,
    multi_token_prediction_loss,
    repeated_ngrams,
    select_difficult_tokens,
    sequence_unlikelihood_loss,
    unlikelihood_loss,
)
from llmloss_ext.metrics import token_f1

torch.manual_seed(0)
VOCAB = 50
logits = torch.randn(8, VOCAB + 6)  # a head padded by 6 columns
target = torch.randint(0, VOCAB, (8,))
target[6:] = -100  # padding
rows = logits[:, :VOCAB]


def show(what: str, value: torch.Tensor, expected: torch.Tensor) -> None:
    """Checks a value, and prints it."""
    torch.testing.assert_close(value, expected)
    print(f"{what:<34}{value.item():8.4f}")


plain = F.cross_entropy(rows, target)
show("vocab_size", cross_entropy(logits, target, vocab_size=VOCAB), plain)
smooth = F.cross_entropy(rows, target, label_smoothing=0.1)
show("label smoothing", cross_entropy(rows, target, label_smoothing=0.1), smooth)
show("  as a module", LabelSmoothingCrossEntropy(0.1)(rows, target), smooth)
weight = torch.rand(VOCAB)
show(
    "class weights",
    cross_entropy(rows, target, weight=weight),
    F.cross_entropy(rows, target, weight),
)

each = F.cross_entropy(rows, target, reduction="none")
importance = torch.rand(8)
weighted = (each * importance).sum() / importance[:6].sum()
show("token weights", cross_entropy(rows, target, token_weight=importance), weighted)

stats = token_stats(rows, target)
show(
    "z-loss", cross_entropy(rows, target, z_loss=1e-2), plain + 1e-2 * stats.lse[:6].square().mean()
)
hardness = (1 - stats.log_prob[:6].exp()) ** 2
show("focal", cross_entropy(rows, target, focal_gamma=2.0), (each[:6] * hardness).mean())
capped = F.cross_entropy(5.0 * torch.tanh(0.7 * rows / 5.0), target)
show("softcap, logit_scale", cross_entropy(rows, target, softcap=5.0, logit_scale=0.7), capped)
returned = 5.0 * torch.tanh(rows / 5.0)  # by a model with a softcap; trainers divide that
tempered = F.cross_entropy(returned / 0.7, target)
show("temperature", cross_entropy(rows, target, softcap=5.0, temperature=0.7), tempered)
hidden, head = torch.randn(8, 256).bfloat16(), torch.randn(VOCAB, 256).bfloat16()
exact = torch.log_softmax(hidden.double() @ head.double().t(), -1)[torch.arange(6), target[:6]]
worst = {
    dtype: (linear_log_probs(hidden, head, target, logits_dtype=dtype)[:6] - exact).abs().max()
    for dtype in (None, torch.float32)
}
assert worst[torch.float32] < 1e-4
print(f"{'error of bfloat16 log-probs':<34}{worst[None].item():8.4f}")
print(f"{'  with logits_dtype=float32':<34}{worst[torch.float32].item():8.4f}")
soft = torch.softmax(torch.randn(8, VOCAB), -1)
check_probabilities(soft)  # reads the whole tensor, so the losses do not do it
show("probability targets", cross_entropy(rows, soft), F.cross_entropy(rows, soft))

of_p = entropy(torch.softmax(rows, -1))
show("entropy of a token", stats.entropy[0], of_p[0])
penalised = plain - 0.1 * of_p[:6].mean()
show("confidence penalty", confidence_penalty_loss(rows, target, beta=0.1), penalised)

nothing = torch.full_like(target, -100)
print(f"{'all ignored: mean':<34}{cross_entropy(rows, nothing).item():8.4f}")
show("all ignored: with num_items", cross_entropy(rows, nothing, num_items=6), torch.tensor(0.0))

mask = create_causal_mask(4)
q, k, v = torch.randn(3, 1, 4, 8)
attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
causal = F.scaled_dot_product_attention(q, k, v, is_causal=True)
show("attention with a causal mask", attended.mean(), causal.mean())

learned = UncertaintyWeights(["next", "masked"])  # the weights of two losses, initially 1
show("learned weights", learned({"next": plain, "masked": smooth}).total, plain + smooth)

# Two losses whose gradients conflict: (1, 0) and (-1, 1).
shared = torch.zeros(2, requires_grad=True)
terms = {"one": shared[0] * 1.0, "other": shared[1] - shared[0]}
balanced = conflict_loss(terms, [shared], method="mgda")
show("MGDA's weight of one of two", balanced.weights["one"].float(), torch.tensor(0.6))
conflict_backward(terms, [shared], method="pcgrad")  # fills shared.grad: (1/2, 1/2) + (0, 1)
assert shared.grad is not None
show("PCGrad's gradient", shared.grad[1], torch.tensor(1.5))

hardest = select_difficult_tokens(each, target != -100, fraction=0.5)  # 3 of 6
top = each[:6].topk(3).values.mean()
show("the hardest half of the tokens", cross_entropy(rows, target, token_weight=hardest), top)

text = torch.randint(0, VOCAB, (1, 8))
ahead = [F.cross_entropy(rows[: 8 - k], text[0, k:]) for k in (1, 2)]
two = multi_token_prediction_loss(rows.unsqueeze(0), text, offsets=2, weights=[1.0, 0.3])
show("two tokens ahead", two.loss, ahead[0] + 0.3 * ahead[1])

text = torch.tensor([[7, 8, 7, 8, 9]])
p_rows = torch.softmax(rows[:4], -1)
earlier = [{7} - {8}, {7, 8} - {7}, {7, 8} - {8}, {7, 8} - {9}]
unlikely = [-torch.log1p(-row[list(c)]).sum() for row, c in zip(p_rows, earlier, strict=True)]
show("unlikelihood", unlikelihood_loss(rows[None, :5], text), torch.stack(unlikely).mean())
repeated = repeated_ngrams(text, 2)  # the second 7, 8
assert repeated.tolist() == [[False, False, True, True, False]]
log_p = torch.tensor([[-0.1, -0.2, -0.3, -0.4, -0.5]])
wrong = -torch.log1p(-log_p[:, 2:4].exp()).sum() / 5
show("  of a generated text", sequence_unlikelihood_loss(log_p, repeated), wrong)

prediction, reference = "the cat sat", "the cat sat down"
f1 = token_f1(prediction.split(), reference.split())
assert math.isclose(f1, 6 / 7)
print(f"{'F1 of two texts':<34}{f1:8.4f}")
