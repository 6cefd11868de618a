"""General ability: a model for lm-evaluation-harness, in full mode or with few-shot examples as blocks.

    pip install 'blockft[lm-eval]'
    python -m blockft.evaluation.harness run --model blockft --model_args pretrained=OUT,mode=block ...

The description, each few-shot example and the question are a block each, as in Ma et al. 2025. They are told
apart by the `fewshot_delimiter` of most tasks, a blank line (another one: `delimiter=...`), which belongs to
what follows it, and under a chat template also by turns. A question that holds blank lines is cut there, too.
Both modes see the same token ids.
"""

import sys
from collections import defaultdict
from collections.abc import Sequence

from lm_eval.__main__ import cli_evaluate
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from blockft.data.tokenizer import PlainTokenizer, TemplatedTokenizer
from blockft.errors import UserError
from blockft.evaluation.loglikelihood import Ids, LoglikelihoodRequest, compute_loglikelihoods
from blockft.inference.engine import Engine
from blockft.model.load import parse_dtype

CUT = "\x1e"
"""Stands in a prompt that a chat template wrote wherever a block begins; it is taken out before encoding."""

UNNAMED_DEVICE = "cuda:0"
"""What the harness asks for where nobody named a device: the first GPU, or a CPU if there is none."""


@register_model("blockft")
class BlockLM(LM):
    """An engine as the harness asks it. `pretrained` is an export, any model folder, or a Hub id.

    Raises:
        UserError: an unknown mode or type, a batch without prompts; see `Engine.load`.
    """

    def __init__(
        self,
        pretrained: str,
        mode: str = "block",
        delimiter: str = "\n\n",
        revision: str | None = None,
        dtype: str | None = None,
        device: str | None = None,
        batch_size: int | str = 16,
        max_batch_size: int | str | None = None,
        max_gen_toks: int = 256,
    ) -> None:
        super().__init__()
        if mode not in ("block", "full"):
            raise UserError(f"mode is {mode!r}, allowed are block, full")
        sizes = {
            "batch_size": batch_size,
            "max_batch_size": batch_size if max_batch_size is None else max_batch_size,
        }
        for name, size in sizes.items():
            if not str(size).isdecimal() or int(size) < 1:
                raise UserError(f"{name} is {size!r}, it should be a number from 1 on")
        kind = parse_dtype(dtype or "auto", None)
        place = None if device == UNNAMED_DEVICE else device
        self._engine = Engine.load(pretrained, revision=revision, device=place, dtype=kind)
        self._mode, self._delimiter = mode, delimiter
        self._batch_size, self._max_new_tokens = min(map(int, sizes.values())), max_gen_toks
        self._tokenizer = self._engine.tokenizer
        self._plain, self._templated = PlainTokenizer(self._tokenizer), TemplatedTokenizer(self._tokenizer)
        # what the tokenizer puts before any text: the bos token, or nothing
        plain = self._tokenizer("x", add_special_tokens=False)["input_ids"]
        self._opening = tuple(self._tokenizer("x")["input_ids"][: -len(plain)])

    @property
    def tokenizer_name(self) -> str:
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        return str(self._tokenizer.chat_template) if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The prompt that the template renders, cut where a user's turn begins, and before delimiters in it.

        Raises:
            UserError: the template changes a text, so that it cannot be cut.
        """
        marks = [{**message, "content": f"\ue000{i}\ue001"} for i, message in enumerate(chat_history)]
        stripped = [{**message, "content": message["content"].strip()} for message in chat_history]
        rendered, outline = (self._render(chat, add_generation_prompt) for chat in (chat_history, marks))
        for history in (chat_history, stripped):
            blocks, rest = [""], outline
            for message, mark in zip(history, marks, strict=True):
                before, _, rest = rest.partition(mark["content"])
                blocks[-1] += before
                if message["role"] == "user":
                    blocks += self._pieces(message["content"])
                else:
                    blocks[-1] += message["content"]
            blocks[-1] += rest
            if "".join(blocks) == rendered:
                return CUT + CUT.join(blocks)
        raise UserError(
            f"the chat template of {self.tokenizer_name} changes texts: it cannot be cut into blocks"
        )

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """The log probability of each continuation, and whether it is the greedy one.

        Raises:
            UserError: a prompt is longer than the model's positions.
        """
        return self._score([self._encode_pair(*request.args) for request in requests], disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each text, in windows of the model's positions.

        Raises:
            UserError: in block mode, for such texts have no blocks.
        """
        if self._mode == "block":
            raise UserError("loglikelihood_rolling scores whole texts, which have no blocks: use mode=full")
        limit, sums = self._engine.model.config.max_position_embeddings, []
        for request in tqdm(requests, disable=disable_tqdm):
            (ids,) = self._plain.encode([request.args[0]])
            windows = get_rolling_token_windows(ids, self._prefix_id, limit, context_len=1)
            pairs = (make_disjoint_window(window) for window in windows)
            scored = [
                LoglikelihoodRequest((), tuple(context), tuple(predicted)) for context, predicted in pairs
            ]
            sums.append(sum(total for total, _ in self._score(scored, disable_tqdm=True)))
        return sums

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Greedy answers, which end before the first of the texts at which the task stops.

        Raises:
            UserError: the task samples; a prompt and its answer are longer than the model's positions.
        """
        answers = [""] * len(requests)
        alike: dict[tuple[int, tuple[str, ...]], list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            settings = request.args[1]
            if settings.get("do_sample") or settings.get("temperature"):
                raise UserError(
                    "the task samples its answers, and block answers are greedy: set do_sample to false"
                )
            limit = int(settings.get("max_gen_toks", self._max_new_tokens))
            alike[limit, _stop_strings(settings.get("until"))].append(index)
        batches = [
            (limit, stop, some[i : i + self._batch_size])
            for (limit, stop), some in alike.items()
            for i in range(0, len(some), self._batch_size)
        ]
        for limit, stop, batch in tqdm(batches, disable=disable_tqdm):
            prompts = [self._encode(requests[i].args[0]) for i in batch]
            for i, ids in zip(batch, self._generate(prompts, limit, stop), strict=True):
                text = str(self._tokenizer.decode(list(ids), skip_special_tokens=True))
                answers[i] = _truncate_at_stop(text, stop)
                self.cache_hook.add_partial("generate_until", requests[i].args, answers[i])
        return answers

    def _render(self, history: list[dict[str, str]], add_generation_prompt: bool) -> str:
        rendered = self._tokenizer.apply_chat_template(
            history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(rendered)

    def _generate(
        self, prompts: Sequence[Sequence[Ids]], max_new_tokens: int, stop: Sequence[str]
    ) -> list[Ids]:
        answers = self._engine.generate_ids(
            prompts, mode=self._mode, max_new_tokens=max_new_tokens, stop=stop
        )
        return [answer.ids for answer in answers]

    @property
    def _prefix_id(self) -> int:
        """What stands before a text that nothing stands before."""
        bos = self._tokenizer.bos_token_id
        return int(self._tokenizer.eos_token_id if bos is None else bos)

    def _pieces(self, text: str) -> list[str]:
        """The text cut before each delimiter, where most tokenizers cut anyway; no piece is blank."""
        first, *others = text.split(self._delimiter)
        pieces = [first]
        for part in others:
            if part.strip() and pieces[-1].strip():
                pieces.append(self._delimiter + part)
            else:
                pieces[-1] += self._delimiter + part
        return [piece for piece in pieces if piece]

    def _encode(self, context: str, continuation: str = "") -> list[Ids]:
        """The ids of each block; the continuation is the end of the last."""
        tokenizer: PlainTokenizer | TemplatedTokenizer
        if context.startswith(CUT):
            texts, tokenizer, opening = [t for t in context.split(CUT) if t], self._templated, ()
        else:
            texts, tokenizer, opening = self._pieces(context) or [""], self._plain, self._opening
        texts[-1] += continuation
        first, *others = (tuple(ids) for ids in tokenizer.encode(texts))
        return [ids for ids in (opening + first, *others) if ids] or [(self._prefix_id,)]

    def _score(self, scored: Sequence[LoglikelihoodRequest], disable_tqdm: bool) -> list[tuple[float, bool]]:
        return compute_loglikelihoods(
            self._engine.model, scored, mode=self._mode, shows_progress=not disable_tqdm
        )

    def _encode_pair(self, context: str, continuation: str) -> LoglikelihoodRequest:
        """White space at the end of the context goes to the continuation, as words are encoded."""
        kept = context.rstrip()
        if not kept.strip(CUT):
            (ids,) = self._plain.encode([context.strip(CUT) + continuation])
            return LoglikelihoodRequest((), (self._prefix_id,), tuple(ids))
        blocks, whole = self._encode(kept), self._encode(kept, context[len(kept) :] + continuation)
        return LoglikelihoodRequest(tuple(blocks[:-1]), blocks[-1], whole[-1][len(blocks[-1]) :])


def _stop_strings(until: str | Sequence[str] | None) -> tuple[str, ...]:
    """The texts at which a task stops, as tasks spell them."""
    given = [until] if isinstance(until, str) else until or ()
    return tuple(stop for stop in given if stop)


def _truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    """The text before the first stop text in it: the engine's ids hold the token that completed it."""
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


if __name__ == "__main__":
    try:
        cli_evaluate()
    except UserError as error:
        print(f"blockft: {error}", file=sys.stderr)
        sys.exit(2)
