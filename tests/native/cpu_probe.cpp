// Prints, one line each, digests of what the CPU loops compute where every processor must give the same bits: sums of
// small integers, conversions, dropout masks, denormals. For tests/test_aarch64.py.
#include <cmath>
#include <cstdio>
#include <limits>
#include <type_traits>
#include <vector>

#include "core/hash.h"
#include "cpu/element.h"
#include "cpu/gemm.h"
#include "cpu/linear.h"
#include "cpu/optim.h"
#include "cpu/parallel.h"

using namespace widedeep;

void cpu::detail::run_parallel(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*),
                               void* context) {
  body(begin, end, context);
}

namespace {

constexpr core::DType kTypes[] = {core::DType::f32, core::DType::f16, core::DType::bf16};

template <typename T>
void print(const char* name, const std::vector<T>& values) {
  uint64_t digest = 0;
  for (const T& value : values) {
    uint32_t bits = 0;
    std::memcpy(&bits, &value, sizeof value);
    digest = core::absorb(digest, bits);
  }
  std::printf("%s %016llx\n", name, static_cast<unsigned long long>(digest));
}

// Which bits a NaN has may differ.
float one_nan(float v) { return std::isnan(v) ? std::numeric_limits<float>::quiet_NaN() : v; }

template <typename T>
std::vector<T> integers(int64_t n, uint64_t key) {
  std::vector<T> out(n);
  for (int64_t i = 0; i < n; ++i)
    cpu::store(static_cast<float>(static_cast<int>(core::mix64(key + i) % 9) - 4), out[i]);
  return out;
}

// Every half and bfloat16, and floats around every half with a NaN and the infinities among them.
template <typename T>
void conversions(const char* name) {
  std::vector<T> stored(1 << 16), rounded(7 << 16);
  for (size_t i = 0; i < stored.size(); ++i) stored[i].bits = static_cast<uint16_t>(i);
  std::vector<float> widened(stored.size()), around;
  cpu::load_row(stored.data(), widened.data(), static_cast<int64_t>(stored.size()));
  for (float& v : widened) v = one_nan(v);
  print(name, widened);
  for (const float v : widened)
    for (const float by : {0.99975f, 0.9995118f, 1.f, 1.0002f, 1.00048828125f, 1.0009765625f, 1.00146484375f})
      around.push_back(v * by);
  cpu::store_row(around.data(), rounded.data(), static_cast<int64_t>(around.size()));
  for (size_t i = 0; i < around.size(); ++i)
    if (std::isnan(around[i])) rounded[i].bits = std::isnan(cpu::to_float(rounded[i])) ? 1 : 0;
  print(name, rounded);
}

void products(int64_t M, int64_t N, int64_t K) {
  for (const core::DType type : kTypes)
    cpu::visit(type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      const auto a = integers<T>(M * K, 1), b = integers<T>(K * N, 2);
      std::vector<float> c(M * N);
      for (const bool at : {false, true})
        for (const bool bt : {false, true}) {
          cpu::gemm(M, N, K, {a.data(), type, at ? M : K, at}, {b.data(), type, bt ? K : N, bt}, c.data(), N);
          print("product", c);
        }
    });
}

void layer(int64_t B, int64_t I, int64_t O) {
  const auto bias = integers<float>(O, 3);
  const core::Dropout dropout = core::make_dropout(0.5, 7, 1, 2);
  for (const core::DType type : kTypes)
    cpu::visit(type, [&](auto* t) {
      using T = std::remove_pointer_t<decltype(t)>;
      const auto x = integers<T>(B * I, 4), weight = integers<T>(O * I, 5);
      std::vector<T> y(B * O), dx(B * I);
      std::vector<uint8_t> bits(B * ((O + 31) / 32 * 4));
      std::vector<float> dbias(I);
      const cpu::LinearSize size{B, I, O};
      cpu::linear_forward(type, size, x.data(), weight.data(), bias.data(), dropout, 11, y.data(), bits.data());
      print("layer", y);
      print("mask", bits);
      const auto dz = integers<T>(B * O, 6);
      cpu::linear_dgrad(type, size, dz.data(), weight.data(), {x.data(), nullptr}, 2.f, dx.data(), dbias.data());
      print("gradient", dx);
      print("sums", dbias);
    });
}

void denormals() {
  std::vector<float> weight(5000, 1.f), rms(weight.size(), 5.6e-45f), gradient(weight.size(), 0.f);
  cpu::rmsprop_dense({weight.data(), rms.data(), gradient.data(), nullptr, static_cast<int64_t>(weight.size()),
                      core::DType::f32, core::DType::f32},
                     {1e-3f, 0.5f, 1e-7f}, 1.f);
  std::printf("mean square %g\n", rms[4999]);
  volatile float small = 1e-40f;
  std::printf("flushed elsewhere %d\n", small * 2 == 0.f);
}

}  // namespace

int main() {
  conversions<cpu::Half>("half");
  conversions<cpu::BFloat16>("bfloat16");
  products(7, 5, 3);
  products(33, 129, 301);
  layer(19, 70, 131);
  denormals();
}
