"""Hugging Face Llama directories in and out of training, and a check that both sides say the same.

    python tools/convert_hf.py import HF_DIR CKPT_DIR              models.policy=CKPT_DIR loads at any layout
    python tools/convert_hf.py export RUN_DIR HF_DIR --role policy transformers and vLLM load HF_DIR
    python tools/convert_hf.py verify HF_DIR CKPT_DIR              compares logits; also under torchrun

Where a CKPT_DIR is read it may be an imported directory, a model's directory in a checkpoint, a checkpoint
(iter_NNNNNNN) or a run directory, whose newest good checkpoint is taken. Exit codes: 1 the two sides of verify differ
or the disk failed, 2 the input is wrong; one line on stderr says how, and nothing is left behind.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from megatron_gil.config import ConfigError
from megatron_gil.console import run_interruptible
from megatron_gil.models.convert.copy import DTYPES, Written, export_model, import_model
from megatron_gil.models.convert.locate import ROLE_DIRECTORIES
from megatron_gil.paths import expand_user


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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


def run(given: argparse.Namespace) -> int:
    if given.action == "import":
        _say(given.hf_dir, import_model(given.hf_dir, given.ckpt_dir, allow_bin=given.allow_bin, dtype=given.dtype))
        return 0
    if given.action == "export":
        _say(given.ckpt_dir, export_model(given.ckpt_dir, given.hf_dir, role=given.role, dtype=given.dtype, note=_note))
        return 0
    from megatron_gil.engine.verify import verify

    return verify(
        given.hf_dir,
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
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, which all come to the same
        print(line, file=sys.stderr)


def main(arguments: list[str] | None = None) -> int:
    given = parse(arguments)
    return run_interruptible(f"convert_hf {given.action}", lambda: _guarded(given))


def _guarded(given: argparse.Namespace) -> int:
    try:
        return run(given)
    except ConfigError as error:
        _note(f"convert_hf {given.action}: {error}")
        return 2


if __name__ == "__main__":
    sys.exit(main())
