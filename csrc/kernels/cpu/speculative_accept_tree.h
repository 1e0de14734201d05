// The integers around the draws at the nodes of trees of drafts: the keys that the nodes draw with,
// then the path that the draws lead along.
//
// Node 0 of a request is its root, node n + 1 its draft n below node parents[n], in [0, n]: parents
// come before their children. Bytes: 16 read and 8 written a node for its key, 16 read and 24
// written for its place in the output, and the path once more for each of its nodes.
#pragma once
#include <cstdint>

#include "../common/streams.h"

namespace randfuse::cpu {

struct TreeKeysArgs {
  const int64_t* keys;       // (requests,); or one, which serves request b as fold_in(key, b)
  bool shared;               // there is one
  const int64_t* positions;  // (requests,) of the root's draw in the text, or null: 0
  const int64_t* parents;    // (requests, drafts)
  int64_t drafts;
  int64_t* node_keys;  // (requests, drafts + 1): fold_in(key of the request, position + depth)
};

void tree_keys(const TreeKeysArgs& args, int64_t request_begin, int64_t request_end);

template <class T>
struct AcceptPathArgs {
  const int64_t* drawn;          // (requests, drafts + 1), as the two below: the draw of each node,
  const T *logprob, *logsumexp;  // its log-probability, the log-sum-exp of its logits. Nodes beside
  const int64_t *drafts, *parents;  // the path are not read. (requests, num_drafts)
  int64_t num_drafts, vocab;
  // (requests, num_drafts + 1), padded with -1, 0, -1; (requests,)
  int64_t *tokens, *node_ids;
  T* logprobs;
  int64_t *num_accepted, *status;
};

template <class T>
void accept_path(const AcceptPathArgs<T>& args, int64_t request_begin, int64_t request_end);

}  // namespace randfuse::cpu
