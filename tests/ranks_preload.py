"""What the server that forks test ranks imports once."""

import transformers.models.llama.modeling_llama  # noqa: F401

import megatron_gil.models.hf
import megatron_gil.models.transformer  # noqa: F401
from megatron_gil.parallel.cpu import install_cpu_shim

install_cpu_shim()
