// Cross entropy of the logits of several samples, row by row: loss and log-sum-exp, or in place the
// gradient of the logits.
//
// A row has target weights q (classes) and an extra weight a at its label t: with logits z,
//   loss = -sum_c q_c log softmax(z)_c - a log softmax(z)_t,    dz = (sum q + a) softmax(z) - q - a
//   [c = t].
// Labels without smoothing have no q, smoothing makes it the same for all rows, probabilities have
// their own (bindings/multi_sample_cross_entropy.cpp).
//
// Bytes: the logits are read once from the cache they were just written to; one exponential each.
#pragma once
#include <cstdint>

namespace randfuse::cpu {

template <class T>  // float, double
struct CrossEntropyArgs {
  int64_t samples, rows, classes;
  T* logits;               // (samples, rows, classes)
  const T* weights;        // q, rows of `classes`, or null
  int64_t weights_stride;  // elements between the q of rows, 0 for one q
  const int64_t* labels;   // (rows,) or null
  const T* label_weights;  // (classes,) a by class, or null: `label_weight` for all
  T label_weight;
  int64_t ignore_index;      // rows with this label have no loss and no gradient
  T* logsumexp;              // rows of `rows`; written by forward, read by backward
  int64_t logsumexp_stride;  // elements between samples
  T* loss;                   // (rows,) += the sum over samples, times `factor`; forward
  const T* grad;             // (rows,); backward
  T factor;                  // 1 / number of all samples
};

// Ranges are rows.
template <class T>
void cross_entropy_rows(const CrossEntropyArgs<T>& args, int64_t row_begin, int64_t row_end);
template <class T>
void cross_entropy_grad_rows(const CrossEntropyArgs<T>& args, int64_t row_begin, int64_t row_end);

}  // namespace randfuse::cpu
