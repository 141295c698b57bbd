"""The run of train_muon.py with every option of zoo/: other routers, experts, attention kinds, depths, mixtures of
domains.

    python train_zoo.py --depth loop --halt act
    python train_zoo.py --optimizer adamw --preset 100m --data data/domains
"""

import signal
import sys

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports ends without a traceback

import train_muon
from cli import Parser, command_line
from zoo.config import is_list, listed_kinds
from zoo.recipes import RECIPES


def main():
    parser = Parser(prog="train_zoo.py", add_help=False)
    parser.add_argument("--optimizer", choices=list(RECIPES), default="muon")
    parser.add_argument("--experts")
    args, rest = parser.parse_known_args(sys.argv[1:])
    if {"-h", "--help"} & set(rest):
        print("train_zoo.py: the flags below, --optimizer {muon,adamw}, and the options of zoo/ (--help zoo)")
    if args.experts is not None:
        with command_line("train_zoo.py"):
            counted = [f"--num_experts={len(listed_kinds(args.experts))}"] if is_list(args.experts) else []
        rest = [f"--experts={args.experts}", *counted, *rest]
    train_muon.main(RECIPES[args.optimizer], rest)


if __name__ == "__main__":
    main()
