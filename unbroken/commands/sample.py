"""`python -m unbroken sample`: a checkpoint writes text."""

from __future__ import annotations

import argparse
import sys

from unbroken import console
from unbroken.errors import UserError
from unbroken.run import locate

HELP = "let a checkpoint write text"


def configure(parser: argparse.ArgumentParser) -> None:
    """Which checkpoint, and how it writes."""
    parser.add_argument("what", metavar="FILE|RUN", help=locate.CHECKPOINT_HELP)
    parser.add_argument("--prompt", default="", metavar="TEXT", help="its beginning (default: none)")
    parser.add_argument("--num_tokens", type=int, default=200, metavar="N", help="tokens to write (default: 200)")
    parser.add_argument("--num_samples", type=int, default=1, metavar="N", help="texts, by seeds in a row (default: 1)")
    parser.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0: the likeliest (default: 0.8)")
    parser.add_argument("--top_k", type=int, default=0, metavar="N", help="among the N likeliest (default: all)")
    parser.add_argument("--top_p", type=float, default=1.0, metavar="X", help="among those that sum to X (default: 1)")
    parser.add_argument("--seed", type=int, default=1337, metavar="N", help="decides the text (default: 1337)")
    parser.add_argument(
        "--tokenizer", choices=("auto", "bytes", "gpt2"), default="auto", help="auto: by the checkpoint"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="default: auto")


def run(args: argparse.Namespace) -> int:
    """Print the prompt and what the model makes of it, token by token."""
    from unbroken.inference import SamplingConfig, TextGenerator

    choice = SamplingConfig(args.temperature, args.top_k, args.top_p)
    for name in ("num_tokens", "num_samples"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} {getattr(args, name)}: it must be at least 1")
    if not 0 <= args.seed < 2**63 - args.num_samples:
        raise UserError(f"--seed {args.seed}: it must be at least 0 and below 2**63")
    with locate.open_newest(args.what) as file:
        author = TextGenerator(file, args.tokenizer, args.device)
    for number in range(args.num_samples):
        if args.num_samples > 1:
            print(console.colored(f"--- {number + 1} of {args.num_samples}", console.DIM))
        for text in author.write(args.prompt, args.num_tokens, choice, args.seed + number):
            sys.stdout.write(text)
            sys.stdout.flush()
        print()
    return 0
