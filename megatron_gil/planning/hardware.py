"""GPUs, and what the planner assumes of them. Every number is from a data sheet or is an assumption; we measured
none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Gpu:
    """From NVIDIA's data sheets."""

    name: str
    peak_flops: float
    """bfloat16, dense, per second."""
    memory_bandwidth: float
    """Bytes per second."""
    link_bandwidth: float
    """NVLink, bytes per second in one direction."""


GPUS = {
    "a100": Gpu(name="A100 80 GB", peak_flops=312e12, memory_bandwidth=2.0e12, link_bandwidth=300e9),
    "h100": Gpu(name="H100 80 GB", peak_flops=989e12, memory_bandwidth=3.35e12, link_bandwidth=450e9),
    "h200": Gpu(name="H200 141 GB", peak_flops=989e12, memory_bandwidth=4.8e12, link_bandwidth=450e9),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Assumptions:
    """What turns sizes into seconds."""

    training_mfu: float = 0.20
    """Share of the peak that forward and backward reach, pipeline bubbles and communication not counted. verl
    reports 0.19 to 0.40. We take the lower end, because our layers are not fused."""
    memory_share: float = 0.5
    """Share of the memory bandwidth that decoding and optimizer steps reach."""
    layer_launch_s: float = 0.06e-3
    """Least time of one layer in one decoding step: some twenty small kernels of a CUDA graph, 3 microseconds each."""
    link_share: float = 0.7
    """Share of a link's bandwidth that a collective reaches."""
    collective_s: float = 25e-6
    """Least time of a collective."""
    network_bandwidth: float = 25e9
    """Between nodes, bytes per second and GPU: a 200 Gb/s adapter each."""
    gpus_per_node: int = 8
    storage_bandwidth: float = 5e9
    """Bytes per second at which a checkpoint is written, over all ranks."""

    def bandwidth(self, gpu: Gpu, span: int) -> float:
        """Bytes per second within a group whose ranks lie among `span` consecutive ones: NVLink where these fit in a
        node, else the network."""
        return self.link_share * (gpu.link_bandwidth if span <= self.gpus_per_node else self.network_bandwidth)
