"""The `vllm-dsa` command. A subcommand is a module of this package, loaded only when it is asked for:

    EXAMPLE                   one command line and what it is for; ends the subcommand's --help
    add_arguments(parser)     its arguments
    run(args) -> int          does it, prints, and returns the exit status; UserError is for bad input

The first line of the module's docstring says in --help what it does. Exit status: 0 yes, 1 no, 2 bad input or usage,
130 interrupted, 141 output closed; what "yes" means is the subcommand's to say.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import vllm_dsa
from vllm_dsa.checkpoint_files import CheckpointError
from vllm_dsa.config import ConfigError
from vllm_dsa.envs import VariableError
from vllm_dsa.tools.output import UserError

COMMANDS = {
    "doctor": "does it run here, and is this model's folder right?",
    "plan": "does a model fit on these GPUs, with how much context?",
    "verify": "are the kernels right on this machine, and this model's indexer?",
    "bench": "how fast are the kernels on this machine?",
    "supervise": "run a server so that nothing of it outlives it",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns its exit status."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    asked = next((argument for argument in arguments if not argument.startswith("-")), None)
    parser = argparse.ArgumentParser(
        prog="vllm-dsa",
        description="Tools for DeepSeek Sparse Attention on vLLM.",
        epilog="`vllm-dsa COMMAND --help` shows a command's options and an example.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=vllm_dsa.__version__)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    for name, summary in COMMANDS.items():
        command = commands.add_parser(
            name, help=summary, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )
        if name == asked:
            module = import_module(f"vllm_dsa.tools.{name}")
            command.description, command.epilog = (module.__doc__ or "").splitlines()[0], module.EXAMPLE
            module.add_arguments(command)
            command.set_defaults(run=module.run)
    args = parser.parse_args(arguments)
    try:
        status: int = args.run(args)
        sys.stdout.flush()
        return status
    except (UserError, ConfigError, CheckpointError, VariableError) as error:
        print(f"vllm-dsa {asked}: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader, `head` say, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
