# xaifast._cpu. The kernels that move much memory or compute much are compiled once per instruction set, each into its own namespace;
# the binding picks a table at import. Everything else is compiled once, at the baseline.
include(CheckCXXCompilerFlag)

# -ffp-contract=off keeps every instruction set bit-equal; -ffast-math must never appear here: it would turn on
# flush-to-zero for the whole process.
add_library(xaifast_flags INTERFACE)
target_compile_options(xaifast_flags INTERFACE -Wall -Wextra -ffp-contract=off $<$<BOOL:${XAIFAST_WERROR}>:-Werror>)
target_include_directories(xaifast_flags INTERFACE "${PROJECT_SOURCE_DIR}/csrc/include")

add_library(xaifast_cpu_flags INTERFACE)
target_link_libraries(xaifast_cpu_flags INTERFACE xaifast_flags)
if(OpenMP_CXX_FOUND)
  target_link_libraries(xaifast_cpu_flags INTERFACE OpenMP::OpenMP_CXX)
endif()

set(_isa_sources csrc/cpu/select.cpp csrc/cpu/compact.cpp csrc/cpu/cubic.cpp csrc/cpu/philox.cpp csrc/cpu/pack.cpp
    csrc/cpu/perturb.cpp csrc/cpu/occlude.cpp)
set(XAIFAST_ISAS baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  foreach(_isa v3 v4)
    check_cxx_compiler_flag(-march=x86-64-${_isa} XAIFAST_HAVE_X86_64_${_isa})
    if(XAIFAST_HAVE_X86_64_${_isa})
      list(APPEND XAIFAST_ISAS ${_isa})
    endif()
  endforeach()
endif()

pybind11_add_module(_cpu MODULE NO_EXTRAS csrc/bindings/cpu.cpp csrc/cpu/coalitions.cpp csrc/cpu/dispatch.cpp
  csrc/cpu/rank.cpp)
target_link_libraries(_cpu PRIVATE xaifast_cpu_flags)
foreach(_isa ${XAIFAST_ISAS})
  add_library(xaifast_${_isa} OBJECT ${_isa_sources})
  target_link_libraries(xaifast_${_isa} PRIVATE xaifast_cpu_flags)
  target_compile_definitions(xaifast_${_isa} PRIVATE XAIFAST_ISA=${_isa})
  target_compile_options(xaifast_${_isa} PRIVATE -O3 -fno-exceptions)
  if(NOT _isa STREQUAL "baseline")
    target_compile_options(xaifast_${_isa} PRIVATE -march=x86-64-${_isa})
    string(TOUPPER ${_isa} _upper)
    target_compile_definitions(_cpu PRIVATE XAIFAST_HAVE_${_upper})
  endif()
  target_link_libraries(_cpu PRIVATE xaifast_${_isa})
endforeach()
target_compile_definitions(_cpu PRIVATE XAIFAST_VERSION="${PROJECT_VERSION}")
install(TARGETS _cpu LIBRARY DESTINATION xaifast)
