"""`patch`: the layers of a model replaced by those of this package."""

from __future__ import annotations

from typing import TypeGuard

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
    same keys: optimisers and checkpoints do not notice. Eval mode computes what it did. Code that looks for
    `nn.Dropout` no longer finds it.

    Left alone: subclasses, ``inplace=True`` (the caller's tensor would no longer change), modules with hooks or a
    `forward` of their own, dropout that is no module (`F.dropout`, attention, `nn.LSTM`), and `model` itself.

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
            if new is None and _plain_dropout(child):
                new = dropouts.setdefault(child, Dropout(child.p).train(child.training))
            if new is not None:
                setattr(parent, child_name, new)
                replaced[f"{name}.{child_name}".lstrip(".")] = type(new).__name__
    return replaced


def _fused(layers: list[nn.Module]) -> dict[int, nn.Module]:
    """What takes the place of each layer of a sequence that is part of a known pattern."""
    fused: dict[int, nn.Module] = {}
    for i, linear in enumerate(layers):
        if type(linear) is not nn.Linear or _altered(linear):
            continue
        activation = _activation(layers[i + 1]) if i + 1 < len(layers) else None
        after = i + 1 if activation is None else i + 2
        behind = layers[after] if after < len(layers) else None
        before = layers[i - 1] if i and i - 1 not in fused else None
        if _plain_dropout(behind):
            first, stop, drop = i, after + 1, behind
            new: nn.Linear = LinearDropout(1, 1, p=drop.p, activation=activation, device="meta")
        elif _plain_dropout(before):
            first, stop, drop = i - 1, i + 1, before
            new = DropoutLinear(1, 1, p=drop.p, device="meta")
        else:
            continue
        new.in_features, new.out_features = linear.in_features, linear.out_features
        new.weight, new.bias = linear.weight, linear.bias
        fused.update({j: nn.Identity().train(layers[j].training) for j in range(first, stop)})
        fused[i] = new.train(drop.training)
    return fused


def _plain_dropout(module: nn.Module | None) -> TypeGuard[nn.Dropout]:
    return type(module) is nn.Dropout and not module.inplace and not _altered(module)


def _activation(module: nn.Module) -> str | None:
    if _altered(module) or getattr(module, "inplace", False) or getattr(module, "approximate", "none") != "none":
        return None
    return _ACTIVATIONS.get(type(module))


def _altered(module: nn.Module) -> bool:
    """Whether a module does more than its class says: hooks, or a `forward` of its own."""
    hooks = ("forward", "forward_pre", "backward", "backward_pre", "state_dict", "load_state_dict_pre")
    return "forward" in vars(module) or any(getattr(module, f"_{hook}_hooks") for hook in hooks)
