"""``steer``: turn the dial of a trained policy and watch the answer change."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from .functional import parse_weights, write_weights
from .metrics import Grid
from .steerable import SteerablePolicy
from .tables import print_table
from .types import Prompt

__all__ = ["steer"]

_HELP = """\
Type a prompt. Then move the dial: {example} gives the weights, alpha=0.2 the pull to the
reference, and the prompt is answered again. An empty line ends."""
_MOVE = re.compile(r"\s*([\w-]+)\s*=\s*[-+.\d]\S*\s*")
"""What moves the dial looks like this between its commas."""


def steer(
    ckpt: str,
    prompt: str | None = None,
    prompts: str | None = None,
    weights: str | None = None,
    alpha: float | None = None,
    sweep: bool = False,
    divisions: int = 2,
    plain: bool = False,
    max_new_tokens: int | None = None,
    temperature: float = 0.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
    base: str | None = None,
    device: str | None = None,
) -> None:
    """Answers under a preference; asks for prompts where none is given.

    Args:
        ckpt: A run's folder, a .ckpt file, a saved policy's folder or its name on the hub.
        prompt: A prompt; its answer is printed as it comes.
        prompts: A file of prompts: one a line, or .jsonl with a column ``prompt``. Prints one JSON
            record a line.
        weights: The weight of every reward, as in support=.7,brevity=.3; all alike if left out.
        alpha: KL strength in [0, 1]; the smallest of the front, or of training, if left out.
        sweep: Print one response for every weighting of a grid, and the reference's.
        divisions: With ``sweep``, the weights are multiples of 1 / divisions.
        plain: Send prompts as they are. Otherwise a model with a chat template reads them as a
            user's message.
        max_new_tokens: Limit of a response; that of training if left out.
        temperature: 0 is greedy.
        top_p: Keep the smallest set of tokens with at least this probability.
        top_k: Keep the k likeliest tokens; 0 keeps all.
        seed: Key of all draws.
        base: Where the base lies, if not where the policy says.
        device: Where to compute; the first GPU if there is one, else the CPU.
    """
    if prompt is not None and prompts is not None:
        raise ValueError("Give --prompt or --prompts, not both.")
    if sweep and weights is not None:
        raise ValueError("--sweep goes through the weights itself; leave --weights out.")
    given = None if prompts is None else _read(Path(prompts))
    policy = SteerablePolicy.from_pretrained(ckpt, base=base, device=device)
    decoding = {
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "top_p": top_p,
        "top_k": top_k,
        "seed": seed,
    }
    dial = _Dial(policy, weights, alpha, decoding, chat=not plain, divisions=divisions)
    answer = dial.sweep if sweep else dial.stream
    if prompt is not None:
        answer(prompt)
    elif given is None:
        dial.converse(answer)
    else:
        for each in given:
            (dial.sweep if sweep else dial.record)(each)


class _Dial:
    """A policy, and where the user has put its dial."""

    def __init__(
        self,
        policy: SteerablePolicy,
        weights: str | None,
        alpha: float | None,
        decoding: Mapping[str, Any],
        *,
        chat: bool,
        divisions: int,
    ) -> None:
        self.policy, self.decoding, self.divisions = policy, dict(decoding), divisions
        names = policy.names
        equal = dict.fromkeys(names, 1 / len(names))
        self.weights = equal if weights is None else parse_weights(weights)
        self.alpha = policy.usual_alpha() if alpha is None else alpha
        self.chat = chat and bool(policy.policy.tokenizer.chat_template)
        policy.preference(self.weights, self.alpha)  # a mistake shows before the first prompt

    def prompt(self, text: Any) -> Prompt:
        """What the model is sent."""
        if isinstance(text, str) and self.chat:
            return [{"role": "user", "content": text}]
        prompt: Prompt = text
        return prompt

    def stream(self, text: Any) -> None:
        """Prints one answer while it grows."""
        self.policy.generate(
            [self.prompt(text)],
            self.weights,
            self.alpha,
            on_text=lambda _, piece: print(piece, end="", flush=True),
            **self.decoding,
        )
        print()

    def record(self, text: Any) -> None:
        """Prints one answer as a JSON record."""
        prompts = [self.prompt(text)]
        rollout = self.policy.generate(prompts, self.weights, self.alpha, **self.decoding)
        record = {
            "prompt": text,
            "completion": rollout.completions[0],
            "weights": self.weights,
            "alpha": self.alpha,
            "truncated": bool(rollout.truncated[0]),
        }
        print(json.dumps(record, ensure_ascii=False), flush=True)

    def sweep(self, text: Any) -> None:
        """Prints one answer for every weighting, side by side."""
        names = self.policy.names
        grid = Grid(self.divisions, [self.alpha]).preferences(names)
        each = [dict(zip(names, row, strict=True)) for row in grid.weights.tolist()]
        prompts = [self.prompt(text)] * len(each)
        rollout = self.policy.generate(prompts, each, self.alpha, **self.decoding)
        with self.policy.policy.reference():
            reference = self.policy.generate(prompts[:1], each[0], self.alpha, **self.decoding)
        table = Table(title=Text(str(text)), caption=f"alpha {self.alpha:g}", show_lines=True)
        for name in names:
            table.add_column(name, justify="right")
        table.add_column("response", overflow="fold")
        table.add_row(*["reference", *[""] * (len(names) - 1)], Text(reference.completions[0]))
        for row, completion in zip(each, rollout.completions, strict=True):
            table.add_row(*(f"{row[name]:.2f}" for name in names), Text(completion))
        print_table(table)

    def converse(self, answer: Callable[[Any], None]) -> None:
        """Answers lines from the keyboard until an empty one."""
        print(_HELP.format(example=write_weights(self.weights, 2)), file=sys.stderr)
        text: str | None = None
        while line := _ask(f"[{self.shown()}] > "):
            try:
                if self.is_move(line):
                    self.move(line)
                else:
                    text = line
                if text is not None:
                    answer(text)
            except ValueError as error:
                print(error, file=sys.stderr)
            except KeyboardInterrupt:  # enough of this answer
                print()

    def shown(self) -> str:
        """Where the dial stands."""
        parts = [f"{name} {self.weights[name]:.2g}" for name in self.policy.names]
        return f"{', '.join(parts)}; alpha {self.alpha:g}"

    def is_move(self, line: str) -> bool:
        """Whether ``line`` is about the dial, a mistyped name included."""
        parts = line.split(",")
        names = {part.split("=")[0].strip() for part in parts}
        return "=" in line and (
            names <= {*self.policy.names, "alpha"} or all(map(_MOVE.fullmatch, parts))
        )

    def move(self, line: str) -> None:
        """Moves the dial.

        Raises:
            ValueError: that is not possible; the dial stays where it was.
        """
        wanted = parse_weights(line)
        alpha = wanted.pop("alpha", self.alpha)
        weights = wanted or self.weights
        self.policy.preference(weights, alpha)
        self.weights, self.alpha = weights, alpha


def _ask(question: str) -> str:
    if not sys.stdin.isatty():  # what is piped in is not prompted for among the answers
        return sys.stdin.readline().strip()
    try:
        return input(question).strip()
    except (EOFError, KeyboardInterrupt):
        print()
        return ""


def _read(file: Path) -> list[Any]:
    # Not splitlines(), which also cuts where JSON may have a line separator inside a string.
    lines = [line for line in file.read_text().split("\n") if line.strip()]
    prompts = [_prompt(line, file) for line in lines] if file.suffix == ".jsonl" else lines
    if not prompts:
        raise ValueError(f"{file} holds no prompts.")
    return prompts


def _prompt(line: str, file: Path) -> Any:
    """The prompt of one record."""
    try:
        prompt = json.loads(line)["prompt"]
        if isinstance(prompt, str) or (prompt and all({"role", "content"} <= {*m} for m in prompt)):
            return prompt
    except (ValueError, TypeError, KeyError):
        pass
    raise ValueError(
        f"Every line of {file} must be a record with 'prompt', a text or a list of messages with "
        f"'role' and 'content'; this is none: {line[:80]}"
    )
