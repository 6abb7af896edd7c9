# libwidedeep_cuda.so: the kernels and their bindings. Looks for nvcc, not for a GPU. Sets WIDEDEEP_CUDA_{ARCHS,NOTE} and
# WIDEDEEP_CUBLASLT for build_info().
include(CheckLanguage)
file(GLOB cuda_kernels CONFIGURE_DEPENDS csrc/kernels/*.cu csrc/kernels/*.cpp)
file(GLOB cuda_bindings CONFIGURE_DEPENDS csrc/bindings/*_cuda.cpp)

if(NOT WIDEDEEP_CUDA)
  set(WIDEDEEP_CUDA_NOTE "switched off by WIDEDEEP_CUDA=OFF")
else()
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(WIDEDEEP_CUDA_NOTE "nvcc not found: put the nvcc of a CUDA 12.8+ toolkit on PATH and install again")
  endif()
endif()
if(WIDEDEEP_CUDA_NOTE)
  message(STATUS "widedeep: CPU only (${WIDEDEEP_CUDA_NOTE})")
  return()
endif()

# Ampere and Hopper machine code (90a: wgmma and setmaxnreg), and one PTX for every later GPU.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(CMAKE_CUDA_ARCHITECTURES "80-real;90a-real;90-virtual" CACHE STRING "GPU architectures")
endif()
# Each nvcc call keeps its ptxas report beside the object, and fails when ptxas serialises wgmma (C7510).
set(CMAKE_CUDA_COMPILER_LAUNCHER ${Python_EXECUTABLE} ${CMAKE_SOURCE_DIR}/cmake/nvcc_log.py)
enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 20)

# cuBLASLt: the toolkit's header, else the nvidia-cublas wheel's (extra `cuda13`); linked by soname, which torch has loaded.
cmake_path(GET WIDEDEEP_TORCH_DIR PARENT_PATH site_packages)
find_path(CUBLASLT_INCLUDE cublasLt.h HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES} ${site_packages}/nvidia/cu13/include
          ${site_packages}/nvidia/cublas/include)
find_library(CUBLASLT_LIBRARY NAMES libcublasLt.so.13 libcublasLt.so.12 libcublasLt.so
             HINTS ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}/../lib64 ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES}/../lib
                   ${site_packages}/nvidia/cu13/lib ${site_packages}/nvidia/cublas/lib)
if(CUBLASLT_INCLUDE AND CUBLASLT_LIBRARY)
  set(WIDEDEEP_CUBLASLT ON)
  # Beside a wheel's header may lie those of another CUDA than the toolkit's, which do not mix: it goes alone.
  set(cublas_include ${CMAKE_BINARY_DIR}/cublas)
  file(MAKE_DIRECTORY ${cublas_include})
  foreach(name cublasLt.h cublas_api.h)
    file(CREATE_LINK ${CUBLASLT_INCLUDE}/${name} ${cublas_include}/${name} SYMBOLIC)
  endforeach()
else()
  list(FILTER cuda_kernels EXCLUDE REGEX "_cublaslt\\.cpp$")
  message(WARNING "widedeep: cublasLt.h not found, the matrix kernels are left out; "
                  "pip install --no-deps 'nvidia-cublas>=13,<14' brings it")
endif()

add_library(widedeep_cuda SHARED ${cuda_kernels} ${cuda_bindings})
target_include_directories(widedeep_cuda PRIVATE csrc)
target_compile_definitions(widedeep_cuda PRIVATE USE_CUDA NDEBUG WIDEDEEP_CUBLASLT=$<BOOL:${WIDEDEEP_CUBLASLT}>)
target_compile_options(widedeep_cuda PRIVATE
  $<$<COMPILE_LANGUAGE:CUDA>:-O3 --expt-relaxed-constexpr -lineinfo -Xptxas=-v -Xcompiler=-Wall>
  $<$<COMPILE_LANGUAGE:CXX>:-O2 -Wall -Wextra -Wno-unused-parameter>)
target_include_directories(widedeep_cuda SYSTEM PRIVATE ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
target_link_libraries(widedeep_cuda PRIVATE torch_stable)
if(WIDEDEEP_CUBLASLT)
  target_include_directories(widedeep_cuda SYSTEM PRIVATE ${cublas_include})
  target_link_libraries(widedeep_cuda PRIVATE ${CUBLASLT_LIBRARY})
endif()
# The stream symbols live in libtorch_cuda, which a CPU torch lacks: there the library links, but can only be loaded elsewhere.
if(EXISTS ${WIDEDEEP_TORCH_DIR}/lib/libtorch_cuda.so)
  target_link_libraries(widedeep_cuda PRIVATE torch_cuda c10_cuda)
endif()
set_target_properties(widedeep_cuda PROPERTIES LINKER_LANGUAGE CXX CUDA_RUNTIME_LIBRARY Static)
install(TARGETS widedeep_cuda LIBRARY DESTINATION .)
string(REPLACE ";" "," WIDEDEEP_CUDA_ARCHS "${CMAKE_CUDA_ARCHITECTURES}")
