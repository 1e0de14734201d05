// Reads logits tile by tile as padded float32 (float64 for double). Included like simd.h.
//
// Bytes: each logit is read once a pass; the tile then lies in the L1 cache (4 KiB), where maximum,
// sum and race take their turns. Float32 tiles that nothing is done to are used where they lie.

constexpr int kPad = 64;  // tiles end with -inf up to a multiple of this

template <class Z>
struct Tile {
  const Z* z;
  int n;          // multiple of kPad
  int64_t first;  // token of z[0]
  // Where the raw logits after these lie, and bytes each: what a look at this tile may fetch
  // meanwhile. Fetching never faults, so the end of a row, or of the memory, is no case of its own.
  uintptr_t next;
  int size;

  void prefetch(int c) const { __builtin_prefetch(reinterpret_cast<void*>(next + c * size)); }
};

template <class T>
struct LogitReader {
  using Z = cpu::Wide<T>;
  const cpu::LogitRows<T>& rows;
  const T* logits;
  const T* uncond;
  const int32_t* bitmask;
  double temperature;   // at which several logits of one token add up
  Cut<Z> cut;           // nothing is cut until a filter says so
  int64_t banned = -1;  // a token that is left out

  LogitReader(const cpu::LogitRows<T>& r, int64_t row, double t)
      : rows(r),
        logits(r.logits + r.layout.offset(row)),
        uncond(r.uncond ? r.uncond + r.uncond_layout.offset(row) : nullptr),
        bitmask(r.bitmask ? r.bitmask + row * r.bitmask_words : nullptr),
        temperature(t),
        cut{static_cast<Z>(-INFINITY), kMaxVocab} {}

  int tiles() const { return static_cast<int>((rows.vocab + kTile - 1) / kTile); }

  Tile<Z> read(int t, Z* buffer) const {
    const int64_t first = static_cast<int64_t>(t) * kTile;
    const int n = static_cast<int>(rows.vocab - first < kTile ? rows.vocab - first : kTile);
    const int padded = (n + kPad - 1) / kPad * kPad;
    const bool cuts = cut.value > static_cast<Z>(-INFINITY);
    const bool here = first <= banned && banned < first + n;
    const uintptr_t next = reinterpret_cast<uintptr_t>(logits) + (first + kTile) * sizeof(T);
    if constexpr (std::is_same_v<T, Z>) {
      const bool plain = !uncond && !bitmask && !cuts && !rows.token && rows.num_exclude == 0;
      if (plain && n == padded && !here) return {logits + first, n, first, next, sizeof(T)};
    }
    if (rows.token)
      gather(first, n, buffer);
    else
      widen(logits + first, n, buffer);
    for (int c = n; c < padded; ++c) buffer[c] = static_cast<Z>(-INFINITY);
    if (uncond) {
      Z other[kTile];
      widen(uncond + first, n, other);
      for (int c = 0; c < n; ++c) buffer[c] = guided(buffer[c], other[c], rows.scale_plus_one);
    }
    if (rows.num_exclude > 0) exclude(first, n, buffer);
    if (bitmask) {
      for (int c = 0; c < n; ++c)
        if (!(bitmask[(first + c) / 32] >> (c % 32) & 1)) buffer[c] = static_cast<Z>(-INFINITY);
    }
    if (cuts) {
      for (int c = 0; c < n; ++c)
        buffer[c] = buffer[c] >= cut.value ? buffer[c] : static_cast<Z>(-INFINITY);
      const int64_t ties = cut.last + 1 - first;  // which are kept before this place
      for (int64_t c = ties > 0 ? ties : 0; c < n; ++c)
        buffer[c] = buffer[c] == cut.value ? static_cast<Z>(-INFINITY) : buffer[c];
    }
    if (here) buffer[banned - first] = static_cast<Z>(-INFINITY);
    return {buffer, padded, first, next, sizeof(T)};
  }

 private:
  static void widen(const T* in, int n, Z* out) {
    int c = 0;
    if constexpr (std::is_same_v<Z, float>) {
      for (; c + kF32 <= n; c += kF32) store(out + c, load(in + c));
    }
    for (; c < n; ++c) out[c] = to_float(in[c]);
  }

  // The first of n ascending ids that is not below `least`.
  static int64_t first_from(const int64_t* ids, int64_t n, int64_t least) {
    int64_t low = 0;
    while (low < n) {
      const int64_t middle = (low + n) / 2;
      if (ids[middle] < least)
        low = middle + 1;
      else
        n = middle;
    }
    return low;
  }

  void exclude(int64_t first, int n, Z* buffer) const {
    first += rows.col_offset;
    for (int64_t k = first_from(rows.exclude, rows.num_exclude, first);
         k < rows.num_exclude && rows.exclude[k] < first + n; ++k)
      buffer[rows.exclude[k] - first] = static_cast<Z>(-INFINITY);
  }

  void gather(int64_t first, int n, Z* buffer) const {
    for (int c = 0; c < n; ++c) buffer[c] = static_cast<Z>(-INFINITY);
    for (int64_t k = first_from(rows.token, rows.num_columns, first);
         k < rows.num_columns && rows.token[k] < first + n; ++k) {
      Z& z = buffer[rows.token[k] - first];
      z = joined(z, static_cast<Z>(to_float(logits[rows.column[k]])), temperature);
    }
  }
};
