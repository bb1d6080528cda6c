"""Writes, with TensorFlow, a checkpoint as EleutherAI/gpt-neo's training writes it.

Enters: a directory and a step. Leaves: `checkpoint`, `model.ckpt-STEP.index` and `.data-…`
of a tiny model with fixed random variables, and its `config.json`. Run it in TensorFlow's
own environment: python tests/write_mtf_fixture.py DIRECTORY [STEP] [float32|bfloat16]

Names and shapes, each from EleutherAI/gpt-neo at 23485e3 (and mesh-tensorflow):
  model_fns.py: the scope `gpt2` around the network; bfloat16 is the type of what is stored
    (`master_dtype`), while the optimiser's slots stay float32.
  models/gpt2/gpt2.py, model(): `wpe` [n_ctx, n_embd], `wte` [vocab, n_embd], `ln_f`;
    block(): a scope `h{layer}` with `norm_1`, `norm_2`.
  models/layers.py (earlier in gpt2.py): layer_norm() `g`, `b` [n_embd]; attn()
    `attn/compute_output_bias/o_b` [n_embd]; linear() `conv1d_main/NAME`, around
    mesh_tensorflow/layers.py, dense(): `kernel` [in, out], `bias` [out]; mlp() `c_fc` and
    `c_proj`.
  mesh_tensorflow/transformer/attention.py, AttentionParams with combine_dims: `attn/q`,
    `k`, `v` [n_embd, heads × head size], `o` [heads × head size, n_embd].
  optimizers.py, AdamWeightDecayOptimizer: each again as `NAME/adam_m` and `NAME/adam_v`;
    TensorFlow's `global_step`.
transformers' load_tf_weights_in_gpt_neo passes over names with `adam` and `global_step`, cuts
off `gpt2/`, transposes every kernel, and cuts rows that pad the vocabulary, so some are
written here.
"""

import json
import pathlib
import sys

import numpy as np

CONFIG = {
    "n_head": 2,
    "n_vocab": 53,
    "n_embd": 8,
    "n_ctx": 16,
    "n_layer": 2,
    "attention_types": [[["global", "local"], 1]],
    "local_attention_radius": 4,
    "activation_function": "gelu",
    "scale_by_depth": True,
    "scale_by_in": False,
}
PADDED_VOCAB = 64


def variables() -> dict[str, np.ndarray]:
    """The model's variables, without slots, by their names; the same numbers every time."""
    D, F = CONFIG["n_embd"], 4 * CONFIG["n_embd"]
    shapes = {"wte": (PADDED_VOCAB, D), "wpe": (CONFIG["n_ctx"], D)}
    for layer in range(CONFIG["n_layer"]):
        shapes |= {
            f"h{layer}/norm_1/g": (D,),
            f"h{layer}/norm_1/b": (D,),
            f"h{layer}/attn/q": (D, D),
            f"h{layer}/attn/k": (D, D),
            f"h{layer}/attn/v": (D, D),
            f"h{layer}/attn/o": (D, D),
            f"h{layer}/attn/compute_output_bias/o_b": (D,),
            f"h{layer}/norm_2/g": (D,),
            f"h{layer}/norm_2/b": (D,),
            f"h{layer}/mlp/conv1d_main/c_fc/kernel": (D, F),
            f"h{layer}/mlp/conv1d_main/c_fc/bias": (F,),
            f"h{layer}/mlp/conv1d_main/c_proj/kernel": (F, D),
            f"h{layer}/mlp/conv1d_main/c_proj/bias": (D,),
        }
    shapes |= {"ln_f/g": (D,), "ln_f/b": (D,)}
    rng = np.random.default_rng(0)
    return {
        f"gpt2/{name}": rng.normal(0, 0.5, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def main(directory: str, step: str = "7", dtype: str = "float32") -> None:
    """Writes the checkpoint with TensorFlow 1's Saver, as the original does."""
    import tensorflow.compat.v1 as tf

    tf.disable_eager_execution()
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    tf.get_variable("global_step", initializer=np.int64(step), trainable=False)
    for name, array in variables().items():
        tf.get_variable(name, initializer=tf.cast(array, dtype))
        for slot in ("adam_m", "adam_v"):
            tf.get_variable(f"{name}/{slot}", initializer=np.full_like(array, 99.0))
    with tf.Session() as session:
        session.run(tf.global_variables_initializer())
        saver, path = tf.train.Saver(), str(folder / "model.ckpt")
        saver.save(session, path, int(step), write_meta_graph=False)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
