"""Round trips of the released models at full size: bits, logits, peak memory, time.

Enters: a scratch folder with room for two copies. Leaves: one line of JSON a stage. Each
stage is a process of its own, whose peak of resident memory is what the kernel says:
transformers writes random weights; we read them and write them again; the files are
compared tensor by tensor; transformers answers from its own files and from ours; NumPy
answers in float64; and the answers, ours among them, are compared.

python benchmarks/weights_full_size.py --scratch /tmp/full --model neo_2p7b --dtype float32
python benchmarks/weights_full_size.py --scratch /tmp/full --model neo_1p3b --initializer hf
python benchmarks/weights_full_size.py --scratch /tmp/full --model neo_2p7b --devices 8
"""

import argparse
import collections
import json
import os
import pathlib
import resource
import shutil
import subprocess
import sys
import time

import numpy as np


def prompt(arguments: argparse.Namespace) -> np.ndarray:
    """Token ids [1, tokens]."""
    return np.random.default_rng(0).integers(0, 50257, (1, arguments.tokens))


def peak_gib() -> float:
    """The most memory that this process had at any time."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def write_theirs(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Random weights in shards, of the original's standard deviations or transformers'."""
    import torch
    import transformers

    from neo_jax import config, hf
    from neo_jax.model import init_stddevs

    torch.manual_seed(0)
    shape = config.preset_model(arguments.model, initializer=arguments.initializer)
    values = hf.config_to_hf(shape)
    std = init_stddevs(shape)
    kinds = {"q_proj": "query", "k_proj": "key", "v_proj": "value", "out_proj": "out"}
    kinds |= {"c_fc": "up", "c_proj": "down", "wte": "embedding", "wpe": "positions"}
    kinds["lm_head"] = "head"  # not yet tied: drawn, and dropped
    with torch.device("meta"):
        theirs = transformers.GPTNeoForCausalLM(transformers.GPTNeoConfig(**values))
    theirs = theirs.to(getattr(torch, arguments.dtype)).to_empty(device="cpu")
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(0, 0.02)
            elif parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, std[kinds[name.split(".")[-2]]])
    theirs.tie_weights()
    theirs.save_pretrained(folder / "theirs", max_shard_size="2GB")
    return {"files": len(list((folder / "theirs").glob("*.safetensors")))}


def read_and_write(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Reads theirs, onto one device or spread over several; answers; writes ours."""
    flag = f"--xla_force_host_platform_device_count={arguments.devices}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}"
    import jax

    from neo_jax import config, hf, pretrained, sharding, state
    from neo_jax.hf import names

    most: dict[int, int] = collections.defaultdict(int)  # bytes, by the device's id

    def look() -> None:
        # By address: a part that was looked at is an array of its own from then on.
        parts = {}
        for array in jax.live_arrays():
            for shard in array.addressable_shards:
                where = shard.device.id, shard.data.unsafe_buffer_pointer()
                parts[where] = shard.data.nbytes
        now: dict[int, int] = collections.defaultdict(int)
        for (device, _), size in parts.items():
            now[device] += size
        for device, held in now.items():
            most[device] = max(most[device], held)

    def to_ours(*args):  # each tensor passes here, between its file and its devices
        look()
        return names_to_ours(*args)

    names_to_ours, names.to_ours = names.to_ours, to_ours
    mesh = None
    if arguments.devices > 1:
        mesh = sharding.make_mesh(config.MeshConfig(fsdp=arguments.devices))
    base = peak_gib()
    start = time.perf_counter()
    ours = pretrained.load(folder / "theirs", mesh=mesh)
    jax.block_until_ready(ours.params)
    look()
    size = state.num_bytes(ours.params)
    result = {
        "read_seconds": round(time.perf_counter() - start, 1),
        "params_gib": round(size / 2**30, 2),
        "above_params_gib": round(peak_gib() - base - size / 2**30, 2),
        "most_on_a_device_gib": round(max(most.values()) / 2**30, 3),
    }
    start = time.perf_counter()
    hf.write(ours.params, ours.config, folder / "ours", eos_id=50256)
    result["write_seconds"] = round(time.perf_counter() - start, 1)
    result["peak_gib_after_writing"] = round(peak_gib(), 2)
    if mesh is None:
        np.save(folder / "logits_ours.npy", ours.logits(prompt(arguments)))
    return result


def compare(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Every tensor of theirs against ours, byte by byte, one at a time."""
    from neo_jax.hf import reading

    theirs, ours = (reading.open_weights(folder / name) for name in ("theirs", "ours"))
    assert theirs.shapes == ours.shapes and theirs.dtype == ours.dtype == arguments.dtype
    differ = [n for n in theirs.shapes if theirs.read(n).tobytes() != ours.read(n).tobytes()]
    return {"tensors": len(theirs.shapes), "differ": differ}


def answer_from_theirs(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Transformers' logits of its own files."""
    return _torch_answers(folder, "theirs", arguments)


def answer_from_ours(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """Transformers' logits of the files that we wrote, loaded as they are."""
    return _torch_answers(folder, "ours", arguments)


def _torch_answers(folder: pathlib.Path, source: str, arguments: argparse.Namespace) -> dict:
    import torch
    import transformers

    # In float32 whatever is stored: what is compared is reading, not bfloat16's arithmetic.
    model, info = transformers.GPTNeoForCausalLM.from_pretrained(
        folder / source, output_loading_info=True, attn_implementation="eager", dtype="float32"
    )
    with torch.no_grad():
        logits = model(torch.tensor(prompt(arguments)), use_cache=False).logits.numpy()
    np.save(folder / f"logits_torch_{source}.npy", logits)
    difference = np.abs(logits - np.load(folder / "logits_ours.npy")).max()
    return {
        "loading_info": {key: len(value) for key, value in info.items()},
        "ours_differ_over_largest": float(f"{difference / np.abs(logits).max():.3g}"),
    }


def exact(folder: pathlib.Path, arguments: argparse.Namespace) -> dict:
    """The tests' NumPy GPT-Neo in float64, a weight at a time; all answers against it."""
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tests"))
    import reference
    from neo_jax import config
    from neo_jax.hf import reading

    class Files(dict):
        def __getitem__(self, name: str) -> np.ndarray:
            return files.read(name)

    files = reading.open_weights(folder / "theirs")
    shape = config.preset_model(arguments.model)
    expected = reference.logits(
        Files(files.shapes),
        prompt(arguments)[0],
        layer_types=shape.layer_types,
        num_heads=shape.num_heads,
        window=shape.window_size,
        activation=shape.activation,
        eps=shape.layer_norm_eps,
    )
    given = {path.stem: np.load(path)[0] for path in sorted(folder.glob("logits_*.npy"))}
    answers = {name.removeprefix("logits_"): logits for name, logits in given.items()}
    largest = float(np.abs(expected).max())

    def error(logits: np.ndarray, other: np.ndarray) -> float:
        return float(f"{np.abs(logits.astype(np.float64) - other).max() / largest:.3g}")

    return {
        "largest_logit": round(largest, 2),
        "std_of_logits": round(float(expected.std()), 3),
        "error_over_largest": {name: error(a, expected) for name, a in answers.items()},
        "ours_against_torch": {
            name: error(answers["ours"], a) for name, a in answers.items() if name != "ours"
        },
        "torch_alike": bool((answers["torch_theirs"] == answers["torch_ours"]).all()),
    }


STAGES = {
    stage.__name__: stage
    for stage in (
        write_theirs,
        read_and_write,
        compare,
        answer_from_theirs,
        answer_from_ours,
        exact,
    )
}
WITHOUT_ANSWERS = ("write_theirs", "read_and_write", "compare")


def main() -> None:
    """Runs one stage, or each in a process of its own."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=pathlib.Path, required=True)
    parser.add_argument("--model", default="neo_1p3b")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--initializer", default="mtf", choices=("mtf", "hf"))
    parser.add_argument(
        "--devices",
        type=int,
        default=1,
        help="simulated; above 1, nobody answers (%(default)s)",
    )
    parser.add_argument("--tokens", type=int, default=300, help="of the prompt (%(default)s)")
    parser.add_argument("--stage", choices=STAGES)
    arguments = parser.parse_args()
    what = {"model": arguments.model, "dtype": arguments.dtype}
    what |= {"initializer": arguments.initializer, "devices": arguments.devices}
    if arguments.stage:
        start = time.perf_counter()
        result = STAGES[arguments.stage](arguments.scratch, arguments)
        seconds = round(time.perf_counter() - start, 1)
        line = {"stage": arguments.stage, "seconds": seconds, "peak_gib": round(peak_gib(), 2)}
        print(json.dumps({**what, **line, **result}), flush=True)
        return
    arguments.scratch.mkdir(parents=True)
    try:
        for stage in STAGES if arguments.devices == 1 else WITHOUT_ANSWERS:
            subprocess.run([sys.executable, *sys.argv, "--stage", stage], check=True)
    finally:
        shutil.rmtree(arguments.scratch)


if __name__ == "__main__":
    main()
