// The matrix product for more than a few rows: weights decoded into a scratch that stays in the cache, x packed so
// that the vector lanes are its rows.
//
//   C[j, i] = sum over r of w[j, r] * x[i, r]
//
// i: rows of x, the lanes, in panels of MAX_TILE_M vectors; j: TILE_ROWS outputs of the weight; r: REDUCED terms at
// a time. A product is a vector of x times one broadcast value (or bfloat16 pair) of w. linear_4bit has j the rows
// of the weight and r its columns; its gradient has them the other way round. Each output is summed by one task in
// a fixed order, so that the number of threads changes nothing.
#pragma once

#include "dequantize.inl"
#include "kernels.h"
#include "parallel.h"
#include "product_element.inl"
#include "scales.inl"
#include "workspace.h"

namespace fourbit::FOURBIT_ISA {

constexpr int64_t GROUP = 128;  // terms that are decoded at a time where their order is free
constexpr int REDUCED = 512, REDUCED_FEW = 256;  // the latter for one panel: it and its weights fit the first cache

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Adds to C[B, A * W] (or starts it with) the sum over `steps`. w's value for output b and step s is at
// w[b * ROW + s * STRIDE]. Sums of E::CHAIN steps are added up: one chain over all terms would lose three times as
// many bits.
template <typename E, int A, int B, int ROW, int STRIDE>
void tile(const typename E::Type* x, const typename E::Type* w, int64_t steps, float* c, int64_t ldc, bool start) {
  for (int64_t done = 0; done < steps; done += E::CHAIN) {
    F sums[A][B];
#pragma GCC unroll 32
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 32
      for (int a = 0; a < A; ++a) sums[a][b] = zero();
    }
    const int64_t end = min64(done + E::CHAIN, steps);
    for (int64_t s = done; s < end; ++s, x += A * W * E::STEP, w += STRIDE) {
      typename E::Vector lanes[A];
#pragma GCC unroll 32
      for (int a = 0; a < A; ++a) lanes[a] = E::load_lanes(x + a * W * E::STEP);
#pragma GCC unroll 32
      for (int b = 0; b < B; ++b) {
        const typename E::Vector value = E::broadcast(w + b * ROW);
#pragma GCC unroll 32
        for (int a = 0; a < A; ++a) sums[a][b] = E::multiply_add(lanes[a], value, sums[a][b]);
      }
    }
    const bool first = start && done == 0;
#pragma GCC unroll 32
    for (int b = 0; b < B; ++b) {
#pragma GCC unroll 32
      for (int a = 0; a < A; ++a) {
        float* target = c + b * ldc + a * W;
        store(target, first ? sums[a][b] : add(load(target), sums[a][b]));
      }
    }
  }
}

// All of one panel's tiles: `rows` outputs, rounded up to the tile's (the scratch has room, the excess is unused).
template <typename E, int A, int ROW, int STRIDE>
void tiles_of(const typename E::Type* x, const typename E::Type* w, int64_t rows, int64_t steps, float* c,
              int64_t ldc, bool start) {
  constexpr int B = tile_n<A>;
  for (int64_t row = 0; row < rows; row += B)
    tile<E, A, B, ROW, STRIDE>(x, w + row * ROW, steps, c + row * ldc, ldc, start);
}

template <typename E, int ROW, int STRIDE>
void panel_tiles(int vectors, const typename E::Type* x, const typename E::Type* w, int64_t rows, int64_t steps,
                 float* c, int64_t ldc, bool start) {
  if constexpr (MAX_TILE_M >= 4)
    if (vectors == 4) return tiles_of<E, 4, ROW, STRIDE>(x, w, rows, steps, c, ldc, start);
  if constexpr (MAX_TILE_M >= 3)
    if (vectors == 3) return tiles_of<E, 3, ROW, STRIDE>(x, w, rows, steps, c, ldc, start);
  if (vectors == 2) return tiles_of<E, 2, ROW, STRIDE>(x, w, rows, steps, c, ldc, start);
  tiles_of<E, 1, ROW, STRIDE>(x, w, rows, steps, c, ldc, start);
}

// x [m, reduced] as panels: per panel [reduced / STEP][lanes][STEP], zeros where there is no row or term.
template <typename E>
struct Panels {
  typename E::Type* data;
  int64_t m, padded;  // padded: terms, rounded up
  bool ordered;       // each GROUP of terms in the order of decode_ordered
  static constexpr int64_t LANES = MAX_TILE_M * W;

  static int64_t bytes(int64_t m, int64_t reduced) {
    return round_up(m, W) * round_up(reduced, GROUP) * static_cast<int64_t>(sizeof(typename E::Type));
  }
  int64_t count() const { return (m + LANES - 1) / LANES; }
  int vectors(int64_t panel) const {
    const int64_t rest = (m - panel * LANES + W - 1) / W;
    return static_cast<int>(rest < MAX_TILE_M ? rest : MAX_TILE_M);
  }
  const typename E::Type* at(int64_t panel, int64_t term) const {
    return data + panel * LANES * padded + term * vectors(panel) * W;
  }

  void fill(const void* source, Dtype dtype, int64_t reduced, bool serial) {
    constexpr int64_t CHUNK = GROUP;
    const int64_t chunks = (padded + CHUNK * 4 - 1) / (CHUNK * 4);
    auto body = [&](int64_t task) {
      const int64_t panel = task / chunks, begin = task % chunks * CHUNK * 4;
      const int64_t lanes = vectors(panel) * W, first_row = panel * LANES;
      for (int64_t term = begin; term < min64(begin + CHUNK * 4, padded); term += CHUNK) {
        typename E::Type* out = data + panel * LANES * padded + term * lanes;
        for (int64_t lane = 0; lane < lanes; ++lane) {
          alignas(64) typename E::Type row[CHUNK] = {};
          const int64_t have = first_row + lane < m ? min64(CHUNK, reduced - term) : 0;
          if (have > 0) E::convert(source, dtype, (first_row + lane) * reduced + term, have, row);
          if (ordered) E::order(row);
          for (int64_t step = 0; step < CHUNK / E::STEP; ++step)
            std::memcpy(out + (step * lanes + lane) * E::STEP, row + step * E::STEP,
                        sizeof(typename E::Type) * E::STEP);
        }
      }
    };
    parallel(count() * chunks, serial, body);
  }
};

// C [rows, ldc], lanes being rows of x, to out [m, width], converted and with the bias added.
inline void store_outputs(const float* c, int64_t ldc, int64_t first_m, int64_t m, int64_t first, int64_t rows,
                          const void* bias, Dtype dtype, int64_t width, void* out) {
  const int64_t size = size_of(dtype);
  for (int64_t j = 0; j < rows; j += W) {
    const int64_t columns = min64(W, rows - j);
    const F added = bias_lanes(bias, dtype, first + j, columns);
    for (int64_t i = 0; i < m; i += W) {
      F block[W];
      for (int r = 0; r < W; ++r) block[r] = r < columns ? load(c + (j + r) * ldc + i) : zero();
      transpose(block);
      for (int64_t r = 0; r < min64(W, m - i); ++r) {
        char* target = static_cast<char*>(out) + ((first_m + i + r) * width + first + j) * size;
        store_some(target, dtype, add(block[r], added), columns);
      }
    }
  }
}

// Elements `start` to `start + count - 1` of the weight, scaled, in order, at a multiple of 32 in the weight.
// Prefetches what is at element `next`: the processor does not see that coming, and waiting for it took half the time.
template <typename E>
void decode_aligned(const Weight& weight, int shift, int64_t start, int64_t count, int64_t next,
                    typename E::Type* out) {
  float buffer[REDUCED / 32 + 2];
  const int64_t first = start >> shift, end = start + count;
  const float* scales = scales_of(weight, first, ((end - 1) >> shift) - first + 1, buffer);
  const uint8_t* bytes = weight.packed + start / 2;
  for (int64_t line = 0; line < count / 2; line += 64) prefetch(weight.packed + next / 2 + line);
  prefetch(static_cast<const char*>(weight.absmax) + (next >> shift) * (weight.nested_absmax == nullptr ? 4 : 1));
  for (int64_t at = start; at < end; ++scales) {
    const int64_t stop = min64(((at >> shift) + 1) << shift, end);
    const typename E::Table table = E::table(weight.code, *scales);
    for (; at < stop; at += 32, bytes += 16, out += 32) E::decode32(bytes, table, out);
  }
}

// The same in the element's own order, which costs least, at a multiple of 64 and for a multiple of GROUP; the
// blocksize is at least 64.
template <typename E>
void decode_ordered(const Weight& weight, int shift, int64_t start, int64_t count, int64_t next,
                    typename E::Type* out) {
  float buffer[REDUCED / 32 + 2];
  const int64_t first = start >> shift;
  const float* scales = scales_of(weight, first, ((start + count - 1) >> shift) - first + 1, buffer);
  const uint8_t* bytes = weight.packed + start / 2;
  for (int64_t line = 0; line < count / 2; line += 64) prefetch(weight.packed + next / 2 + line);
  prefetch(static_cast<const char*>(weight.absmax) + (next >> shift) * (weight.nested_absmax == nullptr ? 4 : 1));
  const typename E::Codes codes = E::codes(weight.code);
  if (shift == 6) {
    for (int64_t i = 0; i < count; i += GROUP)
      E::decode128(bytes + i / 2, codes, scales[i / 64], scales[i / 64 + 1], out + i);
  } else {
    for (int64_t i = 0; i < count; i += GROUP)
      E::decode128(bytes + i / 2, codes, scales[((start + i) >> shift) - first],
                   scales[((start + i + 64) >> shift) - first], out + i);
  }
}

// The same for any start and count.
template <typename E>
void decode_any(const Weight& weight, int64_t start, int64_t count, typename E::Type* out) {
  dequantize_range(weight, start, count, E::DTYPE, out);
}

constexpr int64_t MAX_M = 512;  // rows of x for which one task keeps its sums

// linear_4bit for the weight of n rows that begins at element `origin` of `weight`: ROWS of them a task, TERMS
// columns at a time.
template <typename E, int ROWS, int TERMS>
struct ForwardTasks {
  using Type = typename E::Type;
  static constexpr int ROW = TERMS + 64 / sizeof(Type);  // a stride that is no power of two: cache sets

  static int64_t run(const Panels<E>& panels, const Weight& weight, int64_t origin, int64_t n, int64_t k,
                     const void* bias, Dtype dtype, void* out, bool serial) {
    const int64_t blocks = (n + ROWS - 1) / ROWS, parts = (panels.m + MAX_M - 1) / MAX_M;
    const bool aligned = origin % 32 == 0 && k % 32 == 0;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize));
    const int64_t ldc = round_up(min64(panels.m, MAX_M), W);
    const int64_t bytes = ROWS * (ROW * static_cast<int64_t>(sizeof(Type)) + ldc * static_cast<int64_t>(4));
    auto body = [&](int64_t task) -> int64_t {
      const int64_t first = task / parts * ROWS, part = task % parts;
      const int64_t count = min64(ROWS, n - first), begin = part * MAX_M, end = min64(begin + MAX_M, panels.m);
      Type* scratch = static_cast<Type*>(workspace(TASK, bytes));
      if (scratch == nullptr) return bytes;
      float* c = reinterpret_cast<float*>(scratch + ROWS * ROW);
      for (int64_t term = 0; term < k; term += TERMS) {
        const int64_t terms = min64(TERMS, k - term), steps = (terms + E::STEP - 1) / E::STEP;
        for (int64_t row = 0; row < count; ++row) {
          Type* target = scratch + row * ROW;
          const int64_t start = origin + (first + row) * k + term;
          const int64_t next = term + TERMS < k ? start + TERMS : start - term + ROWS * k;
          if (panels.ordered)
            decode_ordered<E>(weight, shift, start, terms, next, target);
          else if (aligned)
            decode_aligned<E>(weight, shift, start, terms, next, target);
          else
            decode_any<E>(weight, start, terms, target);
          if (terms % E::STEP) target[terms] = 0;
        }
        for (int64_t panel = begin / Panels<E>::LANES; panel * Panels<E>::LANES < end; ++panel)
          panel_tiles<E, ROW, E::STEP>(panels.vectors(panel), panels.at(panel, term), scratch, count, steps,
                                       c + (panel * Panels<E>::LANES - begin), ldc, term == 0);
      }
      store_outputs(c, ldc, begin, end - begin, first, count, bias, dtype, n, out);
      return 0;
    };
    return parallel(blocks * parts, serial, body);
  }
};

template <typename E>
int64_t forward_product(const Panels<E>& panels, const Weight& weight, int64_t origin, int64_t n, int64_t k,
                        const void* bias, Dtype dtype, void* out, bool serial) {
  if (panels.count() == 1)
    return ForwardTasks<E, 24, REDUCED_FEW>::run(panels, weight, origin, n, k, bias, dtype, out, serial);
  return ForwardTasks<E, 96, REDUCED>::run(panels, weight, origin, n, k, bias, dtype, out, serial);
}

// linear_4bit_grad: the outputs are columns of the weight, the terms its rows.
template <typename E>
struct GradientProduct {
  using Type = typename E::Type;
  static constexpr int COLUMNS = 192;
  static constexpr int TERMS = REDUCED / 2;

  static int64_t run(const Panels<E>& panels, const Weight& weight, int64_t origin, int64_t n, int64_t k, Dtype dtype,
                     void* out, bool serial) {
    const int64_t blocks = (k + COLUMNS - 1) / COLUMNS, parts = (panels.m + MAX_M - 1) / MAX_M;
    const bool aligned = origin % 32 == 0 && k % 32 == 0;
    const int shift = __builtin_ctzll(static_cast<unsigned long long>(weight.blocksize));
    const int64_t ldc = round_up(min64(panels.m, MAX_M), W);
    const int64_t bytes = COLUMNS * (TERMS * static_cast<int64_t>(sizeof(Type)) + ldc * static_cast<int64_t>(4));
    auto body = [&](int64_t task) -> int64_t {
      const int64_t first = task / parts * COLUMNS, part = task % parts;
      const int64_t count = min64(COLUMNS, k - first), begin = part * MAX_M, end = min64(begin + MAX_M, panels.m);
      Type* scratch = static_cast<Type*>(workspace(TASK, bytes));
      if (scratch == nullptr) return bytes;
      float* c = reinterpret_cast<float*>(scratch + TERMS * COLUMNS);
      alignas(64) Type rows[E::STEP][COLUMNS] = {};
      for (int64_t term = 0; term < n; term += TERMS) {
        const int64_t terms = min64(TERMS, n - term), steps = (terms + E::STEP - 1) / E::STEP;
        for (int64_t step = 0; step < steps; ++step) {
          for (int s = 0; s < E::STEP; ++s) {
            const int64_t row = term + step * E::STEP + s;
            const int64_t start = origin + row * k + first;
            if (row >= n)
              std::memset(rows[s], 0, sizeof rows[s]);
            else if (aligned)
              decode_aligned<E>(weight, shift, start, count, start + E::STEP * k, rows[s]);
            else
              decode_any<E>(weight, start, count, rows[s]);
          }
          E::interleave(rows[0], COLUMNS, scratch + step * COLUMNS * E::STEP);
        }
        for (int64_t panel = begin / Panels<E>::LANES; panel * Panels<E>::LANES < end; ++panel)
          panel_tiles<E, E::STEP, COLUMNS * E::STEP>(panels.vectors(panel), panels.at(panel, term), scratch, count,
                                                     steps, c + (panel * Panels<E>::LANES - begin), ldc, term == 0);
      }
      store_outputs(c, ldc, begin, end - begin, first, count, nullptr, dtype, k, out);
      return 0;
    };
    return parallel(blocks * parts, serial, body);
  }
};

}  // namespace fourbit::FOURBIT_ISA
