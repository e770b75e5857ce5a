"""Running a model: evaluate, update, generate, save."""

from megatron_gil.parallel.cpu import import_core

import_core()  # before the modules of this package import parts of it, which would load torch's compiler on a CPU
