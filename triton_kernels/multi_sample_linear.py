"""`multi_sample_linear` and its two gradients: a head under S masks of its input.

    y_s   = scale * (x masked by s) Wᵀ + bias      dropout_linear's kernel on S rows for each row of x, from the cache
    dgrad = scale * Σ_s mask_s * (g_s W)           S small products in turn, masked and summed in registers, one store
    wgrad = scale * Σ_s g_sᵀ (x masked by s)       dropout_linear's kernel, the sum running over rows and samples

Bytes: x once (forward, wgrad), dx once (dgrad), no masks and no copies; work: 2 S M N K flops and S M K / 8 Philox calls a tile
column, which bound a narrow head. Samples with weights of their own are products of their own.
"""

import triton
import triton.language as tl
from randfuse import _checks

from . import launch, philox
from .dropout_linear import product, product_wgrad
from .elementwise import multiple
from .gemm import dot, narrow, tile_of_program
from .tuning import grid, m_class, smallest


@smallest
@triton.jit(do_not_specialize=launch.UNSPECIALIZED)
def multi_sample_dgrad_kernel(
    g_ptr, w_ptr, y_ptr, g_stride: tl.int64, w_stride: tl.int64, w_sample_stride: tl.int64,
    M: tl.int64, N: tl.int64, K: tl.int64, m_class, samples,
    key_ptr, p_ptr, threshold, scale, rows_per_key, row_offset, block_offset, shift, sample,
    UNIT_N: tl.constexpr, UNIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """g (samples, M, N), w (N, K) or, with a stride, (samples, N, K) -> y (M, K). N is summed by BLOCK_K."""
    threshold, scale = philox.drop_rate(p_ptr, threshold, scale)
    N, K, g_stride = multiple(N, UNIT_N), multiple(K, UNIT_K), multiple(g_stride, UNIT_N)
    w_stride, w_sample_stride = multiple(w_stride, UNIT_K), multiple(w_sample_stride, UNIT_K)
    tile_m, tile_k = tile_of_program(tl.cdiv(M, BLOCK_M), tl.cdiv(K + shift, BLOCK_N), GROUP_M)
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tile_k * BLOCK_N - shift + tl.arange(0, BLOCK_N)
    row_inside, k_inside = (rows < M)[:, None], ((k >= 0) & (k < K))[None, :]
    key, i = philox.stream_rows(key_ptr, rows, M, rows_per_key, row_offset)
    block = block_offset + tile_k * (BLOCK_N // 8)
    total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for s in range(0, samples):
        acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for start in range(0, N, BLOCK_K):
            n = start + tl.arange(0, BLOCK_K)
            g_place, w_place = (s * M + rows)[:, None] * g_stride + n[None, :], n[:, None] * w_stride + k[None, :]
            g = tl.load(g_ptr + g_place, mask=row_inside & (n < N)[None, :], other=0.0)  # (BLOCK_M, BLOCK_K)
            w = tl.load(w_ptr + s * w_sample_stride + w_place, mask=k_inside & (n < N)[:, None], other=0.0)
            acc = dot(g, w, acc)
        keep = philox.keep_tile(key, i, block, sample + s, philox.INPUT_DOMAIN, threshold, BLOCK_N)
        total += tl.where(keep, acc, 0.0)
    y = narrow(total * scale, y_ptr.dtype.element_ty)
    tl.store(y_ptr + rows[:, None] * K + k[None, :], y, mask=row_inside & k_inside)


def sum_dgrads(g, w, y, samples, stream):
    """Launch the kernel; g (samples · M, N), w (N, K) or (samples, N, K), rows with unit stride."""
    M, K = y.shape
    strides = g.stride(0), w.stride(-2), w.stride(0) if w.dim() == 3 else 0
    multi_sample_dgrad_kernel[grid(M, K + stream["shift"])](
        g, w, y, *strides, M, w.shape[-2], K, m_class(M), samples, **stream,
        UNIT_N=launch.unit(w.shape[-2], strides[0]), UNIT_K=launch.unit(K, *strides[1:]),
    )  # fmt: skip


def _samples(op, num_samples, most=2**32 - 1):
    if not 1 <= num_samples <= most:
        raise ValueError(f"{op}: num_samples must be in [1, {most}], got {num_samples}")


def _grad(op, grad, **others):
    """grad (M, …, N) with at least one sample, and what goes with it."""
    launch.floating(op, grad=grad, **others)
    if grad.dim() < 2:
        raise ValueError(f"{op}: grad must have shape (M, …, N), got {tuple(grad.shape)}")
    _samples(op, grad.shape[0])


def _weight_rows(weight):
    """A weight (…, K) whose rows have unit stride and follow one another evenly within a sample."""
    return weight if weight.stride(-1) == 1 or weight.shape[-1] <= 1 else weight.contiguous()


@launch.op(
    "multi_sample_linear(Tensor x, Tensor weight, Tensor? bias, Tensor key, int num_samples, float p, Tensor? p_tensor,"
    " SymInt row_offset, SymInt col_offset) -> Tensor"
)
def multi_sample_linear(x, weight, bias, key, num_samples, p, p_tensor, row_offset, col_offset):
    op = "multi_sample_linear"
    _samples(op, num_samples)
    own = weight.dim() == 3
    if own:
        launch.floating(op, x=x, weight=weight, bias=bias)
        launch.at_least_one_dimension(op, x=x)
        N = weight.shape[1]
        _checks.shape(op, "weight", weight, (num_samples, N, x.shape[-1]), "(M, N, K)")
        if bias is not None:
            _checks.shape(op, "bias", bias, (num_samples, N), "(M, N)")
    else:
        launch.linear(op, x, weight, bias)
    rows, N = launch.unit_stride_matrix(x), weight.shape[-2]
    stream = launch.stream(op, key, rows.shape, p, p_tensor, row_offset, col_offset, like=x)
    y = x.new_empty((num_samples, *x.shape[:-1], N))
    if y.numel() == 0:
        return y
    if not own:
        product(rows, launch.unit_stride_matrix(weight), bias, y, num_samples, stream)
        return y
    for s in range(num_samples):
        w, b = launch.unit_stride_matrix(weight[s]), None if bias is None else bias[s]
        product(rows, w, b, y[s], None, {**stream, "sample": s})
    return y


@launch.op(
    "multi_sample_linear_dgrad(Tensor grad, Tensor weight, Tensor key, float p, Tensor? p_tensor, SymInt row_offset,"
    " SymInt col_offset) -> Tensor"
)
def multi_sample_linear_dgrad(grad, weight, key, p, p_tensor, row_offset, col_offset):
    op = "multi_sample_linear_dgrad"
    _grad(op, grad, weight=weight)
    samples, N = grad.shape[0], grad.shape[-1]
    if weight.dim() not in (2, 3) or tuple(weight.shape[:-1]) not in ((N,), (samples, N)):
        got = tuple(weight.shape)
        raise ValueError(f"{op}: weight must have shape (N, K) or (M, N, K) with M={samples}, N={N}, got {got}")
    K, shape = weight.shape[-1], grad.shape[1:-1]
    rows = _checks.rows_cols(grad.shape[1:])[0]
    stream = launch.stream(op, key, (rows, K), p, p_tensor, row_offset, col_offset, like=grad)
    if rows * N * K == 0:
        return grad.new_zeros((*shape, K))
    y = grad.new_empty((*shape, K))
    sum_dgrads(launch.unit_stride_matrix(grad), _weight_rows(weight), y.view(rows, K), samples, stream)
    return y


@launch.op(
    "multi_sample_linear_wgrad(Tensor grad, Tensor x, bool shared, Tensor key, float p, Tensor? p_tensor,"
    " SymInt row_offset, SymInt col_offset) -> Tensor"
)
def multi_sample_linear_wgrad(grad, x, shared, key, p, p_tensor, row_offset, col_offset):
    op = "multi_sample_linear_wgrad"
    _grad(op, grad, x=x)
    launch.at_least_one_dimension(op, x=x)
    _checks.shape(op, "x", x, (*grad.shape[1:-1], x.shape[-1]), "(…, K)")
    samples, N, rows = grad.shape[0], grad.shape[-1], launch.unit_stride_matrix(x)
    M, K = rows.shape
    stream = launch.stream(op, key, (M, K), p, p_tensor, row_offset, col_offset, like=grad)
    if M * N * K == 0:
        return grad.new_zeros((N, K) if shared else (samples, N, K))
    g = launch.unit_stride_matrix(grad)
    if shared:
        return product_wgrad(g, rows, samples, stream, g.dtype)
    y = grad.new_empty((samples, N, K))
    for s in range(samples):
        y[s] = product_wgrad(g[s * M : (s + 1) * M], rows, None, {**stream, "sample": s}, g.dtype)
    return y
