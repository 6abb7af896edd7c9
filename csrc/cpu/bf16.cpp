#include "cpu/bf16.h"

#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>
#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace widedeep::cpu {

bool multiplies_bf16() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx512bf16");
#elif defined(__aarch64__) && defined(__linux__)
  constexpr unsigned long kBf16 = 1ul << 14;  // HWCAP2_BF16
  return (getauxval(AT_HWCAP2) & kBf16) != 0;
#else
  return false;
#endif
}

bool library_bf16() {
  const char* value = std::getenv("WIDEDEEP_BF16_PRODUCTS");
  const std::string_view wanted = value == nullptr ? "" : value;
  if (wanted == "" || wanted == "auto") return multiplies_bf16();
  if (wanted == "own" || wanted == "library") return wanted == "library";
  throw std::runtime_error("WIDEDEEP_BF16_PRODUCTS: expected auto, own or library, got " + std::string(wanted));
}

}  // namespace widedeep::cpu
