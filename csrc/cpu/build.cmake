# How the CPU's kernels are compiled. Gives what whoever offers their calls (../calls.h) needs:
# `kernel_objects` to link, `kernel_list` to define as CMDP_VARIANTS, and `call_flags`.
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()
set(CMAKE_CXX_STANDARD 20)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
set(CMAKE_CXX_EXTENSIONS OFF)
set(CMAKE_POSITION_INDEPENDENT_CODE ON)
set(CMAKE_CXX_VISIBILITY_PRESET hidden)

# "address,undefined" or "thread" (.ci/sanitizers): for what GCC and Clang call sanitizers. -O1 compiles in a fifth of
# the time, and keeps more of the accesses to memory that the sources have.
set(CMDP_FAST_SANITIZE "" CACHE STRING "sanitizers to compile with, separated by commas")
set(optimization -O3)
if(CMDP_FAST_SANITIZE)
  set(optimization -O1)
  set(CMAKE_CXX_FLAGS_RELEASE "-O1 -g1 -fno-omit-frame-pointer")
  set(CMAKE_INTERPROCEDURAL_OPTIMIZATION OFF)
  set(CMAKE_STRIP "")  # reports name functions
  # vptr: no class here has virtual functions, and the check's own look at memory is a data race to "thread".
  add_compile_options(-fsanitize=${CMDP_FAST_SANITIZE} -fno-sanitize=vptr -fno-sanitize-recover=all)
  add_link_options(-fsanitize=${CMDP_FAST_SANITIZE})
endif()

# The kernels, compiled once per instruction set; the module chooses when it is imported. Contraction to fused
# multiply-adds is meant; reassociation is not allowed, so that a row's result is the same wherever it is computed. The
# vectors are explicit, and GCC 12's own pairing of scalars (SLP) drops a rounding to float that gradient.h depends on.
set(kernel_flags ${optimization} -ffp-contract=fast -fno-math-errno -fno-tree-slp-vectorize -Wall -Wextra -Wno-psabi -Wno-maybe-uninitialized)
# What calls them is not contracted: a budget's account is the same bits on every processor.
set(call_flags -Wall -Wextra -ffp-contract=off)

# `kernel_variants`: from the oldest instruction set to the newest. variants.h knows what runs each.
set(processor "${CMAKE_SYSTEM_PROCESSOR}")
if(CMAKE_OSX_ARCHITECTURES)  # several at once are compiled from one list of flags: the baseline of each
  set(processor "${CMAKE_OSX_ARCHITECTURES}")
endif()
if(processor MATCHES "^(x86_64|AMD64|amd64)$")
  set(kernel_variants x86_64_v2 x86_64_v3 x86_64_v4)
  set(options_x86_64_v2 -march=x86-64-v2)
  set(options_x86_64_v3 -march=x86-64-v3)
  set(options_x86_64_v4 -march=x86-64-v4)
elseif(processor MATCHES "^(aarch64|arm64|ARM64)$")
  set(kernel_variants neon)
  # One variant per length of vectors: only types of a known length can be elements of arrays and members. 256 bits are
  # Graviton3, 128 bits Graviton4, Grace, Axion and Cobalt; all of them have bfloat16. On Linux, which tells the length.
  foreach(bits 128 256)
    set(options_sve_${bits} -march=armv8.2-a+sve+bf16 -msve-vector-bits=${bits})
  endforeach()
  if(CMAKE_SYSTEM_NAME STREQUAL Linux)
    include(CheckCXXSourceCompiles)
    string(REPLACE ";" " " CMAKE_REQUIRED_FLAGS "${options_sve_128}")
    check_cxx_source_compiles("
      #include <arm_sve.h>
      typedef svfloat32_t Floats __attribute__((arm_sve_vector_bits(__ARM_FEATURE_SVE_BITS)));
      Floats twice(Floats v) { return v + v * 1.0f; }
      int main() {}" CMDP_COMPILER_KNOWS_SVE)
    unset(CMAKE_REQUIRED_FLAGS)
    if(CMDP_COMPILER_KNOWS_SVE)
      list(APPEND kernel_variants sve_128 sve_256)
    endif()
  endif()
else()
  set(kernel_variants baseline)
endif()
foreach(variant ${kernel_variants})
  add_library(kernels_${variant} OBJECT ${CMAKE_CURRENT_LIST_DIR}/kernels.cpp)
  target_compile_definitions(kernels_${variant} PRIVATE CMDP_ISA=${variant})
  target_compile_options(kernels_${variant} PRIVATE ${kernel_flags} ${options_${variant}})
  list(APPEND kernel_objects $<TARGET_OBJECTS:kernels_${variant}>)
  string(APPEND kernel_list "CMDP_VARIANT(${variant})")
endforeach()
