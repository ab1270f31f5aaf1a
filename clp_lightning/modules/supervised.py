"""SupervisedModule: the reference policy, from (prompt, response) pairs."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only
from torch import Tensor

from ..conditioning import Conditioner, LoRA, Unconditioned
from ..described import check_choice
from ..functional.logprobs import masked_sum
from ..keyed import resolve_seed
from ..policy import Encoding, Policy, Sampling, TransformersEngine
from ..policy.encoding import pad
from ..pretrained import Pretrained, load_model
from ..rewards import Rouge, completion_text
from ..rewards.base import Completion
from ..tuned import untie
from ..types import Preference, Prompt, PromptBatch, Rollout
from .base import LRDecay, PolicyModule
from .folder import replace_folder
from .gathered import on_one_device
from .precision import float32_by_default
from .sharding import shard
from .tally import Tally

__all__ = ["SupervisedModule"]

_TURNS = ["response", "all"]


class SupervisedModule(PolicyModule):
    """Finetunes a language model on responses and writes a plain Hugging Face folder.

    The loss is the mean over response tokens (the stop token included) of the whole batch, over
    all ranks and accumulated batches. Of a conversation only the assistant's turns are learnt, each
    as the answer to the turns before it. LoRA adapters are merged on saving. The folder,
    ``<trainer.log_dir>/base``, is a base for ``CLPModule(pretrained=...)``.

    Args:
        pretrained: The base: a hub name, a folder or an installed package.
        response_column: Column of the data with the response, text or messages.
        assistant_turns: Learn the turns of the ``response``, or ``all``: those in the prompt too,
            as from TRL's ``messages``. Every turn is a row of the batch.
        lora_rank: Rank of a LoRA on all linear layers but the output; 0 trains every parameter.
        max_prompt_tokens: Limit of a prompt, in tokens.
        max_response_tokens: Longer responses are cut, and then have no stop token.
        on_long: What happens to a prompt over the limit.
        chat_template_kwargs: Passed to the model's chat template.
        lr: Learning rate.
        weight_decay: Weight decay.
        warmup_steps: Optimizer steps over which the learning rate rises.
        lr_decay: How the learning rate falls to 0 at the end of the run.
        optimizer: Optimizer class and its further arguments.
        lr_scheduler: Scheduler class and its arguments, stepped once per optimizer step.
        gradient_checkpointing: Recompute activations in the backward pass.
        rouge: Answer the held-out prompts greedily in every validation and log the ROUGE-L of the
            answers, ``val/rougeL``; needs the package rouge-score.
        seed: Key of the initial adapter; that of ``seed_everything`` if None.
    """

    def __init__(
        self,
        pretrained: str | Pretrained,
        response_column: str = "completion",
        assistant_turns: Literal["response", "all"] = "response",
        lora_rank: int = 16,
        max_prompt_tokens: int = 512,
        max_response_tokens: int = 128,
        on_long: Literal["truncate", "error"] = "truncate",
        chat_template_kwargs: dict[str, Any] | None = None,
        lr: float = 1e-4,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
        lr_decay: LRDecay = "none",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        gradient_checkpointing: bool = False,
        rouge: bool = False,
        seed: int | None = None,
    ) -> None:
        if lora_rank < 0:
            raise ValueError(f"lora_rank must be 0 (train everything) or more; got {lora_rank}.")
        conditioner: Conditioner = Unconditioned()
        if lora_rank:
            conditioner = LoRA(shared_rank=lora_rank, shared_targets="all-linear")
        encoding = Encoding(max_prompt_tokens, on_long, chat_template_kwargs)
        policy = Policy(
            pretrained, conditioner, encoding, gradient_checkpointing=gradient_checkpointing
        )
        schedule = (warmup_steps, lr_decay, optimizer, lr_scheduler)
        super().__init__(policy, lr, None, weight_decay, *schedule)
        self.response_column = response_column
        self.assistant_turns = check_choice("assistant_turns", assistant_turns, _TURNS)
        self.rouge = Rouge("response") if rouge else None
        if max_response_tokens < 1:
            raise ValueError(f"max_response_tokens must be at least 1; got {max_response_tokens}.")
        self.max_response_tokens = max_response_tokens
        self.seed = resolve_seed(seed)
        # Two, because a validation may come between two micro-batches of a step.
        self.tally, self.held_out = Tally(), Tally()

    def setup(self, stage: str) -> None:
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "column_names"):  # before the model is loaded
            self._check_column(data.column_names)

    def configure_model(self) -> None:
        with float32_by_default():
            self.policy.build([], self.seed)  # no rewards: only what all preferences share
        shard(self)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> Tensor:
        rollout = self.encode(PromptBatch.check(batch))
        logp, mask = self._logprobs(rollout), rollout.response_mask
        self.tally.add("loss", -logp, mask)
        self.tally.count("tokens", float(mask.sum()))
        # Any constant will do: the gradient is rescaled to the mean over all tokens below.
        loss: Tensor = -masked_sum(logp, mask).sum() / self._nominal
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        step = self.tally.reduce(self.sum_over_ranks)
        self.scale_gradients(self._nominal, step.pop("tokens"))
        self.log("train/loss", step["loss"], prog_bar=True)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        rollout = self.encode(PromptBatch.check(batch))
        self.held_out.add("loss", -self._logprobs(rollout), rollout.response_mask)
        if self.rouge is not None:
            scores = self.rouge(
                rollout.prompts, self._answers(rollout), response=rollout.completions
            )
            self.held_out.add("rougeL", torch.tensor(scores))

    def on_validation_epoch_end(self) -> None:
        step = self.held_out.reduce(self.sum_over_ranks)
        for name, value in step.items():
            self.log(f"val/{name}", value, prog_bar=True)

    def on_fit_end(self) -> None:  # called also where a resumed run has nothing left to train
        folder = Path(self.trainer.log_dir or self.trainer.default_root_dir) / "base"
        self.save(folder)
        rank_zero_info(f"base: {folder}")

    def save(self, folder: str | Path) -> None:
        """Writes the trained model, adapters merged, with its tokenizer; replaces ``folder``.

        To be called on all ranks.
        """
        if (module := on_one_device(self)) is not None:
            module._write(folder)

    @rank_zero_only
    def _write(self, folder: str | Path) -> None:
        plain = load_model(self.policy.pretrained)
        state = self.policy.conditioner.fold(_unconditional(1))
        plain.config.update(untie(plain, state))
        plain.load_state_dict(state)
        replace_folder(folder, plain, self.policy.tokenizer)

    _nominal = 1.0

    def _logprobs(self, rollout: Rollout) -> Tensor:
        """Log-probabilities of the responses, shape (B, T)."""
        with self.policy.conditioned(rollout.preference):
            return self.policy.logprobs(rollout)

    def _answers(self, rollout: Rollout) -> list[Completion]:
        """The likeliest token after the other, for every prompt."""
        batch = PromptBatch(rollout.prompts, rollout.prompt_ids, preference=rollout.preference)
        greedy = Sampling(self.max_response_tokens, temperature=0.0)
        return [*TransformersEngine().generate(self.policy, batch, 1, greedy).completions]

    def _check_column(self, columns: Collection[str]) -> None:
        if self.response_column not in columns:
            raise ValueError(
                f"The data has no column '{self.response_column}' to learn from; it has "
                f"{sorted(columns)}. Set response_column."
            )

    def _turns(self, batch: PromptBatch) -> Iterator[tuple[int, Prompt, str]]:
        """What is learnt: a row of the batch, what is read of it, and what is answered."""
        answers = batch.columns[self.response_column]
        for row, (prompt, answer) in enumerate(zip(batch.prompts, answers, strict=True)):
            conversation = prompt if isinstance(prompt, list) else []
            if self.assistant_turns == "all":
                # But the last one, which the response continues, and one that answers nothing.
                for i, message in enumerate(conversation[:-1]):
                    if i and message["role"] == "assistant":
                        yield row, conversation[:i], self._text(batch, row, [message])
            text = self._text(batch, row, answer)
            roles = [m.get("role", "assistant") for m in answer] if isinstance(answer, list) else []
            if all(role == "assistant" for role in roles):
                yield row, prompt, text
                continue
            if "assistant" not in roles or not conversation:
                raise ValueError(
                    f"Row {int(batch.prompt_ids[row])}: the response has turns of {roles}; it "
                    "needs one of the assistant, and a prompt that is messages too."
                )
            for i in [i for i, role in enumerate(roles) if role == "assistant"]:
                yield row, [*conversation, *answer[:i]], completion_text([answer[i]])

    def _text(self, batch: PromptBatch, row: int, answer: Any) -> str:
        messages = answer if isinstance(answer, list) else []
        if not isinstance(answer, str) and not (messages and all(map(_has_text, messages))):
            raise ValueError(
                f"Row {int(batch.prompt_ids[row])}: the response in column "
                f"'{self.response_column}' is {answer!r}; it must be text or messages with text. "
                "Fill the row in or leave it out."
            )
        return completion_text(answer)

    def encode(self, batch: PromptBatch) -> Rollout:
        """The turns to learn in the form of a rollout, one or more for every row of the data.

        Raises:
            ValueError: where the response column is missing, a response is neither text nor
                messages, or none of its messages is the assistant's.
        """
        self._check_column(batch.columns)
        chosen, prompts, responses = map(list, zip(*self._turns(batch), strict=True))
        batch = replace(batch.select(chosen), prompts=prompts)
        policy = self.policy
        input_ids, prompt_mask = policy.encode(batch.prompts)
        # Of several stop tokens the tokenizer's own closes a turn of the chat template.
        eos = policy.tokenizer.eos_token_id
        end = policy.stop_ids[:1] if eos is None else [eos]
        tokens = [
            [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], *end]
            for text in responses
        ]
        kept = [row[: self.max_response_tokens] for row in tokens]
        response_ids, mask = pad(kept, policy.pad_id, side="right")
        device = input_ids.device
        rows = torch.arange(len(batch), device=device)
        return Rollout(
            prompts=batch.prompts,
            prompt_ids=batch.prompt_ids,
            groups=rows,
            sample=torch.zeros_like(rows),
            preference=_unconditional(len(batch)).to(device),
            input_ids=input_ids,
            prompt_mask=prompt_mask,
            response_ids=response_ids.to(device),
            response_mask=mask.to(device),
            completions=responses,
            truncated=torch.tensor([len(a) < len(b) for a, b in zip(kept, tokens, strict=True)]),
            columns=batch.columns,
        )


def _has_text(message: Any) -> bool:
    return isinstance(message, dict) and isinstance(message.get("content"), str)


def _unconditional(rows: int) -> Preference:
    """No rewards and alpha = 0: the shared part's coefficient is 1."""
    return Preference(torch.empty(rows, 0), torch.zeros(rows))
