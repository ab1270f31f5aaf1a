"""``python -m clp_lightning``: the command line."""

from __future__ import annotations

import errno
import json
import os
import sys
from importlib import import_module
from inspect import signature
from typing import NoReturn

HELP = """\
usage: python -m clp_lightning COMMAND [options]

Train one language model that can be steered between several rewards at inference time.

commands:
  fit        train; sweeps the front at the end and prints `front: <path>`
  validate   the front of a run on the validation prompts
  test       the front of a run on the test prompts
  predict    responses under every preference of the grid, to predictions.jsonl
  steer      answers under a preference: to a prompt, a file, in a sweep, or interactively
  pick       finds the preference that has most of one reward and enough of the others
  export     one preference as a plain Hugging Face folder, or as one PEFT adapter
  plan       the memory of a run on each device, by part, before it is started
  compare    several runs beside each other, in one table and one figure
  judge      which of two runs a language model prefers, side by side

  python -m clp_lightning COMMAND --help      options of a command
  python -m clp_lightning fit --config configs/quickstart.yaml
  python -m clp_lightning fit --config configs/quickstart.yaml --print_config
"""


TOOLS = ("compare", "export", "judge", "pick", "plan", "steer")
"""Each is a function in the module of its name; it needs no Trainer."""
COMMANDS = ("fit", "validate", "test", "predict", *TOOLS)


def run(args: list[str] | None = None) -> None:
    """Answers ``--help`` and mistakes before the imports that take seconds; runs the rest."""
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help"):
        print(HELP, end="")
        return
    if not given[0].startswith("-") and given[0] not in COMMANDS:
        print(
            f"There is no command '{given[0]}'; the commands are {', '.join(COMMANDS)}.\n"
            "See python -m clp_lightning --help.",
            file=sys.stderr,
        )
        sys.exit(2)
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from .mistakes import in_short
    from .modules import TrainingDiverged
    from .rewards import RewardError

    try:
        if given[0] in TOOLS:
            _run_tool(*given)
        else:
            from .cli import main

            main(args)
    except (
        ValueError,
        OSError,
        ModuleNotFoundError,
        MisconfigurationException,
        RewardError,
        TrainingDiverged,
    ) as error:
        if os.environ.get("CLP_LIGHTNING_TRACEBACK"):
            raise
        _refuse(f"{in_short(str(error))}{_remedy(error)}")
    except (RuntimeError, MemoryError) as error:
        message = _known(error)
        if message is None or os.environ.get("CLP_LIGHTNING_TRACEBACK"):
            raise
        _refuse(message)


def _known(error: RuntimeError | MemoryError) -> str | None:
    """What to say of an error of torch's or Lightning's; None of one that nobody foresaw."""
    said = str(error)
    if "Early stopping conditioned on metric" in said:
        return said.replace("Early stopping", "EarlyStopping.monitor: it is", 1)
    of_torch = "allocate memory" in said or "out of memory" in said.lower()
    if not of_torch and not isinstance(error, MemoryError):
        return None
    return (
        f"Out of memory: {said}. Lower batch sizes, samples, max_new_tokens or eval_rows; "
        "`python -m clp_lightning plan --config ...` says what takes how much."
    )


def _refuse(message: str) -> NoReturn:
    print(f"error: {message}", file=sys.stderr)
    print("(CLP_LIGHTNING_TRACEBACK=1 shows where it was raised.)", file=sys.stderr)
    sys.exit(2)


def _remedy(error: Exception) -> str:
    """What to do about an error of the operating system, which says only what is wrong."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return ". Make room there; --ckpt_path last goes on from the last checkpoint."
    if number in (errno.EROFS, errno.EACCES, errno.EPERM):
        return ". Give another path, for what a run writes another save_dir of its logger."
    return ""


def _run_tool(name: str, *args: str) -> None:
    from jsonargparse import ActionConfigFile, ArgumentParser

    from .keys import refuse_repeated_keys
    from .mistakes import ShortErrors

    refuse_repeated_keys()

    class Parser(ShortErrors, ArgumentParser):
        pass

    function = getattr(import_module(f".{name}", __package__), name)
    parameters = signature(function).parameters.values()
    switches = [f"--{p.name}" for p in parameters if p.annotation == "bool"]
    # jsonargparse wants `--sweep true`; a bare `--sweep` says the same.
    said = [
        f"{arg}=true" if arg in switches and after not in ("true", "false") else arg
        for arg, after in zip(args, (*args[1:], ""), strict=True)
    ]
    for parameter in parameters:
        if parameter.annotation == "list[str]":  # it has no lists of bare arguments either
            bare, said = _bare(said)
            said += [f"--{parameter.name}={json.dumps(bare)}"] if bare else []
    # Not its `auto_cli`, which keeps an argument called `config` to itself.
    parser = Parser(prog=f"python -m clp_lightning {name}")
    if "config" not in signature(function).parameters:
        parser.add_argument("--config", action=ActionConfigFile, help="A YAML file with options.")
    parser.add_function_arguments(function, as_positional=False)
    options = parser.instantiate(parser.parse_args(said)).as_dict()
    function(**{p.name: options[p.name] for p in parameters})


def _bare(args: list[str]) -> tuple[list[str], list[str]]:
    """The arguments that neither are an option nor follow one that has its value apart; the rest.

    Example:
        >>> _bare(["a", "--out", "b", "c", "--against=a"])
        (['a', 'c'], ['--out', 'b', '--against=a'])
    """
    bare: list[str] = []
    rest: list[str] = []
    for before, arg in zip(("", *args), args, strict=False):
        takes = before.startswith("--") and "=" not in before
        (rest if takes or arg.startswith("-") else bare).append(arg)
    return bare, rest


if __name__ == "__main__":
    run()
