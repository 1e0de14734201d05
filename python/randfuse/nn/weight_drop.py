"""`WeightDrop`: recurrent layers with dropped hidden-to-hidden weights."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..keys import draw_key, split
from ..ops.dropconnect_linear import dropconnect
from ._tensor_p import HasP


class WeightDrop(HasP):
    """An `nn.LSTM`, `nn.GRU` or `nn.RNN` whose `weight_hh_*` are dropped in training, by one mask for all time steps.

    Equivalent to: the module with ``F.dropout(weight_hh, p)`` in place of each of its hidden-to-hidden weights

    The wrapped module stays as it is, its parameters those of an optimiser and its cuDNN weights flattened; gradients
    reach the raw weights. In training a twin of it runs on the dropped weights; on a GPU each call copies all weights
    into one buffer, as cuDNN wants them (else it would copy them itself, and warn). `state_dict()` is that of the
    wrapped module: its checkpoints load into this one and the other way round. Its names are therefore not those of
    `named_parameters()`, which begin with "module.". A call takes one key, of which ``split(key,
    n)[i]`` drops the i-th of the n hidden-to-hidden weights in the module's order (layer, direction). A compiled
    graph breaks here, as it does at `nn.LSTM`. `p` may be a 0-d tensor (see `DropoutSchedule`).

    Merity, Keskar and Socher, "Regularizing and Optimizing LSTM Language Models", ICLR 2018.

    >>> rnn = randfuse.nn.WeightDrop(torch.nn.LSTM(4, 8), p=0.5)
    >>> output, (h, c) = rnn(torch.ones(5, 2, 4))
    >>> output.shape
    torch.Size([5, 2, 8])
    """

    def __init__(self, module: nn.RNNBase, p: float | Tensor = 0.5) -> None:
        super().__init__()
        if not isinstance(module, nn.RNNBase):
            raise TypeError(f"WeightDrop: module must be an nn.LSTM, nn.GRU or nn.RNN, got {type(module).__name__}")
        self.module = module
        self._set_p(p)

    def forward(self, input: Any, hx: Any = None, key: Tensor | None = None) -> Any:
        return (self._twin(key) if self._draws else self.module)(input, hx)

    def _twin(self, key: Tensor | None) -> nn.RNNBase:
        """The wrapped module as another object, hooks and all, that reads other weights."""
        names = self.module._flat_weights_names
        raw = {name: getattr(self.module, name) for name in names}
        hidden = [name for name in names if name.startswith("weight_hh")]
        key = draw_key(raw[hidden[0]].device) if key is None else key
        if not isinstance(key, Tensor) or key.dim() != 0:
            raise ValueError(f"WeightDrop: key must be an int64 Tensor of shape (), got {key}")
        dropped = {n: dropconnect(raw[n], self.p, key=k) for n, k in zip(hidden, split(key, len(hidden)), strict=True)}
        twin = object.__new__(type(self.module))
        # A view of each other weight: flattening moves the views to the new buffer and leaves the parameters alone.
        weights = [dropped[name] if name in dropped else raw[name].view_as(raw[name]) for name in names]
        twin.__dict__.update(self.module.__dict__, _flat_weights=weights)
        twin.flatten_parameters()
        return twin

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.module.state_dict(*args, **kwargs)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in [n for n in state_dict if n.startswith(prefix)]:
            state_dict[f"{prefix}module.{name[len(prefix) :]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *args)
