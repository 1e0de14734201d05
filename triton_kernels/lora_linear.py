"""`lora_linear` on the kernels of `dropout_linear`: what is new is their arrangement.

    s = D(x) Aᵀ                     mask in the prologue of a product with few columns: x is read once, nothing stored
    dgrad = g W + D(ds A)           mask in the epilogue of the rank-r product, whose residual is the base product
    wgrad = dsᵀ D(x)                mask in the prologue

Bytes beside the base products, 16-bit types: s 2MK, dgrad 4MK (the base's dx in, dx out), wgrad 2MK. Tensor cores
multiply in x's dtype, so float32 factors are rounded to it first (the CPU keeps them); s, ds and wgrad are float32,
and s and ds enter the next product in x's dtype: in float16 they are infinite from 65520 on, as under autocast.
Where nothing is dropped the library's products are used.
"""

import torch
import torch.nn.functional as F
from randfuse import _checks

from . import launch, philox
from .dropout_linear import product, product_wgrad
from .gemm import product_dropout


def _factor(op, name, factor, like, shape, letters):
    _checks.float_tensor(op, name, factor, like=like, dtype=factor.dtype != torch.float32)
    _checks.shape(op, name, factor, shape, letters)
    return launch.unit_stride_matrix(factor.to(like.dtype))


def _undropped(p, p_tensor):
    return p_tensor is None and p == 0


@launch.op(
    "lora_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_a, Tensor lora_b, float scaling, Tensor key, float p,"
    " Tensor? p_tensor, SymInt sample, SymInt row_offset, SymInt col_offset) -> (Tensor, Tensor)"
)
def lora_linear(x, weight, bias, lora_a, lora_b, scaling, key, p, p_tensor, sample, row_offset, col_offset):
    launch.linear("lora_linear", x, weight, bias)
    b = _factor("lora_linear", "lora_b", lora_b, x, (weight.shape[0], lora_a.shape[0]), "(N, r)")
    s = lora_linear_down(x, lora_a, key, p, p_tensor, sample, row_offset, col_offset)
    y = F.linear(launch.unit_stride_matrix(x), weight, bias)
    y.addmm_(_checks.matrix(s).to(x.dtype), b.T, alpha=scaling)
    return y.view(*x.shape[:-1], weight.shape[0]), s


@launch.op(
    "lora_linear_down(Tensor x, Tensor lora_a, Tensor key, float p, Tensor? p_tensor, SymInt sample, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def lora_linear_down(x, lora_a, key, p, p_tensor, sample, row_offset, col_offset):
    launch.floating("lora_linear_down", x=x)
    a = _factor("lora_linear_down", "lora_a", lora_a, x, (lora_a.shape[0], x.shape[-1]), "(r, K)")
    rows, (r, K) = launch.unit_stride_matrix(x), a.shape
    M = rows.shape[0]
    stream = launch.stream("lora_linear_down", key, (M, K), p, p_tensor, row_offset, col_offset, sample, like=x)
    if _undropped(p, p_tensor):
        return F.linear(x, a).float()
    s = x.new_empty((*x.shape[:-1], r), dtype=torch.float32)
    if s.numel() != 0:
        product(rows, a, None, s, None, stream)
    return s


@launch.op(
    "lora_linear_dgrad(Tensor grad, Tensor weight, Tensor ds, Tensor lora_a, Tensor key, float p, Tensor? p_tensor,"
    " SymInt sample, SymInt row_offset, SymInt col_offset) -> Tensor"
)
def lora_linear_dgrad(grad, weight, ds, lora_a, key, p, p_tensor, sample, row_offset, col_offset):
    launch.floating("lora_linear_dgrad", grad=grad, weight=weight)
    _checks.float_tensor("lora_linear_dgrad", "ds", ds, like=grad, dtype=False)
    _checks.shape("lora_linear_dgrad", "ds", ds, (*grad.shape[:-1], lora_a.shape[0]), "(…, r)")
    K = weight.shape[1]
    a = _factor("lora_linear_dgrad", "lora_a", lora_a, grad, (ds.shape[-1], K), "(r, K)")
    base, s = launch.unit_stride_matrix(grad) @ weight, launch.unit_stride_matrix(ds.to(grad.dtype))
    stream = launch.stream("lora_linear_dgrad", key, base.shape, p, p_tensor, row_offset, col_offset, sample, like=grad)
    if _undropped(p, p_tensor):
        base.addmm_(s, a)
    elif base.numel() != 0:
        # Not in place: the tuner runs a kernel more than once.
        out = torch.empty_like(base)
        product_dropout(s, a, False, None, base, out, None, stream, philox.INPUT_DOMAIN, "none")
        base = out
    return base.view(*grad.shape[:-1], K)


@launch.op(
    "lora_linear_wgrad(Tensor ds, Tensor x, Tensor key, float p, Tensor? p_tensor, SymInt sample, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def lora_linear_wgrad(ds, x, key, p, p_tensor, sample, row_offset, col_offset):
    launch.floating("lora_linear_wgrad", x=x)
    _checks.float_tensor("lora_linear_wgrad", "ds", ds, like=x, dtype=False)
    _checks.shape("lora_linear_wgrad", "x", x, (*ds.shape[:-1], x.shape[-1]), "(…, K)")
    g, rows = launch.unit_stride_matrix(ds.to(x.dtype)), launch.unit_stride_matrix(x)
    (M, r), K = g.shape, rows.shape[1]
    stream = launch.stream("lora_linear_wgrad", key, (M, K), p, p_tensor, row_offset, col_offset, sample, like=x)
    if _undropped(p, p_tensor):
        return (g.T @ rows).float()
    if M * r * K == 0:
        return x.new_zeros((r, K), dtype=torch.float32)
    return product_wgrad(g, rows, None, stream, torch.float32)
