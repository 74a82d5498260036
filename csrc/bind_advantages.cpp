// Python's view of cpu/advantages.h.

#include "bindings.h"

#include "cpu/advantages.h"

void bind_advantages(py::module_& module) { (void)module; }
