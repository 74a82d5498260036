// Python's view of cpu/losses.h.

#include "bindings.h"

#include "cpu/losses.h"

void bind_losses(py::module_& module) { (void)module; }
