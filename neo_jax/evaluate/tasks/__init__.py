"""Benchmarks without a harness: where their rows lie, how they are asked, what is counted.

Enters: the name of a task and a folder of data. Leaves: an `Outcome`. registry.py lists the
tasks, local.py finds and reads their rows, prompts.py turns a row into what is asked, and
scores.py turns answers into figures.
"""

from neo_jax.evaluate.tasks.prompts import Item
from neo_jax.evaluate.tasks.registry import TASKS, Task, find, load
from neo_jax.evaluate.tasks.scores import Outcome, run

__all__ = ["TASKS", "Item", "Outcome", "Task", "find", "load", "run"]
