"""The console command `neo-jax VERB …`: another name for `python -m neo_jax.MODULE …`.

Enters: a verb and the arguments of its module. Leaves: that module's exit status. No room is
imported before the verb is known, so that a wrong one is told at once.
"""

import difflib
import runpy
import sys

from neo_jax import completion

# verb: (module, what it does)
VERBS = {
    "train": ("neo_jax.main", "train an experiment, or resume it"),
    "finetune": ("neo_jax.finetune", "learn GLUE or SuperGLUE, several tasks and seeds"),
    "prepare": ("neo_jax.prepare", "tokenise a source once, into files that training reads"),
    "checkpoint": ("neo_jax.checkpoint", "list, describe, verify or thin out checkpoints"),
    "evaluate": ("neo_jax.evaluate", "score a model: perplexity, benchmarks, a report"),
    "generate": ("neo_jax.generate", "continue prompts with a model"),
    "plan": ("neo_jax.plan", "what a TPU would need and take for a training step"),
    "convert": ("neo_jax.convert", "turn weights from one format into another"),
    "doctor": ("neo_jax.doctor", "tell what this machine has, and what is wrong with it"),
}


def main() -> None:
    """Runs the module of the verb in `sys.argv`.

    Raises:
      SystemExit: what the module exits with; 1 after a missing or unknown verb.
    """
    verb, arguments = (sys.argv[1:2] or [""])[0], sys.argv[2:]
    if verb in ("-h", "--help", "help"):
        print(_usage())
        return
    if verb == "completion":
        completion.main(arguments, VERBS)
        return
    if verb not in VERBS:
        near = difflib.get_close_matches(verb, VERBS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(VERBS)}."
        sys.exit(f"neo-jax: {verb!r} is not a verb; {hint}")
    sys.argv = [f"neo-jax {verb}", *arguments]
    runpy.run_module(VERBS[verb][0], run_name="__main__", alter_sys=True)


def _usage() -> str:
    lines = [f"  {verb:10} {what}" for verb, (_, what) in VERBS.items()]
    lines.append("  completion print what makes the shell complete all this")
    return "\n".join(
        ["usage: neo-jax VERB [arguments]", "", *lines, "", "neo-jax VERB --help tells more."]
    )
