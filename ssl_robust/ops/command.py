"""The command `ssl-robust`, for those who installed the package: what the Makefile does in a checkout.

Nothing of the package is imported before the folder is known in which it works.
"""

import argparse
import os
import shutil
import sys
from importlib import import_module

COMMANDS = {  # name: module of ops/, its option, what it does
    "run": ("stages", ["--run"], "run the notebooks that are not done; all tables and figures"),
    "plan": ("run", ["--plan"], "what a run would do: rows, minutes, memory, disk, what is missing"),
    "data": ("fetch", [], "fetch data sets and encoder weights into --data FOLDER"),
    "explain": ("explain", [], "how a value came about: TABLE/DATASET/ENCODER/DEFENSE/ATTACK"),
    "remake": ("explain", ["--again"], "make a value again, alone, and compare it"),
    "lab": ("lab", [], "JupyterLab on copies of the notebooks"),
    "init": ("", [], "write notebooks/ and params/ into the folder, to change them and add profiles"),
}
ROOT = "folder to work in, with its own params/ and notebooks/ if it has them (else: the current one)"


def _parser() -> argparse.ArgumentParser:
    about = "Attacks on frozen self-supervised encoders: tables and figures from notebooks."
    lines = "\n".join(f"  {name:8} {does}" for name, (_, _, does) in COMMANDS.items())
    more = f"commands:\n{lines}\n\nAdd --profile NAME and --data FOLDER; 'ssl-robust COMMAND --help' lists the rest."
    form = argparse.RawDescriptionHelpFormatter
    options = {"add_help": False, "allow_abbrev": False, "formatter_class": form}
    parser = argparse.ArgumentParser("ssl-robust", description=about, epilog=more, **options)
    parser.add_argument("command", choices=COMMANDS, nargs="?", metavar="COMMAND", help="one of those below")
    parser.add_argument("--root", metavar="FOLDER", help=ROOT)
    return parser


def _init() -> int:
    from ..settings import NOTEBOOKS, PARAMS, ROOT

    for source in (NOTEBOOKS, PARAMS):
        target = ROOT / source.name.strip("_")
        if source == target:
            print(f"{target} is there and stays as it is.")
        else:
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            print(f"{target} is made.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Command line; returns the exit code. What follows the command is read by the module that does it."""
    parser = _parser()
    asked, rest = parser.parse_known_args(argv)
    if not asked.command:
        parser.print_help()
        return 0 if {"-h", "--help"} & {*rest} else 2
    if asked.root is not None:
        os.environ["SSL_ROBUST_ROOT"] = asked.root
    module, options, _ = COMMANDS[asked.command]
    return import_module(f".{module}", __package__).main([*options, *rest]) if module else _init()


if __name__ == "__main__":
    sys.exit(main())
