"""Training states on disk: written aside, then visible at once; restored on any mesh.

    checkpoints/
      300/             a checkpoint of step 300, complete: it was renamed to this at the end
        state/         parameters, optimiser, step and spike window, by orbax
        meta.json      position in the data, config, versions, held-out loss, seconds so far
        DIGESTS        size and digest of every file, the last line its own
      400.partial/     being written, or broken off; the next start removes it
      200.refused/     did not verify when a run wanted to go on from it

No pickle is ever loaded: arrays are tensorstore's, the rest is JSON.
"""

from neo_jax.checkpoint.folder import CheckpointError
from neo_jax.checkpoint.restoring import restore_matching, restore_params
from neo_jax.checkpoint.saving import Checkpointer, save_params

__all__ = [
    "CheckpointError",
    "Checkpointer",
    "restore_matching",
    "restore_params",
    "save_params",
]
