"""Building a model and moving its weights."""

import megatron_gil.parallel  # noqa: F401  silences megatron.core's import warnings before it is imported
