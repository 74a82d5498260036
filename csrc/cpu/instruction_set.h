// "avx512", "avx2" or "baseline": what every kernel uses; the best that this machine has until
// set_instruction_set chooses. It throws std::invalid_argument for a set not to be had here.
#pragma once

#include <string>

namespace fuserl {

const char* instruction_set();
void set_instruction_set(const std::string& name);

}  // namespace fuserl
