# Whether the CUDA kernels are built, for which GPUs, and why not. Gives `cuda_note`, a line for `cmdp-fast info`.
#
# CMDP_FAST_CUDA (CMake variable, or else environment variable):
#   1     build them for every architecture below, or fail: for wheels, and where there is no GPU
#   auto  (default) build them if there are both an nvcc and an NVIDIA GPU, and for the GPUs found only. What cannot run
#         here costs an installation nothing.
#   0     do not.
# CMAKE_CUDA_ARCHITECTURES, or CMake's own environment variable CUDAARCHS (90, or 90-real;100-real), names other
# architectures.
if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES AND NOT "$ENV{CUDAARCHS}" STREQUAL "")
  set(CMAKE_CUDA_ARCHITECTURES "$ENV{CUDAARCHS}")
endif()
if(NOT DEFINED CMDP_FAST_CUDA)
  set(CMDP_FAST_CUDA "$ENV{CMDP_FAST_CUDA}")
endif()
if(CMDP_FAST_CUDA STREQUAL "")
  set(CMDP_FAST_CUDA auto)
endif()
set(CMDP_FAST_CUDA "${CMDP_FAST_CUDA}" CACHE STRING "build the CUDA kernels: 0, 1 or auto")
if(NOT CMDP_FAST_CUDA MATCHES "^(0|1|auto)$")
  message(FATAL_ERROR "CMDP_FAST_CUDA must be 0, 1 or auto, got '${CMDP_FAST_CUDA}'")
endif()

set(cuda_note "")  # why the kernels are not built; empty if they are
if(CMDP_FAST_CUDA STREQUAL "0")
  set(cuda_note "not built: CMDP_FAST_CUDA=0")
  if(CMDP_FAST_CUDA_NOTE)  # setup.py, having chosen 0, gives the true reason
    set(cuda_note "${CMDP_FAST_CUDA_NOTE}")
  endif()
endif()
# First the check that takes no time: to look for nvcc takes seconds.
if(NOT cuda_note AND CMDP_FAST_CUDA STREQUAL "auto" AND NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
  set(capabilities "")
  find_program(nvidia_smi nvidia-smi)
  if(nvidia_smi)
    execute_process(COMMAND ${nvidia_smi} --query-gpu=compute_cap --format=csv,noheader
                    OUTPUT_VARIABLE capabilities ERROR_QUIET)
  endif()
  string(REGEX MATCHALL "[0-9]+\\.[0-9]" capabilities "${capabilities}")
  string(REPLACE "." "" capabilities "${capabilities}")
  list(FILTER capabilities EXCLUDE REGEX "^[1-7].$")  # older than 8.0: no bfloat16 arithmetic
  list(REMOVE_DUPLICATES capabilities)
  if(capabilities)
    set(CMAKE_CUDA_ARCHITECTURES ${capabilities})
  else()
    set(cuda_note "not built: no NVIDIA GPU of compute capability 8.0 or later was found (CMDP_FAST_CUDA=1 builds all)")
  endif()
endif()
if(NOT cuda_note)
  include(CheckLanguage)
  check_language(CUDA)
  if(NOT CMAKE_CUDA_COMPILER)
    set(cuda_note "not built: no nvcc was found")
  endif()
endif()
if(NOT cuda_note)
  if(NOT DEFINED CMAKE_CUDA_ARCHITECTURES)
    # Machine code for each, and PTX that the driver compiles for any other GPU.
    set(CMAKE_CUDA_ARCHITECTURES 80 86-real 89-real 90-real 100-real 120-real)
  endif()
  enable_language(CUDA)
  if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.8)
    set(cuda_note "not built: nvcc ${CMAKE_CUDA_COMPILER_VERSION} is older than 12.8")
  endif()
endif()
if(cuda_note AND CMDP_FAST_CUDA STREQUAL "1")
  message(FATAL_ERROR "CMDP_FAST_CUDA=1, but the CUDA kernels are ${cuda_note}")
endif()
if(cuda_note)
  message(STATUS "CUDA kernels ${cuda_note}")
  return()
endif()

message(STATUS "CUDA kernels for ${CMAKE_CUDA_ARCHITECTURES}")
find_package(CUDAToolkit REQUIRED)
if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)  # CMakes before 3.26 do not know that nvcc has it
  set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION -std=c++20)
endif()
# Multiplications and additions fuse only where a kernel says so: left to the compiler, the same formula could round
# differently in two kernels whose results are promised to be the same.
add_library(cuda_kernels OBJECT cuda/token_stats.cu cuda/backward.cu cuda/tail.cu)
set_target_properties(cuda_kernels PROPERTIES CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_EXTENSIONS OFF
                      CUDA_VISIBILITY_PRESET hidden)
target_compile_options(cuda_kernels PRIVATE -fmad=false --expt-relaxed-constexpr -Xfatbin=-compress-all --threads=4)
pybind11_add_module(_cuda MODULE cuda/bindings.cpp $<TARGET_OBJECTS:cuda_kernels>)
set_target_properties(_cuda PROPERTIES LINKER_LANGUAGE CXX)
target_compile_options(_cuda PRIVATE -Wall -Wextra)
# The CUDA runtime only, and that statically; its symbols stay within.
target_link_libraries(_cuda PRIVATE CUDA::cudart_static)
target_link_options(_cuda PRIVATE -Wl,--exclude-libs,ALL)
