"""Running a model: evaluate, update, generate, save."""

from megatron_gil import parallel as parallel  # first: it silences what megatron.core says when it is imported
