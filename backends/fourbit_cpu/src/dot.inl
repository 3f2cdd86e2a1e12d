// linear_4bit for a few rows of x: each row of the weight is streamed once from memory and meets every row of x
// in registers. x is brought into the order in which the weight is decoded, once a call: for each 128 columns the
// M rows one after another, so that it is read front to back.
//
// With one row the scale multiplies the sum of a block, which costs least; with more it multiplies the weights.
#pragma once

#include "kernels.h"
#include "parallel.h"
#include "product.inl"
#include "workspace.h"

namespace fourbit::FOURBIT_ISA {

constexpr int64_t L1_BYTES = 32 << 10;    // of x that a thread keeps close
constexpr int64_t AHEAD_BYTES = 16 << 10;  // of the weight that is prefetched
constexpr int64_t TASK_BYTES = 64 << 10;  // of the weight that a task reads
constexpr int ROW_UNIT = 12, MAX_TASK_ROWS = 48;  // multiples of any number of rows that share x

// How the weight is walked: segments of `terms` columns that keep x close, `rows` rows a task.
struct Walk {
  int64_t rows, terms;
  Walk(int64_t m, int64_t n, int64_t k, int64_t element_bytes) {
    const int64_t fits = L1_BYTES / (m * element_bytes);
    const int64_t parts = (k + fits - 1) / fits;
    terms = parts == 1 ? k : round_up((k + parts - 1) / parts, 512);
    rows = min64(TASK_BYTES / (k / 2 + 1), n / 8) / ROW_UNIT * ROW_UNIT;
    if (rows < ROW_UNIT) rows = ROW_UNIT;
    if (rows > MAX_TASK_ROWS) rows = MAX_TASK_ROWS;
  }
};

// Sums over 128 columns of R rows of the weight with M rows of x, in float32 lanes.
template <typename Decoder, int M>
struct FloatDot {
  using Type = float;
  static constexpr int ROWS = M == 1 ? 1 : DOT_ROWS, CHAINS = DOT_CHAINS;
  typename Decoder::Table table;
  explicit FloatDot(const float* code) : table(Decoder::table(code)) {}

  static void convert(const void* source, Dtype dtype, int64_t index, int64_t count, float* out) {
    float natural[GROUP] = {};
    FloatElement::convert(source, dtype, index, count, natural);
    for (int i = 0; i < GROUP; ++i) out[i] = natural[Decoder::element(i)];
  }

  template <bool Scaled, bool Quarters, int R>
  inline __attribute__((always_inline)) void group(const uint8_t* const* bytes, int64_t at, const float* x,
                                                   const float (*s)[4], F (&sums)[R][M][CHAINS]) const {
    Scales scales[R];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) scales[r] = Quarters ? Scales::quarters(s[r]) : Scales::halves(s[r][0], s[r][1]);
    // a part is used up before the next one is decoded: all 128 weights at once would not fit the registers
#pragma GCC unroll 4
    for (int first = 0; first < Decoder::VECTORS; first += SAME_SCALES) {
      F w[R][SAME_SCALES];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) Decoder::decode_part(bytes[r] + at, first / SAME_SCALES, table, w[r]);
      if constexpr (M == 1 && !Scaled) {
        static_assert(R == 1);
        F block = mul(w[0][0], load(x + first * W));
#pragma GCC unroll 128
        for (int i = 1; i < SAME_SCALES; ++i) block = fma(w[0][i], load(x + (first + i) * W), block);
        F& sum = sums[0][0][first / SAME_SCALES % CHAINS];
        sum = fma(block, scales[0].of(first), sum);
      } else {
#pragma GCC unroll 128
        for (int i = 0; i < SAME_SCALES; ++i) {
          const int v = first + i;
          F scaled[R];
#pragma GCC unroll 4
          for (int r = 0; r < R; ++r) scaled[r] = mul(w[r][i], scales[r].of(v));
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            const F lanes = load(x + m * GROUP + v * W);
#pragma GCC unroll 4
            for (int r = 0; r < R; ++r) sums[r][m][v % CHAINS] = fma(scaled[r], lanes, sums[r][m][v % CHAINS]);
          }
        }
      }
    }
  }
};

#if defined(__AVX512BF16__)

// The same in pairs of bfloat16: four vectors of 32 words; word i of vector v is element 4i + v.
template <int M>
struct Bf16Dot {
  using Type = uint16_t;
  // At least 14 sums, to cover the latency of vdpbf16ps, and no more than leave registers for the rest.
  static constexpr int ROWS = M == 1 ? 1 : M == 2 ? 4 : M == 4 || M >= 7 ? 2 : 3, CHAINS = M <= 4 ? 2 : 1;
  __m512 values;
  __m512i unscaled;
  explicit Bf16Dot(const float* code) : values(load(code)), unscaled(Bf16Element::table(code, 1.0f)) {}

  static void convert(const void* source, Dtype, int64_t index, int64_t count, uint16_t* out) {
    const uint16_t* x = static_cast<const uint16_t*>(source) + index;
    for (int v = 0; v < 4; ++v)
      for (int64_t i = 0; i < 32; ++i) out[v * 32 + i] = 4 * i + v < count ? x[4 * i + v] : uint16_t{0};
  }

  static F dot(F sum, __m512i w, const uint16_t* x) {
    return Bf16Element::multiply_add(_mm512_loadu_si512(x), w, sum);
  }
  template <bool Scaled, bool Quarters, int R>
  inline __attribute__((always_inline)) void group(const uint8_t* const* bytes, int64_t at, const uint16_t* x,
                                                   const float (*s)[4], F (&sums)[R][M][CHAINS]) const {
    if constexpr (M == 1 && !Scaled) {
      const __m512i b = _mm512_loadu_si512(bytes[0] + at);
      F block = zero();
#pragma GCC unroll 4
      for (int v = 0; v < 4; ++v) block = dot(block, _mm512_permutexvar_epi16(nibbles(b, v), unscaled), x + v * 32);
      const Scales scales = Quarters ? Scales::quarters(s[0]) : Scales::halves(s[0][0], s[0][1]);
      sums[0][0][0] = fma(block, scales.lanes, sums[0][0][0]);
      return;
    }
    // the scaled values of each 64 (or 32) weights, and which of these tables a word looks in
    constexpr int TABLES = Quarters ? 2 : 1;
    __m512i table[R][TABLES];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
      for (int t = 0; t < TABLES; ++t)
        table[r][t] = Bf16Element::scaled_pair(values, s[r][2 * t], s[r][2 * t + 1]);
    }
#pragma GCC unroll 4
    for (int v = 0; v < 4; ++v) {
      __m512i w[R];
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m512i b = _mm512_loadu_si512(bytes[r] + at);
        if constexpr (Quarters)
          w[r] = _mm512_permutex2var_epi16(table[r][0], quarter_index(nibbles(b, v)), table[r][TABLES - 1]);
        else
          w[r] = _mm512_permutexvar_epi16(Bf16Element::half_index(nibbles(b, v)), table[r][0]);
      }
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) {
        const __m512i lanes = _mm512_loadu_si512(x + m * GROUP + v * 32);
#pragma GCC unroll 4
        for (int r = 0; r < R; ++r)
          sums[r][m][v % CHAINS] = Bf16Element::multiply_add(lanes, w[r], sums[r][m][v % CHAINS]);
      }
    }
  }

 private:
  // (nibble & 15) | 16 times the quarter: which of the four tables, two in each of a pair of vectors.
  static __m512i quarter_index(__m512i nibbles) {
    constexpr long long ONE = 0x0010001000100010, TWO = 2 * ONE;
    return _mm512_ternarylogic_epi32(nibbles, _mm512_set1_epi16(15),
                                     _mm512_set_epi64(ONE | TWO, ONE | TWO, TWO, TWO, ONE, ONE, 0, 0), 0xea);
  }
  // Words whose low four bits are the nibbles of elements 4i + v.
  static __m512i nibbles(__m512i bytes, int v) {
    constexpr int SHIFTS[4] = {4, 0, 12, 8};
    return _mm512_srli_epi16(bytes, SHIFTS[v]);
  }
};

#endif

// One segment of R rows: columns `start` to `start + terms - 1` of the first, counted in the whole weight.
struct Segment {
  const uint8_t* packed;
  int64_t start, terms, row_stride, ahead;
  int shift;
};

// Adds one segment's products to `into` (or starts it). The scales of row r begin with the one of its first column.
template <bool Scaled, int R, typename Dot, int M, int Chains>
inline void dot_segment(const Dot& dot, const Segment& segment, const typename Dot::Type* x,
                        const float* const* scales, bool first, F (*into)[M]) {
  F sums[R][M][Chains];  // of this segment, added at the end: shorter chains round less
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m)
      for (int c = 0; c < Chains; ++c) sums[r][m][c] = zero();
  const int shift = segment.shift;
  const uint8_t* bytes[R];
  for (int r = 0; r < R; ++r) bytes[r] = segment.packed + (segment.start + r * segment.row_stride) / 2;
  const int64_t whole = segment.terms / GROUP * GROUP;
  // which scale the columns at i have, relative to the segment's first
  auto scale = [&](int r, int64_t i) {
    const int64_t start = segment.start + r * segment.row_stride;
    return scales[r][((start + i) >> shift) - (start >> shift)];
  };
  float s[R][4];
  if (shift == 6) {  // the usual blocksize, without the shifts
    for (int64_t i = 0; i < whole; i += GROUP) {
      for (int r = 0; r < R; ++r) {
        prefetch(bytes[r] + i / 2 + segment.ahead);
        s[r][0] = scales[r][i / 64];
        s[r][1] = scales[r][i / 64 + 1];
      }
      dot.template group<Scaled, false, R>(bytes, i / 2, x + i * M, s, sums);
    }
  } else if (shift > 6) {
    for (int64_t i = 0; i < whole; i += GROUP) {
      for (int r = 0; r < R; ++r) {
        prefetch(bytes[r] + i / 2 + segment.ahead);
        s[r][0] = scale(r, i);
        s[r][1] = scale(r, i + 64);
      }
      dot.template group<Scaled, false, R>(bytes, i / 2, x + i * M, s, sums);
    }
  } else {
    for (int64_t i = 0; i < whole; i += GROUP) {
      for (int r = 0; r < R; ++r)
        for (int q = 0; q < 4; ++q) s[r][q] = scales[r][i / 32 + q];
      dot.template group<Scaled, true, R>(bytes, i / 2, x + i * M, s, sums);
    }
  }
  if (whole < segment.terms) {  // 64 columns are left: the rest of the group is zeros, in x as well
    alignas(64) uint8_t padded[R][GROUP / 2] = {};
    const uint8_t* rest[R];
    for (int r = 0; r < R; ++r) {
      std::memcpy(padded[r], bytes[r] + whole / 2, 32);
      rest[r] = padded[r];
      s[r][0] = scale(r, whole);
      s[r][1] = shift == 5 ? scale(r, whole + 32) : 0.0f;
      s[r][2] = s[r][3] = 0.0f;
    }
    if (shift == 5)
      dot.template group<Scaled, true, R>(rest, 0, x + whole * M, s, sums);
    else
      dot.template group<Scaled, false, R>(rest, 0, x + whole * M, s, sums);
  }
  for (int r = 0; r < R; ++r)
    for (int m = 0; m < M; ++m) {
      F sum = sums[r][m][0];
      for (int c = 1; c < Chains; ++c) sum = add(sum, sums[r][m][c]);
      into[r][m] = first ? sum : add(into[r][m], sum);
    }
}

template <typename Dot, int M>
int64_t dot_product(const void* x, Dtype dtype, int64_t n, int64_t k, const Weight& weight, int64_t origin,
                    const void* bias, void* out, bool serial) {
  using Type = typename Dot::Type;
  constexpr int ROWS = Dot::ROWS;
  const int64_t bytes = M * round_up(k, GROUP) * static_cast<int64_t>(sizeof(Type));
  Type* ordered = static_cast<Type*>(workspace(PANELS, bytes));
  if (ordered == nullptr) return bytes;
  for (int64_t term = 0; term < k; term += GROUP)
    for (int m = 0; m < M; ++m)
      Dot::convert(x, dtype, m * k + term, min64(GROUP, k - term), ordered + (term * M + m * GROUP));

  const Walk walk(M, n, k, sizeof(Type));
  const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize));
  const int64_t ahead = walk.terms == k ? AHEAD_BYTES : (AHEAD_BYTES / (walk.terms / 2) + 1) * (k / 2);
  const bool nested = weight.nested_absmax != nullptr;
  const int64_t room = walk.terms / 32 + 4;  // scales of one row's segment
  auto body = [&](int64_t task) -> int64_t {
    const Dot dot(weight.code);
    const int64_t begin = task * walk.rows, end = min64(begin + walk.rows, n);
    F sums[MAX_TASK_ROWS][M];
    const int64_t needed = ROWS * room * static_cast<int64_t>(sizeof(float));
    float* buffer = static_cast<float*>(workspace(TASK, needed));
    if (buffer == nullptr) return needed;
    auto segment = [&](int64_t row, int64_t term, auto scaled, auto rows, F(*into)[M]) {
      constexpr int R = decltype(rows)::value;
      const Segment part{weight.packed, origin + row * k + term, min64(walk.terms, k - term), k, ahead, shift};
      const float* scales[R];
      for (int r = 0; r < R; ++r) {
        const int64_t start = part.start + r * k, block = start >> shift;
        scales[r] = scales_of(weight, block, nested ? ((start + part.terms - 1) >> shift) - block + 1 : 0,
                              buffer + r * room);
      }
      dot_segment<decltype(scaled)::value, R, Dot, M, Dot::CHAINS>(dot, part, ordered + term * M, scales, term == 0,
                                                                   into);
    };
    for (int64_t term = 0; term < k; term += walk.terms) {
      int64_t row = begin;
      for (; row + ROWS <= end; row += ROWS) segment(row, term, Number<M != 1>{}, Number<ROWS>{}, sums + (row - begin));
      for (; row < end; ++row) segment(row, term, Number<M != 1>{}, Number<1>{}, sums + (row - begin));
    }
    for (int64_t row = begin; row < end; row += W) {
      const int64_t count = min64(W, end - row);
      const F added = bias_lanes(bias, dtype, row, count);
      for (int m = 0; m < M; ++m) {
        F lanes[W];
        for (int64_t r = 0; r < W; ++r) lanes[r] = r < count ? sums[row - begin + r][m] : zero();
        transpose(lanes);
        F y = lanes[0];
        for (int r = 1; r < W; ++r) y = add(y, lanes[r]);
        if (M == 1 && !finite(y)) {
          // A sum of unscaled products may overflow where the scaled ones do not (and a NaN stays one).
          float values[W];
          for (int64_t r = 0; r < W; ++r) {
            F again[1][M] = {};
            if (r < count)
              for (int64_t term = 0; term < k; term += walk.terms)
                segment(row + r, term, Number<1>{}, Number<1>{}, again);
            values[r] = sum(again[0][0]);
          }
          y = load(values);
        }
        store_some(static_cast<char*>(out) + (m * n + row) * size_of(dtype), dtype, add(y, added), count);
      }
    }
    return 0;
  };
  return parallel((n + walk.rows - 1) / walk.rows, serial, body);
}

template <int M, template <int> typename Dots>
int64_t dispatch_rows(int64_t m, const void* x, Dtype dtype, int64_t n, int64_t k, const Weight& weight,
                      int64_t origin, const void* bias, void* out, bool serial) {
  if (m == M) return dot_product<Dots<M>, M>(x, dtype, n, k, weight, origin, bias, out, serial);
  if constexpr (M > 1) return dispatch_rows<M - 1, Dots>(m, x, dtype, n, k, weight, origin, bias, out, serial);
  return 0;
}

template <int M>
using ExactDot = FloatDot<Exact, M>;
template <int M>
using RoundedDot = FloatDot<Rounded, M>;

}  // namespace fourbit::FOURBIT_ISA
