// Python's view of cpu/sampling.h.

#include "bindings.h"

#include "cpu/sampling.h"

void bind_sampling(py::module_& module) { (void)module; }
