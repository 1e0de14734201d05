// block_dropout_linear and its two gradients: y = D(x) W^T + b, dgrad = D(g W), wgrad = g^T D(x),
// where D keeps, for each block of rows r, the listed blocks of columns and scales them.
//
// Work: (1-p) 2 M N K flops in products of the library over slices of the operands, which are not
// copied. A run is what neighbouring kept blocks make together:
//
//   forward  y[r, panel]  = sum over the runs of r of scale x[r, run] W[panel, run]^T
//   dgrad    dx[r, run]   = sum over panels of scale g[r, panel] W[panel, run]; zeros elsewhere
//   wgrad    dW[panel, :] = sum over r and its runs of scale g[r, panel]^T x[r, run]
//
// Tasks own pieces of the result and sum in a fixed order; each calls the library on one thread.
// Sums of 16-bit data may not be rounded from run to run, so those operands are widened to float32.
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/ops/addmm.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include "checks.h"

namespace randfuse {
namespace {

constexpr int64_t kRowBlock = 256;  // rows that share a choice; ROWS of the reference
constexpr int64_t kPanel = 512;     // output features a product; docs/measured.md

struct Run {  // [begin, end) of rows or columns
  int64_t begin, end;
  int64_t size() const { return end - begin; }
};
using Runs = std::vector<Run>;

void append(Runs& runs, Run run) {
  if (!runs.empty() && runs.back().end == run.begin) {
    runs.back().end = run.end;
  } else {
    runs.push_back(run);
  }
}

// The choice of all groups as runs. Row blocks are counted through the groups.
struct Choice {
  std::vector<Run> rows;      // of each row block
  std::vector<Runs> columns;  // that it keeps
};

Choice choice_of(const char* op, const Tensor& x, const Tensor& kept, int64_t block, int64_t cols) {
  const int64_t groups = x.size(0), rows = x.size(1);
  const int64_t row_blocks = (rows + kRowBlock - 1) / kRowBlock;
  TORCH_CHECK_VALUE(block > 0, op, ": block must be at least 1, got ", block);
  const int64_t n = (cols + block - 1) / block;
  TORCH_CHECK_TYPE(kept.scalar_type() == at::kLong, op, ": kept must be torch.int64, got ",
                   dtype_name(kept));
  TORCH_CHECK_VALUE(
      kept.is_cpu() && kept.dim() == 3 && kept.size(0) == groups && kept.size(1) == row_blocks, op,
      ": kept must have shape (", groups, ", ", row_blocks, ", k) on cpu, got ", kept.sizes(),
      " on ", kept.device());
  const Tensor own = kept.contiguous();
  const int64_t k = kept.size(2), *list = own.const_data_ptr<int64_t>();
  Choice choice{{}, std::vector<Runs>(groups * row_blocks)};
  for (int64_t r = 0; r < groups * row_blocks; ++r) {
    const int64_t first = r % row_blocks * kRowBlock, start = r / row_blocks * rows;
    choice.rows.push_back({start + first, start + std::min(first + kRowBlock, rows)});
    for (int64_t j = 0; j < k; ++j) {
      const int64_t c = list[r * k + j];
      TORCH_CHECK_VALUE(0 <= c && c <= n, op, ": kept must hold blocks in [0, n], got ", c);
      if (c == n) continue;  // a place that the coin left empty
      append(choice.columns[r], {c * block, std::min((c + 1) * block, cols)});
    }
  }
  return choice;
}

// wgrad as products over rows and columns in a fixed order. The first into a block of columns
// overwrites it, so a gradient of the size of W is neither cleared nor read first.
struct Accumulation {
  struct Product {
    Run rows, cols;
    bool add;
  };
  std::vector<Product> products;
  Runs dropped;  // columns that no rows keep: zeros
};

Accumulation accumulation_of(const Choice& choice, int64_t block, int64_t cols) {
  Accumulation sums;
  std::vector<bool> written((cols + block - 1) / block, false);
  for (size_t r = 0; r < choice.rows.size(); ++r) {
    for (const Run& run : choice.columns[r]) {
      for (int64_t c = run.begin; c < run.end;) {  // a product for blocks that are alike
        const bool add = written[c / block];
        int64_t end = c;
        for (; end < run.end && written[end / block] == add; end += block) {
        }
        end = std::min(end, run.end);
        sums.products.push_back({choice.rows[r], {c, end}, add});
        c = end;
      }
      for (int64_t c = run.begin; c < run.end; c += block) written[c / block] = true;
    }
  }
  for (int64_t c = 0; c < cols; c += block) {
    if (!written[c / block]) append(sums.dropped, {c, std::min(c + block, cols)});
  }
  return sums;
}

Tensor piece(const Tensor& matrix, Run rows, Run cols) {
  return matrix.narrow(0, rows.begin, rows.size()).narrow(1, cols.begin, cols.size());
}

// Calls body(task) for each task. The products inside see plain tensors whatever mode the caller is
// in: the guard is per thread.
template <class Body>
void for_each_task(int64_t tasks, const Body& body) {
  at::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    const at::AutoDispatchBelowADInplaceOrView below;
    for (int64_t task = begin; task < end; ++task) body(task);
  });
}

// The operands of the sums: float32, or float64 for float64.
Tensor wide(const Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); }

// out = scale * left right, plus what out holds if `add`
void multiply(Tensor out, const Tensor& left, const Tensor& right, double scale, bool add) {
  at::addmm_out(out, out, left, right, add ? 1 : 0, scale);
}

Run panel(int64_t i, int64_t n) { return {i * kPanel, std::min((i + 1) * kPanel, n)}; }

int64_t panels(int64_t n) { return (n + kPanel - 1) / kPanel; }

void check_groups(const char* op, const char* name, const Tensor& x) {
  check_float(op, name, x);
  TORCH_CHECK_VALUE(x.dim() == 3, op, ": ", name, " must have three dimensions (G, M, cols), got ",
                    x.sizes());
}

Tensor forward_cpu(const Tensor& x, const Tensor& weight, const OptionalTensor& bias,
                   const Tensor& kept, int64_t block, double scale) {
  constexpr const char* op = "block_dropout_linear";
  check_groups(op, "x", x);
  check_linear(op, x, weight, bias);
  const Choice choice = choice_of(op, x, kept, block, x.size(2));
  const NoAutocast no_autocast;
  const int64_t n = weight.size(0), across = panels(n);
  const Tensor rows = matrix_of(wide(x)), w = wide(weight);
  const Tensor y = at::empty({rows.size(0), n}, rows.options());
  if (bias.has_value()) y.copy_(bias->expand_as(y));
  for_each_task(choice.rows.size() * across, [&](int64_t task) {
    const int64_t r = task / across;
    const Run out = panel(task % across, n);
    Tensor own = piece(y, choice.rows[r], out);
    bool add = bias.has_value();
    for (const Run& run : choice.columns[r]) {
      multiply(own, piece(rows, choice.rows[r], run), piece(w, out, run).t(), scale, add);
      add = true;
    }
    if (!add) own.zero_();
  });
  return y.to(x.scalar_type()).view(with_last(x, n));
}

Tensor dgrad_cpu(const Tensor& grad, const Tensor& weight, const Tensor& kept, int64_t block,
                 double scale) {
  constexpr const char* op = "block_dropout_linear_dgrad";
  check_groups(op, "grad", grad);
  check_like(op, "weight", weight, grad);
  TORCH_CHECK_VALUE(weight.dim() == 2 && weight.size(0) == grad.size(2), op,
                    ": weight must have shape (N=", grad.size(2), ", K), got ", weight.sizes());
  const int64_t n = weight.size(0), k = weight.size(1);
  const Choice choice = choice_of(op, grad, kept, block, k);
  const NoAutocast no_autocast;
  const Tensor rows = matrix_of(wide(grad)), w = wide(weight);
  const Tensor dx = at::zeros({rows.size(0), k}, rows.options());
  std::vector<std::pair<Run, Run>> tasks;  // rows and columns of each run
  for (size_t r = 0; r < choice.rows.size(); ++r) {
    for (const Run& run : choice.columns[r]) tasks.emplace_back(choice.rows[r], run);
  }
  for_each_task(tasks.size(), [&](int64_t task) {
    const auto& [own, run] = tasks[task];
    const Tensor out = piece(dx, own, run);
    for (int64_t i = 0; i < panels(n); ++i) {
      multiply(out, piece(rows, own, panel(i, n)), piece(w, panel(i, n), run), scale, i > 0);
    }
  });
  return dx.to(grad.scalar_type()).view(with_last(grad, k));
}

Tensor wgrad_cpu(const Tensor& grad, const Tensor& x, const Tensor& kept, int64_t block,
                 double scale) {
  constexpr const char* op = "block_dropout_linear_wgrad";
  check_groups(op, "grad", grad);
  check_groups(op, "x", x);
  check_like(op, "x", x, grad);
  TORCH_CHECK_VALUE(x.size(0) == grad.size(0) && x.size(1) == grad.size(1), op,
                    ": x must have shape (G, M, K) = (", grad.size(0), ", ", grad.size(1),
                    ", K), got ", x.sizes());
  const int64_t n = grad.size(2), k = x.size(2);
  const Choice choice = choice_of(op, x, kept, block, k);
  const NoAutocast no_autocast;
  const Tensor g = matrix_of(wide(grad)), rows = matrix_of(wide(x));
  const Tensor dw = at::empty({n, k}, g.options());
  const Accumulation sums = accumulation_of(choice, block, k);
  for_each_task(panels(n), [&](int64_t task) {
    const Run out = panel(task, n);
    for (const auto& [own, run, add] : sums.products) {
      multiply(piece(dw, out, run), piece(g, own, out).t(), piece(rows, own, run), scale, add);
    }
    for (const Run& run : sums.dropped) piece(dw, out, run).zero_();
  });
  return dw.to(grad.scalar_type());
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def(
      "block_dropout_linear(Tensor x, Tensor weight, Tensor? bias, Tensor kept, int block, "
      "float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "block_dropout_linear_dgrad(Tensor grad, Tensor weight, Tensor kept, int block, "
      "float scale) -> Tensor",
      {at::Tag::pt2_compliant_tag});
  m.def(
      "block_dropout_linear_wgrad(Tensor grad, Tensor x, Tensor kept, int block, float scale) "
      "-> Tensor",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("block_dropout_linear", forward_cpu);
  m.impl("block_dropout_linear_dgrad", dgrad_cpu);
  m.impl("block_dropout_linear_wgrad", wgrad_cpu);
}

}  // namespace randfuse
