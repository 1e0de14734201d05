#include "random_words.h"

#define RF_IMPL "random_words_impl.h"
#include "for_each_isa.h"

namespace randfuse::cpu {

void random_words(const RandomWordsArgs& args, int64_t begin, int64_t end) {
  RF_DISPATCH(random_words)(args, begin, end);
}

}  // namespace randfuse::cpu
