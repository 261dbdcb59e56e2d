"""EleutherAI's lm-evaluation-harness, with a model of this library in its process.

The harness makes requests of text: how likely is this continuation, or this whole text, and what
does the model generate up to one of these strings? `HarnessLM` answers them as the harness's `hf`
backend does, token for token: "<|im_end|>" in a prompt is the token of that name, and a prompt too
long for the context is truncated at its beginning. How many were is counted, logged and returned.
Unlike there, a whole text is scored after one BOS, not two, where the tokenizer adds one by itself.

Tasks are those that the harness knows by name, and the user's own YAML files. A task that executes
generated code (`unsafe_code: true` in its file) is refused unless it is explicitly allowed.
"""

import functools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from absl import logging

try:
    import lm_eval
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"lm_eval needs lm-evaluation-harness, and {error.name} is not installed: "
        "pip install 'qwen3next_jax[eval]'"
    ) from error

from qwen3next_jax.config import require_known
from qwen3next_jax.data.chat import MARKS, render_chat
from qwen3next_jax.data.tokenizer import Tokenizer, split_stops
from qwen3next_jax.evaluation.evaluator import Evaluator

_MAX_NEW_TOKENS = 256  # the harness's default for tasks that do not set it
_SAMPLING = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")


def run_tasks(
    evaluator: Evaluator,
    tasks: Sequence[str],
    *,
    include_path: str = "",
    num_fewshot: int | None = None,
    chat: bool = False,
    limit: int = 0,
    confirm_run_unsafe_code: bool = False,
    seed: int = 1234,
) -> dict[str, Any]:
    """Runs tasks of the harness.

    Args:
      evaluator: the model.
      tasks: names of tasks, groups or tags, or paths of YAML files.
      include_path: directory with YAML files of further tasks, known by name.
      num_fewshot: examples before each question; None: the task's own number.
      chat: whether to ask through the model's chat template.
      limit: documents of each task; 0: all.
      confirm_run_unsafe_code: whether tasks may execute code that the model generates.
      seed: PRNG seed for few-shot examples, bootstrap and sampled text.

    Returns:
      `tasks`, the metrics of each task and group as the harness reports them (named `acc` for the
      filter "none", `acc,FILTER` for others); `truncated`, the number of truncated requests;
      `num_fewshot` and `versions` of the tasks; `samples`, the requests and answers of each task.

    Raises:
      ValueError: a name is unknown, a task executes code and that was not allowed, or a task may
        generate as many tokens as the model's context has.
    """
    if not tasks:
        raise ValueError(
            "lm_eval needs tasks, such as --tasks=hellaswag,arc_easy, or YAML files of your own"
        )
    check_tasks(tasks, include_path)
    context = evaluator.model.config.context_length
    manager = _Tasks(
        include_path,
        context=context,
        tokenizer=evaluator.tokenizer,
        may_run_code=confirm_run_unsafe_code,
    )
    # Without this the bootstrap of standard errors forks the process, with its threads and devices.
    os.environ.setdefault("DISABLE_MULTIPROC", "1")
    lm = HarnessLM(evaluator, seed=seed)
    results = lm_eval.simple_evaluate(
        model=lm,
        tasks=list(tasks),
        task_manager=manager,
        num_fewshot=num_fewshot,
        apply_chat_template=chat,
        limit=limit or None,
        confirm_run_unsafe_code=confirm_run_unsafe_code,
        random_seed=seed,
        numpy_random_seed=seed,
        torch_random_seed=seed,
        fewshot_random_seed=seed,
        bootstrap_iters=1000,
    )
    if lm.truncated:
        logging.warning(
            "%d requests did not fit into the context of %d tokens and lost their beginning",
            lm.truncated,
            lm.max_length,
        )
    scores = {**results["results"], **results.get("groups", {})}
    return {
        "tasks": {
            name: {
                metric.removesuffix(",none"): value
                for metric, value in metrics.items()
                if "," in metric and isinstance(value, int | float)
            }
            for name, metrics in scores.items()
        },
        "truncated": lm.truncated,
        "num_fewshot": results["n-shot"],
        "versions": results["versions"],
        "samples": json.loads(json.dumps(results["samples"], default=str)),
    }


def check_tasks(tasks: Sequence[str], include_path: str = "") -> None:
    """Checks that the tasks exist.

    Raises:
      ValueError: a task is unknown; suggests the nearest names.
      FileNotFoundError: a YAML file is missing.
    """
    paths = [task for task in tasks if task.endswith((".yaml", ".yml"))]
    for path in paths:
        if not os.path.isfile(path):
            raise FileNotFoundError(f"{path} does not exist; expected the YAML file of a task")
    names = [task for task in tasks if task not in paths]
    require_known("tasks of lm_eval", names, _known_tasks(include_path))


def check_loadable(
    tasks: Sequence[str],
    *,
    context: int,
    tokenizer: Tokenizer,
    include_path: str = "",
    confirm_run_unsafe_code: bool = False,
) -> None:
    """Loads tasks with their data; raises what `run_tasks` would for such a model."""
    manager = _Tasks(
        include_path, context=context, tokenizer=tokenizer, may_run_code=confirm_run_unsafe_code
    )
    manager.load(list(tasks))


@functools.cache
def _known_tasks(include_path: str) -> tuple[str, ...]:
    return tuple(TaskManager(include_path=include_path or None).all_tasks)


class _Tasks(TaskManager):
    """Loads tasks; refuses unsupported ones, and those that execute code unless it is allowed."""

    def __init__(
        self, include_path: str, *, context: int, tokenizer: Tokenizer, may_run_code: bool
    ):
        super().__init__(include_path=include_path or None)
        self.context, self.tokenizer, self.may_run_code = context, tokenizer, may_run_code

    def load(self, task_list: Any) -> Any:
        loaded = super().load(task_list)
        unsafe = [
            name for name, task in loaded["tasks"].items() if getattr(task, "UNSAFE_CODE", False)
        ]
        if unsafe and not self.may_run_code:
            raise ValueError(
                f"{', '.join(unsafe)} would run code that the model writes, on this machine and "
                "with your rights. If that is what you want, say --confirm_run_unsafe_code"
            )
        for name, task in loaded["tasks"].items():
            config: Any = getattr(task, "config", None)
            if getattr(config, "output_type", "") == "generate_until":
                try:
                    given = config.generation_kwargs or {}
                    _, stop, _ = _generation_options(given, context=self.context)
                    split_stops(self.tokenizer, stop)
                except ValueError as error:
                    raise ValueError(f"The task {name} cannot be run here: {error}") from error
        return loaded


class HarnessLM(TemplateLM):
    """The harness's interface to an `Evaluator`.

    Attributes:
      truncated: number of requests so far whose context was truncated at its beginning.
    """

    def __init__(self, evaluator: Evaluator, *, seed: int = 1234):
        super().__init__()
        self.truncated = 0
        self.tokenizer = evaluator.tokenizer
        self._evaluator, self._seed = evaluator, seed

    @property
    def max_length(self) -> int:
        """The model's context length in tokens."""
        return self._evaluator.model.config.context_length

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text without context: BOS if the tokenizer has one, else EOS."""
        has_bos = self.tokenizer.adds_bos or "bos_token" in self.tokenizer.special_tokens
        return self.tokenizer.bos_id if has_bos else self.tokenizer.eos_id

    @property
    def tokenizer_name(self) -> str:
        """The harness's key for caches of rendered prompts."""
        return str(self.tokenizer.path)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text; BOS is prepended if the tokenizer says so and the text has none."""
        ids = self.tokenizer.encode(string, parse_special=True)
        add = self.tokenizer.adds_bos if add_special_tokens is None else add_special_tokens
        has = ids[:1] == [self.tokenizer.bos_id]
        return [self.tokenizer.bos_id, *ids] if add and not has else ids

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The chat template, for the harness's records."""
        return self.tokenizer.chat_template if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Renders a conversation, which without `add_generation_prompt` ends with a partial answer.

        If the template refuses the messages, the system messages are dropped, as in the `hf`
        backend.

        Raises:
          ValueError: the template refuses the messages, or leaves the partial answer out.
        """
        # Marks the end of the partial answer; whether the space after it survives shows if the
        # template strips messages.
        mark = MARKS[1]
        if not add_generation_prompt:
            *earlier, begun = chat_history
            chat_history = [*earlier, {**begun, "content": f"{begun['content']}{mark} "}]
        render = functools.partial(
            render_chat,
            template=self.tokenizer.chat_template,
            special_tokens=self.tokenizer.special_tokens,
            add_generation_prompt=add_generation_prompt,
        )
        try:
            text = render(chat_history)
        except ValueError as error:
            others = [message for message in chat_history if message["role"] != "system"]
            if len(others) == len(chat_history):
                raise
            logging.log_first_n(logging.WARNING, "System messages are left out: %s", 1, error)
            text = render(others)
        if add_generation_prompt:
            return text
        answer, found, rest = text.rpartition(mark)
        if not found:
            raise ValueError(
                f"The chat template leaves out {begun['content']!r}, which the answer begins with"
            )
        return answer if rest.startswith(" ") else answer.rstrip()

    def _loglikelihood_tokens(
        self, requests: Iterable[tuple[Any, list[int], list[int]]], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For each (text, context, continuation), its ln p and whether it is the greedy one."""
        rows, counts = [], []
        for text, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"The continuation of {text!r:.200} adds no token to its context, so it has no "
                    "likelihood; remove the choice, or have the task begin it with a space"
                )
            row = [*(context or [self.prefix_token_id]), *continuation]
            if len(row) > self.max_length + 1:
                self.truncated += 1
            if len(continuation) > self.max_length:
                raise ValueError(
                    f"A continuation of {len(continuation)} tokens does not fit into the model's "
                    f"context of {self.max_length}; extend it by rope_scaling (YaRN)"
                )
            rows.append(row[-(self.max_length + 1) :])
            counts.append(len(continuation))
        answers = []
        for score, n in zip(self._evaluator.score(rows), counts, strict=True):
            log_p = -float(score.losses[-n:].sum(dtype="float64"))
            answers.append((log_p, bool((score.margins[-n:] == 0).all())))
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """The ln p of each text after BOS; a text too long is cut into windows."""
        windows, counts = [], []
        for request in requests:
            # Without BOS, which is the prefix: nothing is trained to predict a second one.
            text = self.tok_encode(request.args[0], add_special_tokens=False)
            pairs = get_rolling_token_windows(
                token_list=text,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """The continuation of each context, up to the first of the task's stop strings."""
        by_options: dict[str, list[int]] = {}
        for number, request in enumerate(requests):
            by_options.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(number)
        texts = [""] * len(requests)
        for options, numbers in by_options.items():
            count, stop, sampling = _generation_options(
                json.loads(options), context=self.max_length
            )
            prompts = [
                self.tok_encode(requests[number].args[0]) or [self.prefix_token_id]
                for number in numbers
            ]
            self.truncated += sum(len(prompt) > self.max_length - count for prompt in prompts)
            written = self._evaluator.generate(
                [prompt[-(self.max_length - count) :] for prompt in prompts],
                max_new_tokens=count,
                stop=stop,
                seed=self._seed,
                **sampling,
            )
            for number, tokens in zip(numbers, written, strict=True):
                text = self.tokenizer.decode(tokens)
                texts[number] = postprocess_generated_text(text, stop, None)
        return texts


def _generation_options(
    kwargs: Mapping[str, Any], *, context: int
) -> tuple[int, list[str], dict[str, Any]]:
    """A task's generation_kwargs as max_new_tokens, stop strings, and fields of `Sampling`."""
    options = dict(normalize_gen_kwargs(dict(kwargs), _MAX_NEW_TOKENS))
    for name, off in (("num_beams", 1), ("top_k", 0)):  # values that switch the option off
        if options.get(name) == off:
            del options[name]
    count, stop = options.pop("max_gen_toks"), [s for s in options.pop("until") if s]
    if count >= context:
        raise ValueError(
            f"max_gen_toks={count} leaves no room for a prompt in the model's context of {context} "
            "tokens; lower it in the task's generation_kwargs"
        )
    del options["do_sample"]  # without it the normalised temperature is 0
    sampling = {name: options.pop(name) for name in _SAMPLING if name in options}
    if options:
        raise ValueError(
            f"generation_kwargs {sorted(options)} are not supported; expected until, max_gen_toks, "
            f"do_sample, {', '.join(_SAMPLING)}"
        )
    return count, stop, sampling
