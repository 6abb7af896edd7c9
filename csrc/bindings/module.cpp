// The Python module `_C`: importing it registers the ops; build_info() says what was built and what was left out,
// multiplies_bf16() and library_bf16() what cpu/bf16.h does; what readers of files need is in columns.cpp.
#include <pybind11/pybind11.h>

#include "bindings/columns.h"
#include "cpu/bf16.h"
#include "cpu/gemm.h"

namespace py = pybind11;

PYBIND11_MODULE(_C, m) {
  m.def("build_info", [] {
    py::dict info;
    info["version"] = WIDEDEEP_VERSION;
    info["compiler"] = WIDEDEEP_COMPILER;
    info["cpu_arch"] = WIDEDEEP_CPU_ARCH;
    info["cpu_gemm"] = widedeep::cpu::gemm_instructions();
    info["cuda_version"] = WIDEDEEP_CUDA_VERSION;
    info["cuda_archs"] = WIDEDEEP_CUDA_ARCHS;
    info["cuda_note"] = WIDEDEEP_CUDA_NOTE;
    info["cublaslt"] = static_cast<bool>(WIDEDEEP_CUBLASLT);
    return info;
  });
  m.def("multiplies_bf16", widedeep::cpu::multiplies_bf16);
  m.def("library_bf16", widedeep::cpu::library_bf16);
  widedeep::define_columns(m);
}
