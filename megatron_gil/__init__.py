"""Group-invariant reinforcement learning from human feedback for Llama models on megatron-core."""

__version__ = "0.1.0"
