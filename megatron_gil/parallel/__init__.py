"""Ranks, process groups, collectives.

Importing it silences seven warnings that no user can act on. megatron.core warns that the optional Transformer Engine
and Apex are missing; it then uses torch, as we do. It calls functions that torch has renamed, and torch warns of each;
where it frees gradient buffers, of a class that torch will remove. It imports torch's compiler, which warns on a
machine that has nvcc and no GPU. And 0.19 lays out the distributed optimizer's buffers itself, like 0.16, and says so,
that GPTModel will go, and that another of its models, which it imports, is an experiment.
"""

import logging
import warnings

for _message, _category in (
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
    (r"TypedStorage is deprecated", UserWarning),
    (r"MimoModel", UserWarning),
):
    warnings.filterwarnings("ignore", message=_message, category=_category)
for _logger, _message in (
    ("torch.utils.cpp_extension", "No CUDA runtime is found"),
    ("megatron.core.distributed.distributed_data_parallel", "full_param_layout not provided"),
    ("megatron.core.models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
):
    logging.getLogger(_logger).addFilter(lambda record, known=_message: known not in record.msg)
