"""The run of train_muon.py with every option of zoo/: other routers, experts, attentions, depths, mixtures of domains.

    python train_zoo.py --depth loop --halt act
    python train_zoo.py --optimizer adamw --preset 100m --data data/domains
"""

import train_muon
from model import Parser
from zoo.recipes import RECIPES


def main():
    parser = Parser(prog="train_zoo.py", add_help=False)
    parser.add_argument("--optimizer", choices=list(RECIPES), default="muon", help="also the default experiment name")
    chosen, rest = parser.parse_known_args()
    if {"-h", "--help"} & set(rest):
        parser.print_help()
    train_muon.main(RECIPES[chosen.optimizer], rest)


if __name__ == "__main__":
    main()
