"""Ranks, process groups, collectives.

Importing it silences what megatron.core says at import of the optional Transformer Engine and Apex (it falls back to
torch, which is what we run on), and at run time of names that torch has renamed since; and what torch, of which
megatron.core imports the compiler's part, says where there is an nvcc but no GPU to be seen.
"""

import logging
import warnings

for _message, _category in (
    (r"(Transformer Engine and )?Apex (is|are) not installed", UserWarning),
    (r"`torch\.distributed\.\w+` is deprecated", FutureWarning),
):
    warnings.filterwarnings("ignore", message=_message, category=_category)
logging.getLogger("torch.utils.cpp_extension").addFilter(lambda record: "No CUDA runtime is found" not in record.msg)
