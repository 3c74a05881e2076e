"""The modules: parameters, buffers, attributes, and gradients through DistributedDataParallel."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from helpers import assert_close
from linear.problem import D, N, Problem, V
from ranks import same_on_every_rank
from torch import Tensor

from llmloss_ext import cross_entropy
from llmloss_ext.nn import CrossEntropyLoss, LinearCrossEntropyLoss


def test_module_with_tied_embeddings(device):
    embedding = torch.nn.Embedding(V, D, device=device)
    loss = LinearCrossEntropyLoss(D, V, linear_weight=embedding.weight, label_smoothing=0.1)
    assert loss.linear_weight is embedding.weight
    hidden = torch.randn(N, D, device=device)
    target = torch.randint(0, V, (N,), device=device)
    value = loss(hidden, target)
    value.backward()
    expected = cross_entropy(hidden @ embedding.weight.t(), target, label_smoothing=0.1)
    assert_close(value, expected, 1e-5)
    assert embedding.weight.grad is not None
    own = LinearCrossEntropyLoss(D, V, bias=True, device=device)
    assert {name for name, _ in own.named_parameters()} == {"linear_weight", "linear_bias"}
    again = copy.deepcopy(own)
    again.load_state_dict(own.state_dict())
    assert torch.equal(own(hidden, target), again(hidden, target))
    assert "features=16" in repr(own)


def test_module_with_a_borrowed_head_and_an_accumulator(device):
    head = torch.nn.Linear(D, V, device=device)
    loss = LinearCrossEntropyLoss(D, V, linear_weight=head.weight, linear_bias=head.bias)
    assert loss.linear_bias is head.bias
    hidden, target = torch.randn(N, D, device=device), torch.randint(0, V, (N,), device=device)
    main_grad = torch.zeros_like(head.weight)
    value = loss(hidden, target, weight_grad_accumulator=main_grad)
    value.backward()
    assert head.weight.grad is None
    expected = F.cross_entropy(head(hidden), target)
    assert_close(value, expected, 1e-5)
    want = torch.autograd.grad(expected, (head.weight, head.bias))
    assert_close(main_grad, want[0], 1e-5)
    assert_close(head.bias.grad, want[1], 1e-5)


def test_tensors_of_modules_that_are_no_parameters_are_buffers():
    """So they move with the module; those it borrowed stay out of its state dict."""
    scale = torch.tensor(0.5)
    linear_loss = LinearCrossEntropyLoss(
        D, V, linear_weight=torch.randn(V, D), linear_bias=torch.randn(V), logit_scale=scale
    )
    for module in (linear_loss, CrossEntropyLoss(logit_scale=scale)):
        assert set(module.state_dict()) == {"logit_scale"}
        assert module.to(torch.float64).logit_scale.dtype == torch.float64
        assert not list(module.parameters())
    assert linear_loss.linear_weight.dtype == torch.float64
    learned = torch.nn.Parameter(scale)
    for module in (LinearCrossEntropyLoss(D, V, logit_scale=learned),
                   CrossEntropyLoss(logit_scale=learned)):  # fmt: skip
        assert module.logit_scale is learned


def test_attributes_of_the_module():
    loss = LinearCrossEntropyLoss(D, V, reduction="sum", ignore_index=3, label_smoothing=0.1)
    assert (loss.reduction, loss.ignore_index, loss.label_smoothing) == ("sum", 3, 0.1)
    hidden, target = torch.randn(N, D), torch.arange(N)
    loss.reduction = "none"
    assert loss(hidden, target).shape == (N,)
    assert "reduction=none, ignore_index=3, label_smoothing=0.1" in repr(loss)


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [({"label_smoothing": 1.5}, ValueError, "label_smoothing must be between"),
     ({"z_loss": -1.0}, ValueError, "z_loss must be"),
     ({"reduction": "avg"}, ValueError, "not a valid value for reduction"),
     ({"weight": torch.ones(V + 1)}, ValueError, "weight must be"),
     ({"linear_bias": torch.ones(V + 1)}, ValueError, "linear_bias must be"),
     ({"linear_weight": torch.ones(V, D + 1)}, ValueError, "linear_weight must be"),
     ({"linear_bias": torch.ones(V), "bias": True}, ValueError, "linear_bias is one already"),
     ({"smoothing": 0.1}, TypeError, "has no option smoothing")],
)  # fmt: skip
def test_the_modules_constructor_refuses(options, kind, words):
    with pytest.raises(kind, match=words):
        LinearCrossEntropyLoss(D, V, **options)
    if options.keys() & {"label_smoothing", "z_loss", "reduction"}:
        with pytest.raises(kind, match=words):
            CrossEntropyLoss(**options)


class Model(torch.nn.Module):
    """A layer before the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Linear(D, D)
        self.loss = LinearCrossEntropyLoss(D, V, bias=True)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return self.loss(self.body(x), target)


def rank_alone(rank, ranks):
    model = Model()
    group, _ = torch.distributed.new_subgroups(1)
    parallel = torch.nn.parallel.DistributedDataParallel(copy.deepcopy(model), process_group=group)
    problem = Problem("cpu")
    for one in (model, parallel):
        one(problem.hidden, problem.target).backward()
    for (name, p), q in zip(model.named_parameters(), parallel.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad), name


def test_data_parallel(two):
    """The gradients pass through DistributedDataParallel's hooks, whichever backward it is."""
    two.run(rank_alone)


def rank_of_two(rank, ranks):
    """The ranks' tokens differ, and one of them has none for the last loss."""
    for reduction, with_items in (("mean", False), ("none", False), ("mean", True)):
        model = LinearCrossEntropyLoss(D, V, bias=True, reduction=reduction)
        parallel = torch.nn.parallel.DistributedDataParallel(model)
        hidden, target = torch.randn(2, N, D), torch.randint(0, V, (2, N))
        target[1, : N if with_items else 9] = -100
        items = 20 if with_items else None
        parallel(hidden[rank], target[rank], num_items=items).sum().backward()
        alone = copy.deepcopy(model)
        alone.zero_grad()
        for x, y in zip(hidden, target, strict=True):
            (alone(x, y, num_items=items).sum() / 2).backward()
        for p, q in zip(model.parameters(), alone.parameters(), strict=True):
            same_on_every_rank(p.grad)
            assert_close(p.grad, q.grad, 1e-6)
            assert p.grad.abs().sum() > 0


def test_data_parallel_with_two_ranks(two):
    """Each gets the mean of both gradients; a rank without tokens keeps nobody waiting."""
    two.run(rank_of_two)
