// speculative_accept_tree: the keys of a tree's nodes, and the path along their draws. The CPU
// only: on a GPU they are Triton's or the reference's.
#include "../kernels/cpu/speculative_accept_tree.h"

#include <torch/library.h>

#include "checks.h"

namespace randfuse {
namespace {

// An integer tensor of that shape as contiguous int64.
Tensor integers(const char* op, const char* name, const Tensor& x, at::IntArrayRef shape) {
  TORCH_CHECK_TYPE(x.scalar_type() == at::kLong, op, ": ", name, " must be int64, got ",
                   dtype_name(x));
  TORCH_CHECK_VALUE(x.is_cpu() && x.sizes() == shape, op, ": ", name, " must have shape ", shape,
                    " on cpu, got ", x.sizes(), " on ", x.device());
  return x.contiguous();
}

// (B, N), every node's parent before it.
Tensor checked_parents(const char* op, const Tensor& parents) {
  TORCH_CHECK_VALUE(parents.dim() == 2, op, ": parents must have shape (B, N), got ",
                    parents.sizes());
  const Tensor own = integers(op, "parents", parents, parents.sizes());
  const int64_t* v = own.const_data_ptr<int64_t>();
  for (int64_t at = 0; at < own.numel(); ++at)
    TORCH_CHECK_VALUE(0 <= v[at] && v[at] <= at % own.size(1), op,
                      ": parents must be in [0, n] for draft n, got ", v[at], " for draft ",
                      at % own.size(1));
  return own;
}

Tensor tree_keys_cpu(const Tensor& key, const OptionalTensor& positions, const Tensor& parents) {
  constexpr const char* op = "tree_keys";
  const Tensor own = checked_parents(op, parents);
  const int64_t requests = own.size(0), drafts = own.size(1);
  const Tensor keys = key.dim() == 0 ? integers(op, "key", key, {})
                                     : integers(op, "key", key, {requests}),
               first = positions.has_value() ? integers(op, "positions", *positions, {requests})
                                             : Tensor();
  const Tensor node_keys = at::empty({requests, drafts + 1}, own.options());
  const cpu::TreeKeysArgs args{
      in<int64_t>(keys), key.dim() == 0, first.defined() ? in<int64_t>(first) : nullptr,
      in<int64_t>(own),  drafts,         out<int64_t>(node_keys)};
  cpu::tree_keys(args, 0, requests);
  return node_keys;
}

template <class T>
void run(const Tensor& drawn, const Tensor& logprob, const Tensor& lse, const Tensor& drafts,
         const Tensor& parents, int64_t vocab, const Tensor& tokens, const Tensor& accepted,
         const Tensor& logprobs, const Tensor& status, const Tensor& nodes) {
  const cpu::AcceptPathArgs<T> args{in<int64_t>(drawn),
                                    in<T>(logprob),
                                    in<T>(lse),
                                    in<int64_t>(drafts),
                                    in<int64_t>(parents),
                                    drafts.size(1),
                                    vocab,
                                    out<int64_t>(tokens),
                                    out<int64_t>(nodes),
                                    out<T>(logprobs),
                                    out<int64_t>(accepted),
                                    out<int64_t>(status)};
  cpu::accept_path(args, 0, drafts.size(0));
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> accept_path_cpu(
    const Tensor& tokens, const Tensor& logprob, const Tensor& logsumexp,
    const Tensor& draft_token_ids, const Tensor& parents, int64_t vocab) {
  constexpr const char* op = "accept_path";
  const Tensor up = checked_parents(op, parents),
               ids = integers(op, "draft_token_ids", draft_token_ids, up.sizes());
  const int64_t requests = up.size(0), nodes = up.size(1) + 1;
  const Tensor drawn = integers(op, "tokens", tokens, {requests, nodes});
  const auto fact = [&](const char* name, const Tensor& x) {
    TORCH_CHECK_TYPE(x.scalar_type() == at::kFloat || x.scalar_type() == at::kDouble, op, ": ",
                     name, " must be float32 or float64, got ", dtype_name(x));
    check_like(op, name, x, logprob);
    TORCH_CHECK_VALUE(x.is_cpu() && x.sizes() == drawn.sizes(), op, ": ", name,
                      " must have shape (B, N + 1) = ", drawn.sizes(), " on cpu, got ", x.sizes(),
                      " on ", x.device());
    return x.contiguous();
  };
  const Tensor of_token = fact("logprob", logprob), lse = fact("logsumexp", logsumexp);
  const auto ints = [&](at::IntArrayRef shape) { return at::empty(shape, drawn.options()); };
  const Tensor out_tokens = ints({requests, nodes}), accepted = ints({requests}),
               logprobs = at::empty({requests, nodes}, of_token.options()),
               status = ints({requests}), out_nodes = ints({requests, nodes});
  (lse.scalar_type() == at::kDouble ? run<double> : run<float>)(drawn, of_token, lse, ids, up,
                                                                vocab, out_tokens, accepted,
                                                                logprobs, status, out_nodes);
  return {out_tokens, accepted, logprobs, status, out_nodes};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(randfuse, m) {
  m.def("tree_keys(Tensor key, Tensor? positions, Tensor parents) -> Tensor",
        {at::Tag::pt2_compliant_tag});
  m.def(
      "accept_path(Tensor tokens, Tensor logprob, Tensor logsumexp, Tensor draft_token_ids, "
      "Tensor parents, SymInt vocab) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
      {at::Tag::pt2_compliant_tag});
}

TORCH_LIBRARY_IMPL(randfuse, CPU, m) {
  m.impl("tree_keys", tree_keys_cpu);
  m.impl("accept_path", accept_path_cpu);
}

}  // namespace randfuse
