# A check that fails is a C++ exception, which torch catches: both must have libstdc++ and the unwinder from the same
# libraries, those that the process has loaded. Some compilers put copies of their own into what they link (built without
# shared runtimes, or told -static-libstdc++), and such an exception ends the process. Sets WIDEDEEP_RUNTIMES: what has to
# be linked by name, nothing as a rule.
set(WIDEDEEP_RUNTIMES "")
if(NOT CMAKE_SYSTEM_NAME STREQUAL "Linux" OR NOT CMAKE_READELF)
  return()
endif()

set(probe ${CMAKE_BINARY_DIR}/exceptions)
file(WRITE ${probe}.cpp "#include <sstream>\n#include <stdexcept>\n"
                        "void refuse(int n) { std::ostringstream s; s << n; throw std::runtime_error(s.str()); }\n")
separate_arguments(flags UNIX_COMMAND "${CMAKE_CXX_FLAGS} ${CMAKE_SHARED_LINKER_FLAGS}")
execute_process(COMMAND ${CMAKE_CXX_COMPILER} ${flags} -fPIC -shared ${probe}.cpp -o ${probe}.so
                COMMAND_ERROR_IS_FATAL ANY)
execute_process(COMMAND ${CMAKE_READELF} -d ${probe}.so OUTPUT_VARIABLE needed COMMAND_ERROR_IS_FATAL ANY)
if(needed MATCHES "libc\\+\\+")
  return()
endif()

# Where the loader finds a library: what torch runs with.
set(find_loaded "import ctypes, sys
ctypes.CDLL(sys.argv[1])
print(next(line.split()[-1] for line in open('/proc/self/maps') if sys.argv[1] in line))")
foreach(runtime libstdc++.so.6 libgcc_s.so.1)
  string(FIND "${needed}" "${runtime}" at)
  if(at LESS 0)
    execute_process(COMMAND ${Python_EXECUTABLE} -c "${find_loaded}" ${runtime} OUTPUT_VARIABLE found
                    OUTPUT_STRIP_TRAILING_WHITESPACE RESULT_VARIABLE failed ERROR_QUIET)
    if(failed)
      message(FATAL_ERROR "widedeep: ${CMAKE_CXX_COMPILER} links a ${runtime} of its own into libraries, and no shared one "
                          "is there: its exceptions would end the process. Name another compiler in CXX.")
    endif()
    message(STATUS "widedeep: ${CMAKE_CXX_COMPILER} would link a ${runtime} of its own; taking ${found}")
    list(APPEND WIDEDEEP_RUNTIMES ${found})
  endif()
endforeach()
