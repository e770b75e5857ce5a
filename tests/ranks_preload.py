"""What the server that forks test ranks imports once."""

import transformers.models.llama.modeling_llama  # noqa: F401

import megatron_gil.models.hf
import megatron_gil.training.commands  # noqa: F401
