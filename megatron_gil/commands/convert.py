"""`megatron-gil convert`: Hugging Face model directories in and out of training, and a check that both say the same.

    megatron-gil convert import HF_DIR CKPT_DIR               models.policy=CKPT_DIR loads at any layout
    megatron-gil convert export RUN_DIR HF_DIR --role policy  transformers and vLLM load HF_DIR
    megatron-gil convert verify HF_DIR CKPT_DIR               compares logits; also under torchrun

Where an HF_DIR is read it may be a name on the Hugging Face Hub, OWNER/NAME or OWNER/NAME@REVISION.
Where a CKPT_DIR is read it may be an imported directory, a model's directory in a checkpoint, a checkpoint
(iter_NNNNNNN) or a run directory, whose newest good checkpoint is taken. Exit codes: 1 the two sides of verify differ
or the disk failed, 2 the input is wrong; one line on stderr says how, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.data.hub import fetched
from megatron_gil.models.convert.copy import DTYPES, Written, export_model, import_model
from megatron_gil.models.convert.locate import ROLE_DIRECTORIES
from megatron_gil.paths import expand_user

Verify = Callable[..., int]


def convert(arguments: Sequence[str], *, verify: Verify) -> int:
    """verify: the function that compares logits. It is handed in so that the other commands do not import torch."""
    given = _parse(arguments)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that `finally` removes what was begun
    try:
        return _run(given, verify)
    except ConfigError as error:
        _note(f"megatron-gil convert {given.action}: {error}")
        return 2
    except OSError as error:
        _note(f"megatron-gil convert {given.action}: {error}")
        return 1


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="megatron-gil convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    bring, send, verify = (
        actions.add_parser(name, help=text, description=text)
        for name, text in (
            ("import", "a Hugging Face directory to a checkpoint directory"),
            ("export", "one model of a checkpoint to a Hugging Face directory"),
            ("verify", "compare the logits of transformers' model and ours at every position"),
        )
    )
    bring.add_argument("hf_dir", type=expand_user, metavar="HF_DIR")
    bring.add_argument("ckpt_dir", type=expand_user, metavar="CKPT_DIR", help="must not exist yet")
    bring.add_argument("--allow-bin", action="store_true", help="read the tensors of pytorch_model*.bin pickles")
    send.add_argument("ckpt_dir", type=expand_user, metavar="CKPT_DIR")
    send.add_argument("hf_dir", type=expand_user, metavar="HF_DIR", help="must not exist yet")
    send.add_argument("--role", choices=ROLE_DIRECTORIES, help="which model (default: the policy, or the only one)")
    for action in (bring, send):
        action.add_argument("--dtype", choices=DTYPES, help="store the weights so (default: as they are, bit for bit)")
    verify.add_argument("hf_dir", type=expand_user, metavar="HF_DIR")
    verify.add_argument("ckpt_dir", type=expand_user, metavar="CKPT_DIR")
    verify.add_argument("--role", choices=ROLE_DIRECTORIES, help="which model of CKPT_DIR")
    verify.add_argument("--tolerance", type=float, default=1e-4, help="largest difference of a logit (default 1e-4)")
    verify.add_argument("--prompts", nargs="+", metavar="TEXT", help="texts to compare on, besides random token ids")
    verify.add_argument("--tensor-size", type=int, default=1, help="tensor-parallel ranks of our side")
    verify.add_argument("--pipeline-size", type=int, default=1, help="pipeline-parallel ranks of our side")
    verify.add_argument("--allow-bin", action="store_true", help="let transformers read HF_DIR's .bin files")
    return parser.parse_args(arguments)


def _run(given: argparse.Namespace, verify: Verify) -> int:
    if given.action == "export":
        _say(given.ckpt_dir, export_model(given.ckpt_dir, given.hf_dir, role=given.role, dtype=given.dtype, note=_note))
        return 0
    hf_dir = fetched(str(given.hf_dir), "model", "HF_DIR")
    if given.action == "import":
        _say(given.hf_dir, import_model(hf_dir, given.ckpt_dir, allow_bin=given.allow_bin, dtype=given.dtype))
        return 0
    return verify(
        hf_dir,
        given.ckpt_dir,
        role=given.role,
        tolerance=given.tolerance,
        prompts=given.prompts,
        tensor_size=given.tensor_size,
        pipeline_size=given.pipeline_size,
        allow_bin=given.allow_bin,
        note=_note,
    )


def _say(source: Path, written: Written) -> None:
    size = f"{written.num_tensors} tensors, {written.num_bytes / 2**20:.1f} MiB in {written.num_files} file(s)"
    print(f"{source} -> {written.path}: {size}")


def _note(line: str) -> None:
    if os.environ.get("RANK", "0") == "0":  # under torchrun all processes find the same; one prints it
        print(line, file=sys.stderr)
