"""The tasks of lm-evaluation-harness: found, checked, and refused where they cannot be used.

Importing this module imports lm_eval, which is an optional dependency.
"""

from __future__ import annotations

import difflib
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from lm_eval.api.registry import METRIC_REGISTRY
from lm_eval.tasks import TaskManager

from arm_ray.errors import EvaluationError

_MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
_SAMPLING_KEYS = {"until", "do_sample", "temperature", "top_p", *_MAX_TOKENS_KEYS}
# Other keys are allowed with the values that change nothing.
_NEUTRAL: Mapping[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_return_sequences": (1,),
    "top_k": (0, -1),
    "min_p": (0,),
    "repetition_penalty": (1,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
}


class OpenTasks(TaskManager):  # type: ignore[misc]  # lm_eval is not typed
    """Tasks of the harness that are checked and loaded once, for all models.

    Attributes:
        names: Of the tasks, groups and tags that were asked for.
        notes: What a user should know about them, one line each.
    """

    def __init__(self, names: Sequence[str], include_path: Path | None) -> None:
        super().__init__(include_path=include_path)
        self.names = tuple(names)
        self.notes: list[str] = []
        self._loaded: Any = None

    def load(self, task_list: Any) -> Any:
        """The loaded tasks; each model is given the same ones."""
        if self._loaded is None:
            self._loaded = super().load(task_list)
        return self._loaded

    @property
    def tasks(self) -> dict[str, Any]:
        """Name -> task, groups resolved."""
        found: dict[str, Any] = self.load(list(self.names))["tasks"]
        return found

    def digest(self, limit: int | None) -> str:
        """Of the tasks' definitions, of the documents asked, and of the few-shot examples."""
        state = hashlib.sha256()
        for name, task in sorted(self.tasks.items()):
            definition = task.dump_config()
            (definition.get("metadata") or {}).pop("config_source", None)
            examples = getattr(getattr(task, "sampler", None), "df", None) or []
            for part in ([name, definition], itertools.islice(task.eval_docs, limit), examples):
                for value in part:
                    state.update(json.dumps(value, sort_keys=True, default=_name_of).encode())
        return state.hexdigest()


def open_tasks(
    names: Sequence[str], include_path: str | None = None, num_fewshot: int | None = None
) -> OpenTasks:
    """Find, check and load tasks. It may download their data sets.

    Args:
        names: Tasks, groups or tags of the harness, or of `include_path`.
        include_path: Directory of task files of one's own. Python functions that they name run
            with your rights.
        num_fewshot: Solved examples in each prompt; None: as each task says.

    Raises:
        EvaluationError: A task is unknown, cannot be loaded, lacks examples, or is refused because
            it runs code that a model or a stranger wrote.
    """
    if not names:
        raise EvaluationError(
            "no task of lm_eval is named", expected="--lm-eval with names, for example arc_easy"
        )
    if not hasattr(TaskManager, "load") or not hasattr(TaskManager, "task_index"):
        raise EvaluationError(
            "this version of lm_eval is too old",
            got=metadata.version("lm_eval"),
            expected="0.4.12 or newer",
            hint="pip install --upgrade arm-ray[lm-eval]",
        )
    path = _checked_path(include_path)
    manager = OpenTasks(list(dict.fromkeys(names)), path)
    for name in manager.names:
        if name not in manager.task_index:
            raise _unknown(name, manager.all_tasks, path)
    for name, content in _definitions(manager):
        _check_definition(name, content)
    try:
        tasks = manager.tasks
    except Exception as error:  # data sets, templates and functions of tasks raise what they like
        raise EvaluationError(
            "lm_eval cannot load the tasks",
            where=", ".join(manager.names),
            got=f"{type(error).__name__}: {' '.join(str(error).split())[:500]}",
            hint="most tasks download their data from the hub: run it where that is reached, or "
            "write a task file with local data (--lm-eval-path)",
        ) from error
    for name, task in tasks.items():
        if getattr(task, "UNSAFE_CODE", False):
            raise _refused_code(name)
        if getattr(task, "MULTIMODAL", False):
            raise _refused_media(name)
        _check_examples(name, task, num_fewshot, manager.notes)
    return manager


def _checked_path(include_path: str | None) -> Path | None:
    if include_path is None:
        return None
    path = Path(include_path).expanduser()
    if not path.is_dir() or next(path.glob("**/*.yaml"), None) is None:
        raise EvaluationError(
            "the directory of lm_eval tasks is not there, or has none",
            where=path,
            got="a directory without .yaml files" if path.is_dir() else "no directory",
            expected="a directory with task files (*.yaml)",
            hint="check --lm-eval-path",
        )
    return path.resolve()


def _unknown(name: str, known: Sequence[str], path: Path | None) -> EvaluationError:
    near = difflib.get_close_matches(name, known, n=5, cutoff=0.5)
    hint = f"nearest: {', '.join(near)}" if near else "`lm-eval ls tasks` lists them"
    return EvaluationError(
        f"lm_eval has no task {name!r}",
        where=path or "the tasks of lm_eval",
        got=name,
        expected=f"one of its {len(known)} tasks, groups and tags",
        hint=hint
        if path
        else f"{hint}; for tasks of your own, name their directory (--lm-eval-path)",
    )


def _definitions(manager: OpenTasks) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Names and contents of the files of all tasks that were asked for, without running code."""
    waiting: list[Any] = list(manager.names)
    done: set[str] = set()
    while waiting:
        item = waiting.pop()
        content: Mapping[str, Any] = item if isinstance(item, Mapping) else {}
        name = item if isinstance(item, str) else item.get("group", item.get("task"))
        if content:
            yield str(name), content
        if isinstance(content.get("task"), list):
            waiting += content["task"]
        if not isinstance(name, str) or name in done or name not in manager.task_index:
            continue
        done.add(name)
        entry = manager.task_index[name]
        if entry.cfg is None:
            waiting += sorted(entry.tags)
        else:
            waiting.append(entry.cfg)


def _check_definition(name: str, content: Mapping[str, Any]) -> None:
    """Refuse, before anything of it is run, a task that runs code of a model or of a stranger."""
    if content.get("unsafe_code"):
        raise _refused_code(name)
    if content.get("doc_to_image") or content.get("doc_to_audio"):
        raise _refused_media(name)
    data = content.get("dataset_kwargs")
    # Newer versions of datasets do not know scripts any more, and lm_eval drops the argument.
    if isinstance(data, Mapping) and data.get("trust_remote_code") and _datasets_version() < 4:
        raise EvaluationError(
            f"the task {name} of lm_eval runs code from its data set",
            got="trust_remote_code",
            expected="data without code",
            hint="pip install 'datasets>=4', which loads data without code",
        )
    if content.get("process_results") is not None or content.get("class") is not None:
        return
    for metric in content.get("metric_list") or []:
        label = metric.get("metric") if isinstance(metric, Mapping) else None
        # Functions beside the task file are given with their path.
        if not isinstance(label, str) or "/" in label:
            continue
        if metric.get("hf_evaluate") or label not in METRIC_REGISTRY:
            raise EvaluationError(
                f"the task {name} of lm_eval uses a metric whose code is downloaded from the hub",
                got=label,
                expected="a metric of lm_eval itself, or a function beside the task file",
                hint="leave the metric out in a task file of your own (--lm-eval-path)",
            )


def _refused_code(name: str) -> EvaluationError:
    return EvaluationError(
        f"the task {name} of lm_eval runs code that the model wrote, without isolation",
        got="unsafe_code",
        expected="tasks that run no code of the model",
        hint="use our benchmarks for code, which run it in a sandbox: --tasks humaneval,mbpp "
        "(docs/sandbox.md)",
    )


def _refused_media(name: str) -> EvaluationError:
    return EvaluationError(
        f"the task {name} of lm_eval asks about images or sound",
        expected="tasks of text alone",
    )


def _check_examples(name: str, task: Any, num_fewshot: int | None, notes: list[str]) -> None:
    """See that there are enough examples for the prompts of a task."""
    own = task.get_config("num_fewshot")
    if num_fewshot is not None and own == 0:
        if num_fewshot:
            notes.append(f"{name} is defined without examples; num_fewshot does not change that")
        return
    wanted = own if num_fewshot is None else num_fewshot
    # A text of which all is predicted has no prompt.
    if not wanted or task.OUTPUT_TYPE == "loglikelihood_rolling":
        return
    if not hasattr(task, "sampler"):
        return  # a class of Python that draws examples in its own way
    split, samples = task.fewshot_cfg.split, task.fewshot_cfg.samples
    has_own = bool(split or samples or task.has_training_docs() or task.has_validation_docs())
    pool = len(task.sampler.df or [])
    # The document that is asked must not be its own example.
    needed = wanted + (split is not None and split == task.config.test_split)
    if pool >= needed and (has_own or num_fewshot is None):
        return
    raise EvaluationError(
        f"the task {name} of lm_eval has no {wanted} examples for its prompts",
        where=split or "no fewshot_split",
        got=f"{pool} examples" if has_own else "only the documents that are asked",
        expected=f"{needed} or more in a split of their own, or in fewshot_split",
        hint="lower --num-fewshot, or leave it out",
    )


def _datasets_version() -> int:
    return int(metadata.version("datasets").split(".")[0])


def _name_of(value: Any) -> str:
    return str(getattr(value, "__qualname__", value))
