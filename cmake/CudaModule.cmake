# xaifast._cuda: built when a working nvcc (CUDA 11.8 or newer) is found, statically linked to the CUDA runtime so that
# it imports on machines without a driver.
string(TOUPPER "${XAIFAST_CUDA}" XAIFAST_CUDA)
if(NOT XAIFAST_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "XAIFAST_CUDA must be AUTO, ON or OFF, got '${XAIFAST_CUDA}'")
endif()
if(XAIFAST_CUDA STREQUAL "OFF")
  message(STATUS "xaifast: CUDA kernels are off (XAIFAST_CUDA=OFF)")
  return()
endif()

include(CheckLanguage)
include(CudaArchs)

# A compiler named by ENV{CUDACXX} is tried by check_language before use; a preset CMAKE_CUDA_COMPILER would skip the
# trial and turn a broken nvcc into a hard error.
if(NOT DEFINED ENV{CUDACXX})
  find_program(_nvcc nvcc HINTS ENV CUDA_HOME ENV CUDA_PATH PATHS /usr/local/cuda PATH_SUFFIXES bin NO_CACHE)
  if(_nvcc)
    set(ENV{CUDACXX} "${_nvcc}")
  endif()
endif()
if(NOT CMAKE_CUDA_COMPILER)
  unset(CMAKE_CUDA_COMPILER CACHE)  # forget an earlier failure: nvcc may have been installed since
endif()
check_language(CUDA)
if(CMAKE_CUDA_COMPILER)
  xaifast_cuda_archs(XAIFAST_ARCH_LIST)
endif()
if(NOT XAIFAST_ARCH_LIST)
  set(_reason "no working nvcc of CUDA 11.8 or newer was found (searched CUDACXX, PATH, CUDA_HOME, /usr/local/cuda)")
  if(XAIFAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "XAIFAST_CUDA=ON, but ${_reason}. Install the CUDA toolkit, name nvcc with CUDACXX, "
                        "or set XAIFAST_CUDA=AUTO or OFF.")
  endif()
  message(STATUS "xaifast: building without CUDA kernels: ${_reason}")
  return()
endif()

set(CMAKE_CUDA_ARCHITECTURES "${XAIFAST_ARCH_LIST}")
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
set(CMAKE_CUDA_VISIBILITY_PRESET hidden)
enable_language(CUDA)
message(STATUS "xaifast: CUDA ${CMAKE_CUDA_COMPILER_VERSION} kernels for ${CMAKE_CUDA_ARCHITECTURES}")

# The kernels live in their own library: pybind11's compile options do not reach nvcc.
add_library(xaifast_cuda OBJECT csrc/cuda/compact.cu)
target_include_directories(xaifast_cuda PRIVATE csrc/include)
target_compile_options(
  xaifast_cuda PRIVATE $<$<COMPILE_LANGUAGE:CUDA>:-lineinfo -Xcompiler=-Wall,-Wextra
                       $<$<BOOL:${XAIFAST_WERROR}>:-Werror=all-warnings>>)

pybind11_add_module(_cuda MODULE NO_EXTRAS csrc/bindings/cuda.cpp)
find_package(CUDAToolkit REQUIRED)
target_link_libraries(_cuda PRIVATE xaifast_flags xaifast_cuda CUDA::cudart_static)
xaifast_cuda_arch_names(_archs ${CMAKE_CUDA_ARCHITECTURES})
target_compile_definitions(
  _cuda PRIVATE XAIFAST_CUDA_ARCHS="${_archs}" XAIFAST_CUDA_VERSION="${CMAKE_CUDA_COMPILER_VERSION}")
install(TARGETS _cuda LIBRARY DESTINATION xaifast)
