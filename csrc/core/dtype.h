// The storage types an activation can have. The numbers are ours, not torch's: kernels know no torch.
#pragma once

namespace widedeep::core {

enum class DType { f32, f16, bf16 };

inline int bytes_of(DType t) { return t == DType::f32 ? 4 : 2; }

}  // namespace widedeep::core
