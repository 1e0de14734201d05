namespace randfuse::RF_ISA {

// A word in each 64-bit lane, so that the compiler makes vectors of the loop: its 32x32 -> 64
// products are one instruction each.
void random_words(const cpu::RandomWordsArgs& a, int64_t begin, int64_t end) {
  for (int64_t n = begin; n < end; ++n) {
    const uint64_t number = static_cast<uint64_t>(a.number[n]);
    const Words w = block<kWordRounds>(
        static_cast<uint64_t>(a.key[n]), static_cast<uint32_t>(number >> 32),
        static_cast<uint32_t>(number), static_cast<uint32_t>(a.sample[n]), a.domain);
    a.low[n] = static_cast<int64_t>(static_cast<uint64_t>(w.r[1]) << 32 | w.r[0]);
    a.high[n] = static_cast<int64_t>(static_cast<uint64_t>(w.r[3]) << 32 | w.r[2]);
  }
}

}  // namespace randfuse::RF_ISA
