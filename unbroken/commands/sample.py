"""`python -m unbroken sample`: generate text from a checkpoint."""

from __future__ import annotations

import argparse
import sys

from unbroken import console
from unbroken.commands import add_model_flags
from unbroken.errors import UserError
from unbroken.run import locate


def configure(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint and the flags of sampling."""
    parser.add_argument("what", metavar="FILE|RUN", help=locate.CHECKPOINT_HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="start of the text (default: none)")
    parser.add_argument("--num_tokens", type=int, default=200, metavar="N", help="tokens to generate (default: 200)")
    parser.add_argument(
        "--num_samples", type=int, default=1, metavar="N", help="number of texts, with consecutive seeds (default: 1)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="divides the logits; 0: always the likeliest token (default: 0.8)",
    )
    parser.add_argument(
        "--top_k", type=int, default=0, metavar="N", help="draw among the N likeliest tokens (default: all)"
    )
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        metavar="X",
        help="draw among the likeliest tokens whose probabilities sum to X (default: 1)",
    )
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="decides the text (default: 1337)")
    add_model_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Print the prompt and its continuation, token by token."""
    from unbroken.inference import SamplingConfig, TextGenerator

    sampling = SamplingConfig(args.temperature, args.top_k, args.top_p)
    for name in ("num_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: it must be at least 1")
    if not 0 <= args.seed < 2**63 - args.num_samples:
        raise UserError(f"--seed {args.seed}: it must be at least 0 and below 2**63")
    with locate.open_newest(args.what) as file:
        generator = TextGenerator(file, args.tokenizer, args.device, args.bpe_dir)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(console.colored(f"--- {number + 1} of {args.num_samples}", console.DIM))
        for text in generator.generate(args.prompt, args.num_tokens, sampling, args.seed + number):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
    return 0
