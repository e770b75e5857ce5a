"""Group-invariant reinforcement learning from human feedback for Llama, Qwen and Mistral models on megatron-core."""

__version__ = "0.1.0"
