"""What a model does around its output layer, found by a call that computes nothing else.

The layer and all that comes before it are replaced for the length of one call of the model's
forward: the layer by one that returns chosen logits, the loss function by one that notes what it is
given. No weight is read and no hook of the replaced modules runs, so the model may be sharded, on
the meta device, or on its way into a wrapper.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

__all__ = ["AroundTheLayer", "examined"]

_TOKENS = 3
_IGNORED = -100


class AroundTheLayer(NamedTuple):
    """What the logits and labels of a model become.

    Attributes:
        logit_scale: What the layer's outputs are multiplied by.
        softcap: Which softcap they get after that; 0: none.
        shift: 1 if a position predicts the next label, 0 if its own.
    """

    logit_scale: float
    softcap: float
    shift: int


def examined(
    model: Any, head: Any, columns: int, losses: Sequence[Callable[..., Tensor]]
) -> AroundTheLayer:
    """Calls the model's forward without its layers.

    Args:
        model: It calls its ``loss_function(logits, labels, vocab_size, ...)``.
        head: Its output layer, with whatever is wrapped around it.
        columns: The number of its logits.
        losses: Functions (logits, target) that the model's loss may be, each the mean over targets
            that stand where their logits do.

    Raises:
        ValueError: The model does something else to its logits or labels, by name.
    """
    kind = type(model).__name__
    shift = _shift_of(kind, model.loss_function, losses)
    device = next((p.device for p in head.parameters()), torch.device("cpu"))
    probe = _probe(columns).to("cpu" if device.type == "meta" else device)
    calls = [_call(model, head, factor * probe) for factor in (1, 2)]
    if not torch.equal(calls[0].added, calls[1].added):
        raise ValueError(f"{kind} adds terms of its logits to its loss; use causal_lm_loss")
    return AroundTheLayer(*_transform_of(kind, probe, calls[0].logits), shift)


class _Call(NamedTuple):
    """What a call has shown."""

    logits: Tensor
    added: Tensor
    """What the model adds to its loss."""


def _probe(columns: int) -> Tensor:
    """(1, tokens, columns): from far below any softcap to far above, 1 among them."""
    sizes = 2.0 ** torch.arange(-12, 21)
    every = torch.cat([sizes, -sizes, sizes.new_zeros(1)])
    return every[torch.arange(_TOKENS * columns) % len(every)].reshape(1, _TOKENS, columns)


def _call(model: Any, head: Any, returned: Tensor) -> _Call:
    kind, given = type(model).__name__, []
    labels = torch.ones(1, _TOKENS, dtype=torch.long, device=returned.device)

    def loss_function(*args: Any, **kwargs: Any) -> Tensor:
        named = dict(zip(("logits", "labels", "vocab_size"), args, strict=False)) | kwargs
        given.append(named)
        return torch.zeros((), device=returned.device)

    arguments: dict[str, Any] = {"input_ids": torch.ones_like(labels), "labels": labels}
    known = inspect.signature(type(model).forward).parameters
    for name, parameter in list(known.items())[1:]:
        if name in ("use_cache", "output_router_logits"):
            arguments[name] = False
        elif parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD:
            arguments.setdefault(name, None)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(_replaced_modules(model, head, returned))
        stack.enter_context(_replaced_loss(model, loss_function))
        try:
            output = type(model).forward(model, **arguments)
        except Exception as error:
            raise ValueError(
                f"{kind} cannot be examined for what it does to its logits "
                f"({type(error).__name__}: {error}); use causal_lm_loss"
            ) from error
    if len(given) != 1:
        raise ValueError(f"{kind} does not call its loss_function once; use causal_lm_loss")
    (call,) = given
    logits, theirs = call.get("logits"), call.get("labels")
    loss = output[0] if isinstance(output, tuple) else output.loss
    if not isinstance(logits, Tensor) or logits.shape != returned.shape:
        raise ValueError(f"{kind} does not give all its logits to its loss; use causal_lm_loss")
    if not isinstance(theirs, Tensor) or not torch.equal(theirs, labels):
        raise ValueError(f"{kind} does not give its labels to its loss as they are")
    return _Call(logits.float(), loss.float())


def _transform_of(kind: str, x: Tensor, y: Tensor) -> tuple[float, float]:
    """The scale and the softcap that make y of x."""
    scale = float(y[x == 1][0])
    if torch.equal(y, x * scale):
        return scale, 0.0
    least, cap = x[x > 0].min(), float(y.abs().max())
    scale = float(y[x == least][0] / least)
    scale = 1.0 if abs(scale - 1) < 1e-5 else scale
    if not torch.allclose(y, cap * torch.tanh(x * (scale / cap)), rtol=1e-2, atol=0):
        raise ValueError(
            f"{kind} does more to its logits than a scale and a softcap; use causal_lm_loss"
        )
    return scale, cap


def _shift_of(
    kind: str, loss_function: Callable[..., Tensor], losses: Sequence[Callable[..., Tensor]]
) -> int:
    """How many positions a model's loss_function moves the labels: found by its values."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(1, 5, 7, generator=generator)
    labels = torch.tensor([[1, 2, _IGNORED, 4, 5]])
    try:
        theirs = [
            loss_function(logits, labels, 7),
            loss_function(logits, labels, 7, num_items_in_batch=2),
        ]
    except Exception:  # of another kind of model, which takes other arguments
        theirs = []
    for shift in (1, 0) if theirs else ():
        target = torch.nn.functional.pad(labels[:, shift:], (0, shift), value=_IGNORED)
        for loss in losses:
            ours = [loss(logits, target), loss(logits, target, num_items=2)]
            if all(torch.allclose(a.float(), b.float()) for a, b in zip(theirs, ours, strict=True)):
                return shift
    name = getattr(loss_function, "__name__", type(loss_function).__name__)
    raise ValueError(
        f"{kind} computes its loss by {name}, which is not the mean cross entropy of its labels"
    )


class _Before(nn.Module):
    """Stands where another module stood: passes on what it is given, or makes up an output.

    What it is given of the logits' shape comes after the layer, and is the original's to change.
    """

    def __init__(self, original: Any, hidden: Tensor, logits: torch.Size) -> None:
        super().__init__()
        self.__dict__["_original"], self.__dict__["_hidden"] = original, hidden
        self.__dict__["_logits"] = logits

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def __getitem__(self, index: Any) -> Any:
        return self._original[index]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if len(args) == 1 and not kwargs and isinstance(args[0], Tensor):
            is_after = args[0].shape == self._logits  # a softcap that is a module
            return self._original(*args) if is_after else args[0]  # a norm, a dropout
        return _Output(self._hidden)


class _Output:
    """A base model's: hidden states, and None for all else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)

    def __getitem__(self, index: Any) -> Any:
        return (self.last_hidden_state,)[index]

    def __len__(self) -> int:
        return 1

    def __iter__(self) -> Iterator[Tensor]:
        return iter((self.last_hidden_state,))

    def get(self, name: str, default: Any = None) -> Any:
        return getattr(self, name, None) or default


class _Layer(nn.Module):
    """Stands where the output layer stood."""

    def __init__(self, original: Any, returned: Tensor) -> None:
        super().__init__()
        self.__dict__["_original"], self.__dict__["_returned"] = original, returned

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)

    def forward(self, hidden: Tensor) -> Tensor:
        return self._returned[:, -hidden.shape[1] :].clone()  # which may be changed in place


@contextmanager
def _replaced_modules(model: Any, head: Any, returned: Tensor) -> Iterator[None]:
    """The output layer, and all modules that are not on the way to it."""
    hidden = returned.new_zeros(1, _TOKENS, getattr(head, "in_features", None) or 1)
    path = next((name for name, module in model.named_modules() if module is head), None)
    if path is None:
        raise ValueError(f"the output layer of {type(model).__name__} is none of its modules")
    *way, last = path.split(".")
    replaced: list[tuple[Any, str, Any]] = []
    module = model
    for name in (*way, last):
        for child, original in module._modules.items():
            if original is not None and child != name:
                replaced.append((module, child, _Before(original, hidden, returned.shape)))
        parent, module = module, module._modules[name]
    replaced.append((parent, last, _Layer(head, returned)))
    originals = [(module, name, module._modules[name]) for module, name, _ in replaced]
    try:
        for parent, name, stub in replaced:
            parent._modules[name] = stub
        yield
    finally:
        for parent, name, original in originals:
            parent._modules[name] = original


@contextmanager
def _replaced_loss(model: Any, loss_function: Callable[..., Tensor]) -> Iterator[None]:
    own = vars(model)
    had, before = "_loss_function" in own, own.get("_loss_function")
    model.loss_function = loss_function
    try:
        yield
    finally:
        del model._loss_function
        if had:
            model._loss_function = before
