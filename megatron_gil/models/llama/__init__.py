"""The Llama family: its sizes (spec.py) and its tensors (tensors.py). The rest of the program asks a spec for its
`weights`, the table of its tensors, and names none of a layer's tensors itself."""

from megatron_gil.models.llama.spec import Head, Llama3Scaling, LlamaSpec, TokenIds, check_layout, read_config

__all__ = ["Head", "Llama3Scaling", "LlamaSpec", "TokenIds", "check_layout", "read_config"]
