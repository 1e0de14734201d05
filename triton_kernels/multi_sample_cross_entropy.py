"""`multi_sample_cross_entropy` and its derivative: a head's logits under S masks never leave the registers.

    forward   z_s = scale * (x masked by s) Wᵀ + b, log-sum-exp and loss terms of the row in the epilogue
    gradient  z_s again, G_s = g / S (Σq softmax(z_s) − q) of the row in the epilogue, in the dtype of x; then the
              two products of multi_sample_linear; as many samples at a time as MOST_LOGITS holds, at least one

Bytes: x once (forward), three times (gradient), 8 bytes a row and sample, and S M C of G; eager moves 7 M K a sample and
direction. Up to MAX_CLASSES one program has all classes of its rows. Heads beyond are bound by their products: one
sample's logits at a time and PyTorch's row operations on them.
"""

import torch
import triton
import triton.language as tl
from randfuse import _checks
from torch import Tensor

from . import launch, philox
from .dropout_linear import dropped_product, product, product_wgrad
from .elementwise import multiple
from .gemm import narrow
from .multi_sample_linear import _samples, sum_dgrads
from .tuning import m_class

MAX_CLASSES = 128
MOST_LOGITS = 2**25  # of a gradient at a time; 64 MiB of bf16


@triton.jit
def target_weights(
    target_ptr, ce_weight_ptr, rows, row_inside, cols, N, ignore_index, smoothing, SOFT: tl.constexpr
):  # fmt: skip
    """q (rows, cols) = ce_weight * ((1 - smoothing) * target + smoothing / N); 0 where ignored, NaN of a wrong class."""
    inside = row_inside[:, None] & (cols < N)[None, :]
    if SOFT:
        t = tl.load(target_ptr + rows[:, None] * N + cols[None, :], mask=inside, other=0.0).to(tl.float32)
        q = (1 - smoothing) * t + smoothing / N
    else:
        label = tl.load(target_ptr + rows, mask=row_inside, other=0)
        q = tl.where(cols[None, :] == label[:, None], 1 - smoothing, 0.0) + smoothing / N
        wrong = (label < 0) | (label >= N)
        q = tl.where(wrong[:, None], float("nan"), q)
    if ce_weight_ptr is not None:
        q *= tl.load(ce_weight_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    if not SOFT:
        q = tl.where((label == ignore_index)[:, None], 0.0, q)
    return tl.where(inside, q, 0.0)


@triton.jit(do_not_specialize=(*launch.UNSPECIALIZED, "ignore_index", "smoothing"))
def multi_sample_cross_entropy_kernel(
    x_ptr, w_ptr, bias_ptr, target_ptr, ce_weight_ptr, lse_ptr, loss_ptr, grad_ptr, g_ptr,
    x_stride: tl.int64, w_stride: tl.int64, M: tl.int64, N: tl.int64, K: tl.int64, m_class, samples,
    ignore_index, smoothing,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    SOFT: tl.constexpr, UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of x (M / samples, K), w (N ≤ BLOCK_N, K): lse and loss terms (samples, M / samples), or, with grad (M / samples,), G.

    The rows of a program are those of sample_rows.
    """
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    N, K = multiple(N, UNIT_N), multiple(K, UNIT_K)
    x_stride, w_stride = multiple(x_stride, UNIT_K), multiple(w_stride, UNIT_K)
    first, offsets = tl.program_id(0).to(tl.int64) * BLOCK_M, tl.arange(0, BLOCK_M)
    cols = tl.arange(0, BLOCK_N)
    row_inside = first + offsets < M
    x_rows, height, sub_stream, places = philox.sample_rows(first, offsets, M, samples, sample)
    key, i = philox.stream_rows(key_ptr, x_rows, height, rows_per_key, row_offset)
    z = scale * dropped_product(
        x_ptr, w_ptr, x_stride, w_stride, N, K, x_rows, row_inside, cols, key, i, sub_stream, block_offset, shift,
        threshold, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)[None, :]
    q = target_weights(target_ptr, ce_weight_ptr, x_rows, row_inside, cols, N, ignore_index, smoothing, SOFT)
    if g_ptr is None:
        of_classes = tl.where((cols < N)[None, :], z, float("-inf"))
        top = tl.max(of_classes, 1)
        log_sum = tl.log(tl.sum(tl.exp(of_classes - top[:, None]), 1))
        tl.store(lse_ptr + places, top + log_sum, mask=row_inside)
        # Distances from the largest logit first: large logits that are nearly equal lose no digits.
        terms = tl.where(q != 0, q * (log_sum[:, None] + (top[:, None] - z)), 0.0)
        tl.store(loss_ptr + places, tl.sum(terms, 1), mask=row_inside)
    else:
        lse = tl.load(lse_ptr + places, mask=row_inside, other=0.0)
        grad = tl.load(grad_ptr + x_rows, mask=row_inside, other=0.0) / samples
        dz = (tl.sum(q, 1)[:, None] * tl.exp(z - lse[:, None]) - q) * grad[:, None]
        counts = tl.max((q != 0).to(tl.int32), 1) > 0
        g = narrow(tl.where(counts[:, None], dz, 0.0), g_ptr.dtype.element_ty)
        tl.store(g_ptr + places[:, None] * N + cols[None, :], g, mask=row_inside[:, None] & (cols < N)[None, :])


class _Head:
    """The arguments of both ops, checked, and what both do with them."""

    def __init__(
        self, op, x, weight, bias, target, ce_weight, key, samples, p, p_tensor, ignore_index, smoothing, *place
    ):
        launch.linear(op, x, weight, bias)
        _samples(op, samples)
        if not 0.0 <= smoothing <= 1.0:
            raise ValueError(f"{op}: label_smoothing must be in [0, 1], got {smoothing}")
        classes = weight.shape[0]
        self.soft = target.is_floating_point()
        if not self.soft and target.dtype != torch.int64:
            raise TypeError(f"{op}: target must be an int64 or floating Tensor, got {target.dtype}")
        shape = (*x.shape[:-1], classes) if self.soft else tuple(x.shape[:-1])
        _checks.shape(op, "target", target, shape, "(…, C)" if self.soft else "(…)")
        if self.soft and ignore_index >= 0:
            raise ValueError(f"{op}: ignore_index must be negative for floating targets, got {ignore_index}")
        if ce_weight is not None:
            _checks.float_tensor(op, "ce_weight", ce_weight, like=x, dtype=False)
            _checks.shape(op, "ce_weight", ce_weight, (classes,), "(C,)")
        self.x, self.weight = launch.unit_stride_matrix(x), launch.unit_stride_matrix(weight)
        self.bias = None if bias is None else bias.contiguous()
        self.target = target.reshape(-1, classes).contiguous() if self.soft else target.reshape(-1).contiguous()
        self.ce_weight = None if ce_weight is None else ce_weight.contiguous()
        self.samples, self.ignore_index, self.smoothing = samples, ignore_index, smoothing
        self.stream = launch.stream(op, key, self.x.shape, p, p_tensor, *place, like=x)

    def rows(self, lse, loss, grad, g, stream):
        """Launch the kernel on (samples, rows) of lse and loss, or of lse and g, given grad (rows,) of their mean."""
        (M, K), N, samples = self.x.shape, self.weight.shape[0], lse.shape[0]
        height, single = M * samples, self.x.dtype == torch.float32
        block_m, block_k = (32, 32) if single else (64, 64)
        block_n = max(16, triton.next_power_of_2(N))
        multi_sample_cross_entropy_kernel[(triton.cdiv(height, block_m),)](
            self.x, self.weight, self.bias, self.target, self.ce_weight, lse, loss, grad, g,
            self.x.stride(0), self.weight.stride(0), height, N, K, m_class(height), samples,
            self.ignore_index, self.smoothing, **stream, SOFT=self.soft,
            UNIT_N=launch.unit(N), UNIT_K=launch.unit(K, self.x.stride(0), self.weight.stride(0)),
            BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=8 if block_n > 64 else 4, num_stages=3,
        )  # fmt: skip

    def logits(self, s):
        """Of one sample, fp32 (rows, classes)."""
        z = self.x.new_empty((self.x.shape[0], self.weight.shape[0]), dtype=torch.float32)
        product(self.x, self.weight, self.bias, z, None, {**self.stream, "sample": s})
        return z

    def labels(self):
        """(ignored, wrong, labels inside the classes) of the rows; PyTorch would assert on the device, which ends all."""
        last = self.weight.shape[0] - 1
        ignored = self.target == self.ignore_index
        return ignored, ~ignored & ((self.target < 0) | (self.target > last)), self.target.clamp(0, last)

    def class_weights(self):
        """(weight, floor) of the classes: what a target counts, and what smoothing gives each (C,)."""
        classes = self.weight.shape[0]
        weight = self.x.new_ones(classes, dtype=torch.float32) if self.ce_weight is None else self.ce_weight.float()
        return weight, weight * (self.smoothing / classes)

    def cross_entropy(self, z):
        """Loss terms of one sample's logits; a class of no weight adds nothing, were its logit infinite."""
        weight, floor = self.class_weights()
        terms = lambda q, log_p: torch.where(q != 0, -q * log_p, 0.0)  # noqa: E731
        log_p = z.log_softmax(-1)
        if self.soft:
            return terms(weight * (1 - self.smoothing) * self.target.float() + floor, log_p).sum(-1)
        ignored, wrong, labels = self.labels()
        loss = terms((1 - self.smoothing) * weight[labels], log_p.gather(1, labels[:, None]).squeeze(1))
        if self.smoothing > 0:
            loss += terms(floor, log_p).sum(-1)
        return loss.masked_fill(ignored, 0.0).masked_fill(wrong, torch.nan)

    def cross_entropy_grad(self, z, lse, grad):
        """Their gradient, in place of one sample's logits: Σq softmax(z) − q, times grad; 0 in a row of no weight."""
        weight, floor = self.class_weights()
        grad = grad[:, None] / self.samples
        z.sub_(lse[:, None]).exp_()
        if self.soft:
            q = weight * (1 - self.smoothing) * self.target.float() + floor
            return z.mul_(q.sum(-1, keepdim=True)).sub_(q).mul_(grad).masked_fill_((q == 0).all(-1, keepdim=True), 0.0)
        ignored, wrong, labels = (t[:, None] for t in self.labels())
        peak = (1 - self.smoothing) * weight[labels]
        z.mul_(peak + floor.sum()).sub_(floor).scatter_add_(1, labels, -peak)
        nothing = ignored | ((peak == 0) & (floor == 0).all())
        return z.mul_(grad).masked_fill_(nothing, 0.0).masked_fill_(wrong, torch.nan)


@launch.op(
    "multi_sample_cross_entropy(Tensor x, Tensor weight, Tensor? bias, Tensor target, Tensor? ce_weight, Tensor key,"
    " int num_samples, float p, Tensor? p_tensor, int ignore_index, float label_smoothing, SymInt row_offset,"
    " SymInt col_offset) -> (Tensor, Tensor)"
)
def multi_sample_cross_entropy(x, weight, bias, target, ce_weight, key, num_samples, *rest):
    head = _Head("multi_sample_cross_entropy", x, weight, bias, target, ce_weight, key, num_samples, *rest)
    M, shape = head.x.shape[0], x.shape[:-1]
    lse = x.new_empty((num_samples, M), dtype=torch.float32)
    loss = torch.zeros_like(lse)
    if M > 0 and 0 < weight.shape[0] <= MAX_CLASSES:
        head.rows(lse, loss, None, None, head.stream)
    elif M > 0:
        for s in range(num_samples):
            z = head.logits(s)
            lse[s], loss[s] = z.logsumexp(-1), head.cross_entropy(z)
    return loss.mean(0).view(shape), lse.view(num_samples, *shape)


@launch.op(
    "multi_sample_cross_entropy_grad(Tensor grad, Tensor logsumexp, Tensor x, Tensor weight, Tensor? bias, Tensor target,"
    " Tensor? ce_weight, Tensor key, float p, Tensor? p_tensor, int ignore_index, float label_smoothing,"
    " SymInt row_offset, SymInt col_offset, bool[3] output_mask) -> (Tensor, Tensor, Tensor)"
)
def multi_sample_cross_entropy_grad(grad, logsumexp, x, weight, bias, target, ce_weight, key, *rest):
    *rest, wanted = rest
    op = "multi_sample_cross_entropy_grad"
    if logsumexp.dim() != x.dim():
        raise ValueError(f"{op}: logsumexp must have shape (M, …), got {tuple(logsumexp.shape)}")
    samples = logsumexp.shape[0]
    head = _Head(op, x, weight, bias, target, ce_weight, key, samples, *rest)
    _checks.shape(op, "grad", grad, tuple(x.shape[:-1]), "(…)")
    _checks.shape(op, "logsumexp", logsumexp, (samples, *x.shape[:-1]), "(M, …)")
    for name, tensor in (("grad", grad), ("logsumexp", logsumexp)):
        if tensor.dtype != torch.float32:
            raise TypeError(f"{op}: {name} must be float32, got {tensor.dtype}")
    (M, K), N = head.x.shape, weight.shape[0]
    shapes = x.shape, weight.shape, (N,)
    if M * N * K == 0 or N > MAX_CLASSES or samples * M * N > MOST_LOGITS:
        return _grad_in_pieces(head, grad.reshape(-1), logsumexp.reshape(samples, M), shapes, wanted)
    g = x.new_empty((samples * M, N))
    head.rows(logsumexp.reshape(samples, M).contiguous(), None, grad.reshape(-1).contiguous(), g, head.stream)
    dx, dw, db = (x.new_empty(0) for _ in range(3))
    if wanted[0]:
        dx = x.new_empty(x.shape)
        sum_dgrads(g, head.weight, dx.view(M, K), samples, head.stream)
    if wanted[1]:
        dw = product_wgrad(g, head.x, samples, head.stream, g.dtype)
    if wanted[2]:
        db = g.sum(0)
    return dx, dw, db


def _grad_in_pieces(head: _Head, grad: Tensor, lse: Tensor, shapes, wanted):
    """Some samples after others: their logits' gradient, its two products; summed in fp32."""
    sums = [head.x.new_zeros(s if want else (0,), dtype=torch.float32) for s, want in zip(shapes, wanted, strict=True)]
    dx, dw, db = sums
    (M, K), N = head.x.shape, head.weight.shape[0]
    narrow_head = K > 0 and N <= MAX_CLASSES
    at_once = max(1, MOST_LOGITS // (M * N)) if narrow_head and M * N else 1
    for s in range(0, head.samples if M * N else 0, at_once):
        stream, part = {**head.stream, "sample": s}, lse[s : s + at_once].contiguous()
        if narrow_head:
            g = head.x.new_empty((len(part) * M, N))
            head.rows(part, None, grad * (len(part) / head.samples), g, stream)
        else:
            g = head.cross_entropy_grad(head.logits(s), part[0], grad)
        if wanted[2]:
            db += g.sum(0, dtype=torch.float32)
        g = g.to(head.x.dtype)
        if wanted[0] and K:
            products = torch.empty((M, K), dtype=torch.float32, device=g.device)
            sum_dgrads(g, head.weight, products, len(part), stream)
            dx += products.view(dx.shape)
        if wanted[1] and K:
            dw += product_wgrad(g, head.x, len(part) if narrow_head else None, stream, torch.float32)
    return tuple(t.to(head.x.dtype) for t in sums)
