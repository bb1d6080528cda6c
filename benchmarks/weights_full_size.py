"""Round trips of the 1.3B and 2.7B models at full size: bits, logits, peak memory, time.

Enters: a scratch folder with room for three copies. Leaves: one line of JSON a stage. Each
stage is a process of its own, whose peak of resident memory is what the kernel says:
transformers writes random weights; we read them and write them again; the files are
compared tensor by tensor; transformers reads ours and answers, and so did we.

python benchmarks/weights_full_size.py --scratch /tmp/full --model neo_2p7b --dtype float32
"""

import argparse
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np

IDS = np.random.default_rng(0).integers(0, 50257, (1, 300))


def peak_gib() -> float:
    """The most memory that this process had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_theirs(folder: pathlib.Path, model: str, dtype: str) -> dict:
    """Random weights, of the original's standard deviations, in shards.

    Transformers' own 0.02 makes scores so large that float32's rounding shows in the logits
    of a deep model, whoever computes them.
    """
    import torch
    import transformers

    from neo_jax import config, hf
    from neo_jax.model import init_stddevs

    torch.manual_seed(0)
    shape = config.preset_model(model)
    values = hf.config_to_hf(shape)
    std = init_stddevs(shape)
    kinds = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    kinds |= {"c_proj": "down", "wpe": "positions"}
    with torch.device("meta"):
        theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values))
    theirs = theirs.to(getattr(torch, dtype)).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                kind = kinds.get(name.split(".")[-2], "up")  # 0.02, as of the embedding
                parameter.normal_(0, std[kind])
    theirs.tie_weights()
    theirs.save_pretrained(folder / "theirs", max_shard_size="2GB")
    return {"files": len(list((folder / "theirs").glob("*.safetensors")))}


def read_and_write(folder: pathlib.Path, model: str, dtype: str) -> dict:
    """Reads theirs, answers, writes ours."""
    import jax

    from neo_jax import hf, pretrained, state

    base = peak_gib()
    start = time.perf_counter()
    ours = pretrained.load(folder / "theirs")
    jax.block_until_ready(ours.params)
    result = {
        "read_seconds": round(time.perf_counter() - start, 1),
        "params_gib": round(state.num_bytes(ours.params) / 2**30, 2),
        "above_params_gib": round(peak_gib() - base - state.num_bytes(ours.params) / 2**30, 2),
    }
    start = time.perf_counter()
    hf.write(ours.params, ours.config, folder / "ours", eos_id=50256)
    result["write_seconds"] = round(time.perf_counter() - start, 1)
    result["peak_gib_after_writing"] = round(peak_gib(), 2)
    np.save(folder / "logits.npy", ours.logits(IDS))
    return result


def compare(folder: pathlib.Path, model: str, dtype: str) -> dict:
    """Every tensor of theirs against ours, byte by byte, one at a time."""
    from neo_jax.hf import reading

    theirs, ours = (reading.open_weights(folder / name) for name in ("theirs", "ours"))
    assert theirs.shapes == ours.shapes and theirs.dtype == ours.dtype == dtype
    differ = [n for n in theirs.shapes if theirs.read(n).tobytes() != ours.read(n).tobytes()]
    return {"tensors": len(theirs.shapes), "differ": differ}


def answer(folder: pathlib.Path, model: str, dtype: str) -> dict:
    """Transformers loads ours as they are; its logits beside ours."""
    import torch
    import transformers

    theirs, info = transformers.GPTNeoForCausalLM.from_pretrained(
        folder / "ours", output_loading_info=True, attn_implementation="eager"
    )
    with torch.no_grad():
        expected = theirs(torch.tensor(IDS), use_cache=False).logits.float().numpy()
    actual = np.load(folder / "logits.npy")
    difference = float(np.abs(actual - expected).max())
    return {
        "loading_info": {key: len(value) for key, value in info.items()},
        "difference_over_largest_logit": difference / float(np.abs(expected).max()),
        "torch_dtype": str(theirs.dtype),
    }


STAGES = {f.__name__: f for f in (write_theirs, read_and_write, compare, answer)}


def main() -> None:
    """Runs one stage, or each in a process of its own."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="neo_1p3b")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--stage", choices=STAGES)
    arguments = parser.parse_args()
    if arguments.stage:
        start = time.perf_counter()
        result = STAGES[arguments.stage](arguments.scratch, arguments.model, arguments.dtype)
        seconds = round(time.perf_counter() - start, 1)
        line = {"stage": arguments.stage, "seconds": seconds, "peak_gib": round(peak_gib(), 2)}
        print(
            json.dumps({"model": arguments.model, "dtype": arguments.dtype, **line, **result})
        )
        return
    arguments.scratch.mkdir(parents=True)
    for stage in STAGES:
        subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=True)
    shutil.rmtree(arguments.scratch)


if __name__ == "__main__":
    main()
