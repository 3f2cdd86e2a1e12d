# fourbit_add_kernels(name): the kernels as a static library, one source an instruction set, each with its own
# flags. Shared by the Python module and by the tests' programs.
set(FOURBIT_FLAGS -O3 -Wall -Wextra -fno-exceptions -fno-rtti -fno-math-errno -ffp-contract=off)
if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
  list(APPEND FOURBIT_FLAGS -Wno-maybe-uninitialized)  # clang does not know it
endif()

set(FOURBIT_CPU_SRC ${CMAKE_CURRENT_LIST_DIR}/src)

function(fourbit_add_kernels name)
  set(src ${FOURBIT_CPU_SRC})
  add_library(${name} STATIC ${src}/dispatch.cpp ${src}/parallel.cpp ${src}/workspace.cpp
              ${src}/isa/scalar.cpp)
  string(TOLOWER "${CMAKE_SYSTEM_PROCESSOR}" processor)
  if(processor MATCHES "x86_64|amd64")
    set(avx2 -mavx2 -mfma -mf16c)
    set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512)
    target_sources(${name} PRIVATE ${src}/isa/avx2.cpp ${src}/isa/avx512.cpp ${src}/isa/avx512_bf16.cpp)
    set_property(SOURCE ${src}/isa/avx2.cpp PROPERTY COMPILE_OPTIONS ${avx2})
    set_property(SOURCE ${src}/isa/avx512.cpp PROPERTY COMPILE_OPTIONS ${avx512})
    set_property(SOURCE ${src}/isa/avx512_bf16.cpp PROPERTY COMPILE_OPTIONS ${avx512} -mavx512bf16)
    target_compile_definitions(${name} PUBLIC FOURBIT_X86)
  elseif(processor MATCHES "aarch64|arm64")
    target_sources(${name} PRIVATE ${src}/isa/neon.cpp)
    target_compile_definitions(${name} PUBLIC FOURBIT_ARM64)
  endif()
  target_include_directories(${name} PUBLIC ${src})
  target_compile_features(${name} PUBLIC cxx_std_20)
  target_compile_options(${name} PRIVATE ${FOURBIT_FLAGS})
  set_target_properties(${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
                                           VISIBILITY_INLINES_HIDDEN ON)
endfunction()
