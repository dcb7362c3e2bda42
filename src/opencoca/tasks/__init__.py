"""What a run trains and how it is scored; one file a task, and the table of them."""

from collections.abc import Mapping
from typing import Any

from opencoca.data import SampleSource
from opencoca.system.messages import brief, shown
from opencoca.tasks.classification import Classification, ClassificationOptions
from opencoca.tasks.pretraining import Pretraining, PretrainingOptions
from opencoca.tasks.task import Task

TaskOptions = PretrainingOptions | ClassificationOptions

# By the name that recipes use: the options and the task that is made of them and of the training samples.
TASKS: dict[str, tuple[type, type]] = {
    "pretraining": (PretrainingOptions, Pretraining),
    "classification": (ClassificationOptions, Classification),
}


def make_task(options: TaskOptions, source: SampleSource | None = None) -> Task:
    """The task that the options name; source: the training samples, which say what classes there are."""
    return TASKS[options.name][1](options, source)


def stored_task(content: Mapping[str, Any] | None) -> Task:
    """The task that a model was finetuned on, from what its folder keeps (`LoadedModel.task`).

    Raises ValueError if it keeps nothing, or names a task that this version does not have.
    """
    if content is None:
        raise ValueError(
            "this model was not finetuned on a task of its own; zero-shot, retrieval and captioning score any model"
        )
    name = content.get("name")
    if not isinstance(name, str) or name not in TASKS:
        raise ValueError(f"this model was finetuned on {shown(name, 60)}; known tasks: {', '.join(TASKS)}")
    try:
        return TASKS[name][1].from_stored(content)
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the model's folder says too little of the task {name} ({brief(error)})") from error


__all__ = ["TASKS", "Task", "TaskOptions", "make_task", "stored_task"]
