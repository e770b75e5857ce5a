"""What the server that forks test ranks imports once."""

import transformers.models.llama.modeling_llama  # noqa: F401
