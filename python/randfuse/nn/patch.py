"""`patch`: the layers of a model replaced by those of this package."""

from __future__ import annotations

from torch import nn

from .dropout import Dropout
from .dropout_linear import DropoutLinear
from .linear_dropout import LinearDropout

_ACTIVATIONS = {nn.ReLU: "relu", nn.SiLU: "silu", nn.GELU: "gelu"}


def patch(model: nn.Module) -> dict[str, str]:
    """Replace `nn.Dropout` in a model, in place, together with the `nn.Linear` beside it where the order is known.

    Inside an `nn.Sequential`, ``Dropout, Linear`` becomes `DropoutLinear`, and ``Linear, [ReLU | SiLU | GELU,]
    Dropout`` becomes `LinearDropout`, at the place of the linear layer; `nn.Identity` stands where the others were.
    Elsewhere `nn.Dropout` becomes `randfuse.nn.Dropout`. Parameters are the same objects and the `state_dict` has the
    same keys: optimisers and checkpoints do not notice. Eval mode computes what it did.

    Left alone: subclasses, ``inplace=True`` (the caller's tensor would no longer change), modules with hooks, dropout
    that is no module (`F.dropout`, attention, `nn.LSTM`), and `model` itself.

    Returns:
        The name of each replaced module and the class it has now.

    >>> model = torch.nn.Sequential(torch.nn.Linear(8, 4), torch.nn.GELU(), torch.nn.Dropout(0.1))
    >>> randfuse.patch(model)
    {'0': 'LinearDropout', '1': 'Identity', '2': 'Identity'}
    """
    replaced: dict[str, str] = {}
    dropouts: dict[nn.Module, Dropout] = {}  # a module used at several places stays one
    for name, parent in list(model.named_modules()):
        fused = _fused(list(parent)) if type(parent) is nn.Sequential else {}
        for i, (child_name, child) in enumerate(list(parent._modules.items())):
            new = fused.get(i)
            if new is None and child is not None and _plain_dropout(child):
                new = dropouts.setdefault(child, Dropout(child.p).train(child.training))
            if new is not None:
                setattr(parent, child_name, new)
                replaced[f"{name}.{child_name}".lstrip(".")] = type(new).__name__
    return replaced


def _fused(layers: list[nn.Module]) -> dict[int, nn.Module]:
    """What takes the place of each layer of a sequence that is part of a known pattern."""
    fused: dict[int, nn.Module] = {}
    for i, linear in enumerate(layers):
        if type(linear) is not nn.Linear or _hooked(linear):
            continue
        after = layers[i + 1 :]
        activation = _activation(after[0]) if after else None
        if activation is not None:
            after = after[1:]
        if after and _plain_dropout(after[0]):
            new: DropoutLinear | LinearDropout = LinearDropout(1, 1, p=after[0].p, activation=activation, device="meta")
            stop = i + 2 + (activation is not None)
            first = i
        elif i and i - 1 not in fused and _plain_dropout(layers[i - 1]):
            new = DropoutLinear(1, 1, p=layers[i - 1].p, device="meta")
            first, stop = i - 1, i + 1
        else:
            continue
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        fused.update({j: nn.Identity().train(layers[j].training) for j in range(first, stop)})
        fused[i] = new.train(linear.training)
    return fused


def _plain_dropout(module: nn.Module) -> bool:
    return type(module) is nn.Dropout and not module.inplace and not _hooked(module)


def _activation(module: nn.Module) -> str | None:
    if _hooked(module) or getattr(module, "inplace", False) or getattr(module, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _hooked(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
