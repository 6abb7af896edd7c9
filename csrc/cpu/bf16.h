// Who multiplies matrices of bfloat16.
#pragma once

namespace widedeep::cpu {

// Whether this CPU multiplies bfloat16 itself: AVX512-BF16 (every CPU with AMX-BF16 has it) or Arm's BF16, and the
// system lets it.
bool multiplies_bf16();

// Whether the hidden layers' bfloat16 products are the library's rather than ours, which work in float: where the CPU
// multiplies bfloat16, unless the environment's WIDEDEEP_BF16_PRODUCTS says "own" or "library".
// Throws std::runtime_error for any other value.
bool library_bf16();

}  // namespace widedeep::cpu
