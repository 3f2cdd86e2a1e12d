// The nearest entry of a codebook, as `thresholds` in core/fourbit/codebooks.py defines it.
#pragma once

#include <cstdint>

namespace fourbit::FOURBIT_ISA {

// The different values of a codebook ascending, as edges between neighbours: x takes codes[number of edges < x].
// Filled up with edges that nothing exceeds.
template <int Size>
struct Edges {
  float edges[Size];  // the last is never one
  uint8_t codes[Size];
};

template <int Size>
Edges<Size> find_edges(const float* code) {
  Edges<Size> result;
  float values[Size];
  uint8_t codes[Size];
  // insertion: the codebooks in use are nearly in order. Stable: of equal values the lowest code comes first.
  for (int i = 0; i < Size; ++i) {
    int at = i;
    for (; at > 0 && values[at - 1] > code[i]; --at) {
      values[at] = values[at - 1];
      codes[at] = codes[at - 1];
    }
    values[at] = code[i];
    codes[at] = static_cast<uint8_t>(i);
  }
  int count = 0;  // of different values
  float last = 0.0f;
  for (int i = 0; i < Size; ++i) {
    if (count > 0 && values[i] == last) continue;
    if (count > 0) result.edges[count - 1] = (last + values[i]) * 0.5f;
    result.codes[count++] = codes[i];
    last = values[i];
  }
  for (int i = count; i < Size; ++i) result.codes[i] = result.codes[count - 1];
  for (int i = count - 1; i < Size; ++i) result.edges[i] = __builtin_inff();
  return result;
}

// The edges as a tree: node p (from 1) has its children at 2p, for x at most its edge, and 2p + 1.
template <int Size>
void make_tree(const Edges<Size>& sorted, float* tree) {
  tree[0] = 0.0f;
  for (int width = 1; width < Size; width *= 2) {
    const int step = Size / width;  // edges below each node of this level, and one
    for (int i = 0; i < width; ++i) tree[width + i] = sorted.edges[i * step + step / 2 - 1];
  }
}

// A codebook of 256 values.
struct Search256 {
  float tree[256];
  uint8_t codes[256];
  bool ascending;  // codes[i] == i
};

inline Search256 make_search256(const float* code) {
  const Edges<256> sorted = find_edges<256>(code);
  Search256 search;
  make_tree(sorted, search.tree);
  search.ascending = true;
  for (int i = 0; i < 256; ++i) {
    search.codes[i] = sorted.codes[i];
    // beyond the last edge the index does not occur
    if (sorted.codes[i] != i && (i == 0 || sorted.codes[i] != sorted.codes[i - 1])) search.ascending = false;
  }
  return search;
}

}  // namespace fourbit::FOURBIT_ISA
