"""Every ValueError and TypeError of `speculative_accept` and `speculative_accept_tree`, by its message."""

from __future__ import annotations

import math

import pytest
import randfuse
import torch
from randfuse import _extension, _registry, speculative_accept, speculative_accept_tree

NAN, INF = math.nan, math.inf
FLOATS, IDS, META = torch.ones(4, 3, 5), torch.zeros(4, 2, dtype=torch.int64), torch.device("meta")
PACKED = {"target_logits": torch.ones(9, 5)}
ERRORS = [
    ({"target_logits": [1.0]}, TypeError, "target_logits must be a Tensor, got list"),
    ({"target_logits": torch.ones(4, 3)}, ValueError, r"target_logits must have shape \(B, K\+1, V\) with V in"),
    ({"target_logits": torch.ones(4, 3, 0)}, ValueError, r"target_logits must have shape .* with V in \[1, 2\*\*20\]"),
    ({"target_logits": torch.ones(4, 4, 5)}, ValueError, r"target_logits must have shape .* = \(4, 3, 5\), got"),
    ({"target_logits": torch.ones(4, 3, 5, dtype=torch.int32)}, TypeError, "target_logits must be float32"),
    ({"draft_token_ids": [[1, 2]]}, TypeError, "draft_token_ids must be a Tensor, got list"),
    ({"draft_token_ids": torch.ones(4, 2)}, TypeError, "draft_token_ids must be torch.int64, got torch.float32"),
    ({"draft_token_ids": IDS.to(META)}, ValueError, "draft_token_ids must be on cpu, got meta"),
    ({"draft_token_ids": torch.ones(4, dtype=torch.int64)}, ValueError, r"draft_token_ids must have shape \(B, K\)"),
    ({"draft_logits": 1.0}, TypeError, "draft_logits must be a Tensor, got float"),
    ({"draft_logits": torch.ones(4, 2, 6)}, ValueError, r"draft_logits must have shape \(B, K, V\) = \(4, 2, 5\)"),
    ({"draft_logits": torch.ones(4, 2, 5).half()}, TypeError, "draft_logits must be torch.float32, got torch.float16"),
    ({"draft_logits": torch.ones(4, 2, 5, device=META)}, ValueError, "draft_logits must be on cpu, got meta"),
    ({"mode": "gumbel"}, ValueError, "mode must be 'token', 'block', 'match' or 'typical', got 'gumbel'"),
    ({"temperature": -1.0}, ValueError, r"temperature must be 0 or in .*, got -1.0"),
    ({"temperature": torch.tensor([1.0, 1.0, 2.0**101, 1.0])}, ValueError, r"temperature must be 0 or in .*, got 2.53"),
    ({"temperature": torch.ones(3)}, ValueError, r"temperature must have shape \(\) or \(4,\), got \(3,\)"),
    ({"temperature": torch.ones(4, device=META)}, ValueError, "temperature must be on cpu or the CPU, got meta"),
    ({"temperature": None}, TypeError, "temperature must be a number or a Tensor, got None"),
    ({"temperature": True}, TypeError, "temperature must be a number or a Tensor, got bool"),
    ({"draft_temperature": NAN}, ValueError, "draft_temperature must be 0 or in .*, got nan"),
    ({"top_k": 0}, ValueError, "top_k must be at least 1, got 0"),
    ({"top_k": 1.5}, TypeError, "top_k must be an int or a Tensor, got float"),
    ({"top_k": torch.ones(4)}, TypeError, "top_k must be integer, got torch.float32"),
    ({"top_p": 1.5}, ValueError, r"top_p must be in \[0, 1\], got 1.5"),
    ({"min_p": torch.tensor(-0.5)}, ValueError, r"min_p must be in \[0, 1\], got -0.5"),
    ({"min_p": torch.tensor(1)}, TypeError, "min_p must be floating, got torch.int64"),
    ({"typical_threshold": -1}, ValueError, "typical_threshold must be a number, at least 0, got -1"),
    ({"typical_threshold": INF}, ValueError, "typical_threshold must be a number, at least 0, got inf"),
    ({"typical_alpha": "1"}, ValueError, "typical_alpha must be a number, at least 0, got '1'"),
    ({"typical_alpha": True}, ValueError, "typical_alpha must be a number, at least 0, got True"),
    ({"num_drafts": 2}, TypeError, "num_drafts must be a Tensor, got int"),
    ({"num_drafts": torch.tensor([1, 2, 3, 0])}, ValueError, r"num_drafts must be in \[0, K\] = \[0, 2\], got"),
    ({"num_drafts": torch.tensor([1, 2, -1, 0])}, ValueError, r"num_drafts must be in \[0, K\] = \[0, 2\], got"),
    ({"num_drafts": torch.tensor([1.0] * 4)}, TypeError, "num_drafts must be torch.int64"),
    ({"num_drafts": torch.tensor([1])}, ValueError, r"num_drafts must have shape \(B,\) = \(4,\), got \(1,\)"),
    ({"bitmask": torch.ones(4, 3, 1)}, TypeError, "bitmask must be torch.int32, got torch.float32"),
    ({"bitmask": torch.ones(4, 1, dtype=torch.int32)}, ValueError, r"bitmask must have shape .* = \(4, 3, 1\)"),
    ({"positions": torch.zeros(4)}, TypeError, "positions must be torch.int64, got torch.float32"),
    ({"positions": torch.zeros(3, dtype=torch.int64)}, ValueError, r"positions must have shape \(B,\)"),
    ({"draft_to_target": torch.arange(5)}, ValueError, "draft_to_target must be None without draft_logits"),
    ({"draft_to_target": torch.arange(6), "draft_logits": torch.ones(4, 2, 6)}, ValueError,
     r"draft_to_target must be in \[0, 5\), got ids outside"),
    ({"draft_to_target": torch.ones(5), "draft_logits": FLOATS[:, :2]}, TypeError,
     "draft_to_target must be torch.int64"),
    ({"draft_to_target": torch.ones(5, 1).long(), "draft_logits": FLOATS[:, :2]}, ValueError,
     r"draft_to_target must have one dimension, got \(5, 1\)"),
    ({"draft_logsumexp": torch.ones(4)}, ValueError, r"draft_logsumexp must have shape \(B, K\) = \(4, 2\)"),
    ({"draft_logsumexp": IDS}, TypeError, "draft_logsumexp must be float32, float16, bfloat16 or float64"),
    ({"target_logsumexp": torch.ones(4, 2)}, ValueError, r"target_logsumexp must have shape \(…\) = \(4, 3\)"),
    ({"target_logsumexp": torch.ones(4, 3), "top_k": 1}, ValueError, "target_logsumexp must be None with top_k"),
    ({"key": 5}, TypeError, "key must be an int64 Tensor"),
    ({"key": torch.zeros(4)}, TypeError, "key must be int64, got torch.float32"),
    ({"key": torch.zeros(2, 2, dtype=torch.int64)}, ValueError, r"key must have shape \(\) or \(G,\)"),
    ({"key": torch.zeros(3, dtype=torch.int64)}, ValueError, "key must have a length that divides the 4 rows, got 3"),
    ({"key": torch.zeros(4, dtype=torch.int64), "generator": torch.Generator()}, ValueError,
     "generator must be None when key is given, got both"),
    ({"generator": 7}, TypeError, "generator must be a torch.Generator, got int"),
    ({**PACKED, "cu_num_logits": torch.tensor([0, 1, 2, 8, 9])}, ValueError,
     r"cu_num_logits must rise by 0 … K\+1 = 3 a request within the 9 rows, got"),
    ({**PACKED, "cu_num_logits": torch.tensor([0, 3, 2, 5, 6])}, ValueError, "cu_num_logits must rise by"),
    ({**PACKED, "cu_num_logits": torch.tensor([0, 3, 6, 9, 12])}, ValueError, "cu_num_logits must rise by"),
    ({**PACKED, "cu_num_logits": torch.tensor([-1, 1, 2, 3, 4])}, ValueError, "cu_num_logits must rise by"),
    ({**PACKED, "cu_num_logits": torch.zeros(5)}, TypeError, "cu_num_logits must be torch.int64"),
    ({**PACKED, "cu_num_logits": torch.zeros(4).long()}, ValueError,
     r"cu_num_logits must have shape \(B\+1,\) = \(5,\)"),
    ({"cu_num_logits": torch.zeros(5).long()}, ValueError, r"target_logits must have shape \(rows, V\) with V in"),
    ({**PACKED, "cu_num_logits": torch.zeros(5).long(), "num_drafts": torch.zeros(4).long()}, ValueError,
     "num_drafts must be None with cu_num_logits"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "error", "message"), ERRORS)
def test_errors(device, kwargs, error, message):
    with pytest.raises(error, match=f"^speculative_accept: {message}"):
        speculative_accept(**{"target_logits": FLOATS, "draft_token_ids": IDS, **kwargs})


# What the kernel itself refuses: compiled code and callers of torch.ops do not pass the checks above.
REFUSED = [
    ({"mode": "gumbel"}, ValueError, "mode must be 'token', 'block', 'match' or 'typical', got 'gumbel'"),
    ({"target_logits": torch.ones(4, 3, 5, dtype=torch.int32)}, TypeError, "target_logits must be float32"),
    ({"target_logits": torch.ones(4, 4, 5)}, ValueError, r"target_logits must have shape \(B, K \+ 1, V\)"),
    ({"target_logits": torch.ones(4, 3, 0)}, ValueError, r"target_logits must have V in \[1, 2\*\*20\]"),
    ({"draft_token_ids": torch.ones(4, 2)}, TypeError, "draft_token_ids must be int64"),
    ({"draft_token_ids": torch.ones(4).long()}, ValueError, r"draft_token_ids must have shape \(B, K\)"),
    ({"draft_logits": torch.ones(4, 2, 6)}, ValueError, r"draft_logits must have shape \(B, K, V\) = \(4, 2, 5\)"),
    ({"draft_logits": torch.ones(4, 2, 5).half()}, TypeError, "draft_logits must be "),
    ({"draft_to_target": torch.arange(5)}, ValueError, "draft_to_target must be None without draft_logits"),
    ({"draft_to_target": torch.arange(6), "draft_logits": torch.ones(4, 2, 6)}, ValueError,
     r"draft_to_target must be in \[0, 5\), got 5"),
    ({"draft_to_target": torch.ones(5, 1).long(), "draft_logits": FLOATS[:, :2]}, ValueError,
     "draft_to_target must have one dimension"),
    ({"num_drafts": torch.tensor([1, 2, 3, 0])}, ValueError, r"num_drafts must be in \[0, K\] = \[0, 2\], got 3"),
    ({"num_drafts": torch.tensor([1])}, ValueError, "num_drafts must have shape"),
    ({"positions": torch.zeros(3).long()}, ValueError, "positions must have shape"),
    ({"temperature": torch.tensor(-1.0)}, ValueError, "temperature must be 0 or in"),
    ({"draft_temperature": torch.ones(3)}, ValueError, "draft_temperature must have shape"),
    ({"top_k": torch.tensor(0)}, ValueError, "top_k must be at least 1, got 0"),
    ({"bitmask": torch.ones(4, 3, 1)}, TypeError, "bitmask must be int32"),
    ({"bitmask": torch.ones(4, 1, dtype=torch.int32)}, ValueError, "bitmask must have shape"),
    ({"target_logsumexp": IDS}, TypeError, "target_logsumexp must be floating"),
    ({"draft_logsumexp": torch.ones(4)}, ValueError, "draft_logsumexp must have shape"),
    ({"target_logsumexp": torch.ones(4, 3), "top_k": torch.tensor(1)}, ValueError,
     "target_logsumexp must be None with top_k"),
    ({**PACKED, "cu_num_logits": torch.tensor([0, 1, 2, 8, 9])}, ValueError, "cu_num_logits must rise by 0 .* got 6"),
    ({**PACKED, "cu_num_logits": torch.tensor([0, 3, 6, 9, 12])}, ValueError, r"cu_num_logits must be in \[0, 9\]"),
    ({**PACKED, "cu_num_logits": torch.zeros(5).long(), "num_drafts": torch.zeros(4).long()}, ValueError,
     "num_drafts must be None with cu_num_logits"),
]  # fmt: skip


@pytest.mark.skipif(_extension.problem is not None, reason=str(_extension.problem))
@pytest.mark.parametrize(("kwargs", "error", "message"), REFUSED)
def test_the_kernel_refuses(kwargs, error, message):
    op = _registry.overload("randfuse", "speculative_accept")
    arguments = dict.fromkeys(a.name for a in op._schema.arguments)
    good = {"target_logits": FLOATS, "draft_token_ids": IDS, "key": randfuse.key(0), "temperature": torch.ones(()),
            "mode": "token", "typical_threshold": 0.1, "typical_alpha": 0.3}  # fmt: skip
    with pytest.raises(error, match=f"^speculative_accept: {message}"):
        op(**{**arguments, **good, **kwargs})


TREE_ERRORS = [
    ({"target_logits": 1.0}, TypeError, "target_logits must be a Tensor, got float"),
    ({"target_logits": torch.zeros(1, 3, 5, dtype=torch.int64)}, TypeError, "target_logits must be float32"),
    ({"target_logits": torch.zeros(1, 2, 5)}, ValueError, r"target_logits must have shape \(B, N\+1, V\) with V in"),
    ({"target_logits": torch.zeros(3, 5)}, ValueError, r"target_logits must have shape \(B, N\+1, V\) with V in"),
    ({"target_logits": torch.zeros(1, 3, 0)}, ValueError, r"target_logits must have shape .* V in \[1, 2\*\*20\]"),
    ({"draft_token_ids": [[1]]}, TypeError, "draft_token_ids must be a Tensor, got list"),
    ({"draft_token_ids": torch.zeros(1, 2)}, TypeError, "draft_token_ids must be torch.int64"),
    ({"draft_token_ids": torch.zeros(2).long()}, ValueError, r"draft_token_ids must have shape \(B, N\)"),
    ({"draft_token_ids": torch.zeros(1, 2, device=META).long()}, ValueError, "draft_token_ids must be on cpu"),
    ({"parents": torch.tensor([[1, 0]])}, ValueError, r"parents must be in \[0, n\]"),
    ({"parents": torch.tensor([[0, -1]])}, ValueError, r"parents must be in \[0, n\]"),
    ({"parents": torch.zeros(1, 3).long()}, ValueError, r"parents must have shape \(B, N\)"),
    ({"parents": torch.zeros(1, 2)}, TypeError, "parents must be torch.int64"),
    ({"parents": None}, TypeError, "parents must be a Tensor, got NoneType"),
    ({"temperature": -1.0}, ValueError, "temperature must be 0 or in"),
    ({"temperature": None}, TypeError, "temperature must be a number or a Tensor, got None"),
    ({"top_k": torch.ones(2).long()}, ValueError, r"top_k must have shape \(\) or \(1,\), got \(2,\)"),
    ({"top_p": 2.0}, ValueError, r"top_p must be in \[0, 1\], got 2.0"),
    ({"min_p": "0"}, TypeError, "min_p must be a number or a Tensor, got str"),
    ({"bitmask": torch.zeros(1, 3, 1)}, TypeError, "bitmask must be torch.int32"),
    ({"bitmask": torch.zeros(1, 3, 2).int()}, ValueError, r"bitmask must have shape \(B, N\+1, ⌈V/32⌉\) = \(1, 3, 1\)"),
    ({"positions": torch.zeros(2).long()}, ValueError, r"positions must have shape \(B,\)"),
    ({"positions": torch.zeros(1)}, TypeError, "positions must be torch.int64"),
    ({"key": 5}, TypeError, "key must be an int64 Tensor"),
    ({"key": torch.zeros(2).long()}, ValueError, "key must have a length that divides the 1 rows, got 2"),
    ({"key": torch.zeros(1).long(), "target_logits": torch.zeros(2, 3, 5), "draft_token_ids": torch.zeros(2, 2).long(),
      "parents": torch.zeros(2, 2).long()}, ValueError, r"key must have shape \(\) or \(B,\) = \(2,\), got \(1,\)"),
    ({"key": randfuse.key(0), "generator": torch.Generator()}, ValueError, "generator must be None when key is given"),
    ({"generator": 7}, TypeError, "generator must be a torch.Generator, got int"),
]  # fmt: skip


@pytest.mark.parametrize(("kwargs", "error", "message"), TREE_ERRORS)
def test_errors_of_trees(kwargs, error, message):
    good = {"target_logits": torch.zeros(1, 3, 5), "draft_token_ids": torch.zeros(1, 2).long(),
            "parents": torch.zeros(1, 2).long()}  # fmt: skip
    with pytest.raises(error, match=f"^speculative_accept_tree: {message}"):
        speculative_accept_tree(**{**good, **kwargs})
