// Where most of the emulator's time goes, so it is written for the vector unit that every x86-64 processor has. The sum
// of each element is taken in the order of K, one rounded addition after the other.
#include "products.h"

#include <emmintrin.h>

namespace emulator {

namespace {

constexpr int kChunk = 16;  // bytes; a row has two

// A K-major operand: rows of 128 bytes in groups of eight, the groups a stride apart; `swizzled` says where a chunk
// lies.
struct Rows {
  uint32_t start, stride;

  explicit Rows(uint64_t descriptor)
      : start(static_cast<uint32_t>(descriptor & 0x3FFF) << 4),
        stride(static_cast<uint32_t>(descriptor >> 32 & 0x3FFF) << 4) {
    if (descriptor >> 62 != 1) fail("an operand with another swizzle is not emulated");
    if (descriptor >> 49 & 7) fail("an operand with a base offset is not emulated");
  }

  __m128i chunk(int row, int number) const {
    const uint32_t address = start + row / 8 * stride + row % 8 * 128 + number * kChunk;
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(shared_at(*current->block, swizzled(address), kChunk)));
  }
};

// The halves in the low 16 bits of four words. What has no fraction bits to gain is multiplied into its place, which
// gives subnormal numbers theirs; infinities and NaNs keep their bits.
inline __m128 of_f16(__m128i words) {
  const __m128i sign = _mm_slli_epi32(_mm_and_si128(words, _mm_set1_epi32(0x8000)), 16);
  const __m128i magnitude = _mm_slli_epi32(_mm_and_si128(words, _mm_set1_epi32(0x7FFF)), 13);
  const __m128i finite = _mm_castps_si128(_mm_mul_ps(_mm_castsi128_ps(magnitude), _mm_set1_ps(0x1p112f)));
  const __m128i special = _mm_cmpgt_epi32(magnitude, _mm_set1_epi32(0x0F7FFFFF));
  const __m128i value = _mm_or_si128(_mm_andnot_si128(special, finite),
                                     _mm_and_si128(special, _mm_or_si128(magnitude, _mm_set1_epi32(0x7F800000))));
  return _mm_castsi128_ps(_mm_or_si128(sign, value));
}

// NaNs may have any bits: shared memory that nobody wrote is full of them.
inline __m128 of_tf32(__m128i words) {
  const __m128 value = _mm_castsi128_ps(words);
  const __m128i exact = _mm_cmpeq_epi32(_mm_and_si128(words, _mm_set1_epi32(0x1FFF)), _mm_setzero_si128());
  const __m128 allowed = _mm_or_ps(_mm_castsi128_ps(exact), _mm_cmpunord_ps(value, value));
  if (_mm_movemask_ps(allowed) != 15) fail("an operand that is not rounded to TF32");
  return value;
}

// A row along K, four elements in each of `out`.
template <Operand kType>
inline void read_row(const Rows& rows, int row, __m128* out) {
  for (int number = 0; number < 2; ++number) {
    const __m128i chunk = rows.chunk(row, number), zero = _mm_setzero_si128();
    if constexpr (kType == Operand::tf32) {
      *out++ = of_tf32(chunk);
    } else if constexpr (kType == Operand::bf16) {
      *out++ = _mm_castsi128_ps(_mm_unpacklo_epi16(zero, chunk));
      *out++ = _mm_castsi128_ps(_mm_unpackhi_epi16(zero, chunk));
    } else {
      *out++ = of_f16(_mm_unpacklo_epi16(chunk, zero));
      *out++ = of_f16(_mm_unpackhi_epi16(chunk, zero));
    }
  }
}

// Four elements of two rows, each with its like in the other row, to multiply two rows of a by two columns of b: in
// turn (first, second, first, second) or not (first, first, second, second).
inline void spread(__m128 first, __m128 second, __m128 (&out)[4], bool in_turn) {
  const __m128 lower = _mm_unpacklo_ps(first, second), upper = _mm_unpackhi_ps(first, second);
  if (in_turn) {
    out[0] = _mm_movelh_ps(lower, lower), out[1] = _mm_movehl_ps(lower, lower);
    out[2] = _mm_movelh_ps(upper, upper), out[3] = _mm_movehl_ps(upper, upper);
  } else {
    out[0] = _mm_unpacklo_ps(lower, lower), out[1] = _mm_unpackhi_ps(lower, lower);
    out[2] = _mm_unpacklo_ps(upper, upper), out[3] = _mm_unpackhi_ps(upper, upper);
  }
}

template <Operand kType>
void multiply(const Product& p) {
  constexpr int kVectors = kType == Operand::tf32 ? 2 : 4;  // of a row along K
  const int warp = current->number / 32 % 4, lane = emulator::lane();
  const Rows rows_a(p.a), rows_b(p.b);
  __m128 first[kVectors], second[kVectors], a[kVectors][4], b[4];
  read_row<kType>(rows_a, warp * 16 + lane / 4, first);
  read_row<kType>(rows_a, warp * 16 + lane / 4 + 8, second);
  for (int v = 0; v < kVectors; ++v) spread(first[v], second[v], a[v], false);
  for (int j = 0; j < 32; ++j) {
    read_row<kType>(rows_b, j * 8 + lane % 4 * 2, first);
    read_row<kType>(rows_b, j * 8 + lane % 4 * 2 + 1, second);
    __m128 sum = _mm_setzero_ps();  // of two rows by two columns
    for (int v = 0; v < kVectors; ++v) {
      spread(first[v], second[v], b, true);
      for (int k = 0; k < 4; ++k) sum = _mm_add_ps(sum, _mm_mul_ps(a[v][k], b[k]));
    }
    float* const d = p.d + j * 4;
    _mm_storeu_ps(d, p.accumulate ? _mm_add_ps(_mm_loadu_ps(d), sum) : sum);
  }
}

}  // namespace

void multiply(const Product& product) {
  switch (product.type) {
    case Operand::f16:
      return multiply<Operand::f16>(product);
    case Operand::bf16:
      return multiply<Operand::bf16>(product);
    case Operand::tf32:
      return multiply<Operand::tf32>(product);
  }
}

}  // namespace emulator
