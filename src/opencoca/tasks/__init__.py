"""What a run trains and how it is scored; one file a task, and the table of them."""

from opencoca.data import SampleSource
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


__all__ = ["TASKS", "Task", "TaskOptions", "make_task"]
