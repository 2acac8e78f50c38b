// A wheel for another architecture is compiled with the headers of the interpreter that builds it, whose pyconfig.h states
// the sizes of its own architecture. They must be the target's.
#include <Python.h>

#include <ctime>

static_assert(SIZEOF_SHORT == sizeof(short) && SIZEOF_INT == sizeof(int) && SIZEOF_LONG == sizeof(long) &&
                  SIZEOF_LONG_LONG == sizeof(long long) && SIZEOF_VOID_P == sizeof(void*) &&
                  SIZEOF_SIZE_T == sizeof(size_t) && SIZEOF_WCHAR_T == sizeof(wchar_t) &&
                  SIZEOF_FLOAT == sizeof(float) && SIZEOF_DOUBLE == sizeof(double) && SIZEOF_TIME_T == sizeof(time_t),
              "Python's headers are those of an architecture with other sizes of types: build with that of the target");
