"""A GPU that is not there: CPU tensors that pretend to lie on it, so that mistakes with devices show in `make test`.

from tests.pretend.device import pretended_gpus
python -m tests.pretend -m megatron_gil ppo --config ... run.dir=...     any module or script, as python runs it
"""
