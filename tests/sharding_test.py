"""One table places every tensor; what it cannot place is refused with what would do."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import tpu_compiler
from neo_jax import sharding, state
from neo_jax.config import ConfigError, MeshConfig, preset_model

NO_SPLIT = {"data": 1, "fsdp": 1, "tensor": 1, "context": 1}


# --------------------------------------------------------------------------------- mesh


@pytest.mark.parametrize(
    ("config", "shape"),
    [
        ({}, (1, 8, 1, 1)),
        ({"data": -1, "fsdp": 1}, (8, 1, 1, 1)),
        ({"data": 2, "fsdp": 2, "tensor": 2}, (2, 2, 2, 1)),
        ({"tensor": 4}, (1, 2, 4, 1)),
        ({"fsdp": 4, "context": -1}, (1, 4, 1, 2)),
        ({"tensor": 8}, (1, 1, 8, 1)),
    ],
    ids=str,
)
def test_a_mesh_takes_all_devices(config, shape):
    mesh = sharding.make_mesh(MeshConfig(**config))
    assert mesh.axis_names == ("data", "fsdp", "tensor", "context")
    assert mesh.devices.shape == shape
    assert set(mesh.devices.flat) == set(jax.devices())
    assert set(mesh.axis_types) == {AxisType.Auto}


def test_a_mesh_of_fewer_devices():
    mesh = sharding.make_mesh(MeshConfig(data=2), jax.devices()[:4])
    assert mesh.devices.shape == (2, 2, 1, 1)
    assert list(mesh.devices.flat) == jax.devices()[:4]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": 3}, "data=3 × fsdp=-1 × tensor=1 × context=1 does not make up 8 devices"),
        ({"data": 2, "fsdp": 2}, "data=2 × fsdp=2 × tensor=1 × context=1 does not make up 8"),
        ({"data": 16}, "data=16 × fsdp=-1"),
        ({"fsdp": 16}, "fsdp=16"),
    ],
    ids=str,
)
def test_a_mesh_that_does_not_make_up_the_devices_is_refused(config, words):
    with pytest.raises(ConfigError) as error:
        sharding.make_mesh(MeshConfig(**config))
    line = str(error.value)
    assert words in line and "set one axis to -1" in line and "\n" not in line


def test_slices_lie_behind_one_another_along_data():
    mesh = sharding.make_mesh(MeshConfig(slices=2, data=2, fsdp=-1))
    assert mesh.devices.shape == (4, 2, 1, 1)
    assert list(mesh.devices.flat) == jax.devices()
    with pytest.raises(ConfigError, match=r"mesh.slices=3 does not divide 8 devices"):
        sharding.make_mesh(MeshConfig(slices=3))
    with pytest.raises(ConfigError, match="does not make up 4 devices of a slice"):
        sharding.make_mesh(MeshConfig(slices=2, fsdp=8))


def test_slices_that_the_chips_do_not_lie_in_are_refused():
    both = {"topology": "v5e:2x2", "num_slices": 2}
    mesh = tpu_compiler.mesh(config=MeshConfig(slices=-1), **both)
    assert mesh.devices.shape == (2, 4, 1, 1)
    # Each row is a slice: what fsdp gathers stays inside.
    assert [{d.slice_index for d in row.flat} for row in mesh.devices] == [{0}, {1}]
    with pytest.raises(ConfigError, match=r"mesh.slices=1, but the devices lie in 2; use"):
        tpu_compiler.mesh(config=MeshConfig(), **both)


def test_a_process_loads_the_rows_of_its_devices(mesh):
    assert sharding.host_share(mesh, 16) == (0, 1)
    with pytest.raises(ConfigError, match="batch=6 does not divide"):
        sharding.host_share(mesh, 6)


@pytest.mark.parametrize(
    ("topology", "axes", "hosts_of_a_row"),
    [
        ("v5e:4x4", {}, 1),
        ("v4:2x2x4", {}, 1),
        ("v5e:8x8", {"tensor": 4}, 2),
        # No physical axis is 8 or 2 long there.
        ("v6e:4x4", {"data": 2}, 1),
        ("v6e:4x4", {"tensor": 2, "context": 2}, 2),
    ],
)
def test_hosts_of_a_pod_share_a_batch(topology, axes, hosts_of_a_row):
    """Their chips are squares of the grid, and their rows seldom one piece of the batch."""
    mesh = tpu_compiler.mesh(topology, MeshConfig(fsdp=-1, **axes))
    size = 2 * mesh.shape["data"] * mesh.shape["fsdp"]
    rows = sharding.rows_by_process(mesh, size)
    assert len(rows) == mesh.size // 4
    everyone = sorted(row for own in rows.values() for row in own)
    assert everyone == sorted([*range(size)] * hosts_of_a_row)
    assert sharding.host_share(mesh, size) == (0, len(rows) // hosts_of_a_row)


def test_processes_that_overlap_in_part_are_refused(mesh, monkeypatch):
    rows = {0: (0, 1, 2, 3), 1: (2, 3, 4, 5), 2: (4, 5, 6, 7)}
    monkeypatch.setattr(sharding, "rows_by_process", lambda *_: rows)
    with pytest.raises(ConfigError, match="3 parts of 8 sequences that overlap in part"):
        sharding.host_share(mesh, 8)


def test_the_plan_in_words(mesh):
    _, params = state.model_graph(preset_model("neo_125m"))
    text = sharding.describe(params, mesh)
    lines = text.splitlines()
    assert lines[0] == "mesh: data 2 × fsdp 2 × tensor 2 × context 1 = 8 × cpu"
    assert lines[1] == (
        "activations: batch ÷ data × fsdp, heads ÷ tensor, mlp ÷ tensor, vocab ÷ tensor"
    )
    words = "layers 12, embed 768 ÷ fsdp 2, heads 12 ÷ tensor 2, head_dim 64"
    (line,) = (x for x in lines if x.startswith("blocks.attention.query.kernel"))
    assert words in line and "12 × 384 × 6 × 64" in line and line.endswith("6.8")
    assert "parameters of a device: 12" in lines[-1] and len(lines) == 4 + 17


# ---------------------------------------------------------------------------- the table


def test_the_table():
    """Changing how tensors lie is a decision: this copy says so."""
    assert dict(sharding.TABLE) == {
        "batch": ("data", "fsdp"),
        "seq": ("context",),
        "layers": None,
        "embed": ("fsdp",),
        "heads": ("tensor",),
        "head_dim": None,
        "mlp": ("tensor",),
        "vocab": ("tensor",),
        "positions": None,
        "rank": None,
        "labels": None,
    }
    assert tuple(NO_SPLIT) == sharding.MESH_AXES


@pytest.mark.parametrize(
    ("names", "shape", "sizes", "spec"),
    [
        (("embed", "heads", "head_dim"), (8, 4, 3), {"fsdp": 4, "tensor": 2}, "fsdp tensor ."),
        (("embed", "heads", "head_dim"), (8, 4, 3), {"tensor": 2}, ". tensor ."),
        (("batch", "seq", None), (8, 6, 5), {"data": 2, "fsdp": 4}, "data+fsdp . ."),
        (("batch", "seq"), (8, 6), {"fsdp": 4, "context": 3}, "fsdp context"),
        ((None, None), (7, 5), {"data": 2, "fsdp": 4}, ". ."),
        ((), (), {"fsdp": 8}, ""),
        (("vocab", "embed"), (50304, 2560), {}, ". ."),
    ],
)
def test_dimensions_are_looked_up(names, shape, sizes, spec):
    expected = [None if axes == "." else tuple(axes.split("+")) for axes in spec.split()]
    found = sharding.partition_spec(names, shape, NO_SPLIT | sizes)
    assert found == PartitionSpec(*expected)


@given(
    dims=st.lists(
        st.tuples(st.sampled_from([None, *sharding.TABLE]), st.integers(1, 24)), max_size=4
    ),
    sizes=st.fixed_dictionaries(
        {axis: st.sampled_from([1, 2, 3, 4]) for axis in sharding.MESH_AXES}
    ),
)
def test_what_is_placed_is_whole_and_what_is_not_is_refused(dims, sizes):
    names, shape = [name for name, _ in dims], [size for _, size in dims]
    wanted = [
        [axis for axis in (sharding.TABLE.get(name) or ()) if sizes[axis] > 1]
        for name in names
    ]
    used = [axis for axes in wanted for axis in axes]
    parts = [int(np.prod([sizes[axis] for axis in axes])) for axes in wanted]
    possible = len(set(used)) == len(used) and not any(
        size % part for size, part in zip(shape, parts, strict=True)
    )
    if possible:
        spec = sharding.partition_spec(names, shape, sizes)
        assert spec == PartitionSpec(*(tuple(axes) or None for axes in wanted))
    else:
        with pytest.raises(ValueError, match=r"does not divide over|would both be split"):
            sharding.partition_spec(names, shape, sizes)


@pytest.mark.parametrize(
    ("names", "shape", "sizes", "line"),
    [
        (
            ("embed", "heads", "head_dim"),
            (2560, 20, 128),
            {"tensor": 8},
            "heads=20 does not divide over tensor=8; use one of {1, 2, 4, 5, 10, 20}.",
        ),
        (
            ("batch", "seq"),
            (6, 4),
            {"data": 2, "fsdp": 4},
            "batch=6 does not divide over data × fsdp=8; use one of {1, 2, 3, 6}.",
        ),
        (
            ("embed", "head"),
            (4, 4),
            {},
            "logical axis 'head' is unknown; there are batch, seq, layers, embed, heads,",
        ),
        (
            ("embed", "mlp"),
            (4, 4, 4),
            {},
            "2 axis names ('embed', 'mlp') for a tensor (4, 4, 4).",
        ),
        (
            ("vocab", "mlp"),
            (4, 4),
            {"tensor": 2},
            "'vocab' and 'mlp' of one tensor ('vocab', 'mlp') would both be split over mesh "
            "axis 'tensor'; name one of them None.",
        ),
        (
            ("batch", "embed"),
            (4, 4),
            {"fsdp": 2},
            "'batch' and 'embed' of one tensor ('batch', 'embed') would both be split",
        ),
    ],
)
def test_nothing_is_replicated_silently(names, shape, sizes, line):
    with pytest.raises(ValueError, match=r".") as error:
        sharding.partition_spec(names, shape, NO_SPLIT | sizes)
    assert str(error.value).startswith(line) and "\n" not in str(error.value)


# --------------------------------------------------------------------------- parameters

# The mesh axis of each dimension, as the table and the model's names make it together.
PLACES = {
    "blocks.attention.key.kernel": ". fsdp tensor .",
    "blocks.attention.out.bias": ". fsdp",
    "blocks.attention.out.kernel": ". tensor . fsdp",
    "blocks.attention.query.kernel": ". fsdp tensor .",
    "blocks.attention.value.kernel": ". fsdp tensor .",
    "blocks.ln_1.bias": ". fsdp",
    "blocks.ln_1.scale": ". fsdp",
    "blocks.ln_2.bias": ". fsdp",
    "blocks.ln_2.scale": ". fsdp",
    "blocks.mlp.down.bias": ". fsdp",
    "blocks.mlp.down.kernel": ". tensor fsdp",
    "blocks.mlp.up.bias": ". tensor",
    "blocks.mlp.up.kernel": ". fsdp tensor",
    "embedder.embedding": "tensor fsdp",
    "embedder.positions": ". fsdp",
    "ln_f.bias": "fsdp",
    "ln_f.scale": "fsdp",
    "untied_head": "tensor fsdp",
}


@pytest.mark.parametrize("preset", ["neo_125m", "neo_350m", "neo_1p3b", "neo_2p7b"])
@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 8},
        {"data": 8, "fsdp": 1},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 4},
        {"data": 1, "fsdp": 4, "context": 2},
    ],
    ids=str,
)
def test_every_parameter_lies_where_the_table_says(preset, sizes):
    _, params = state.model_graph(preset_model(preset, tie_embeddings=False))
    mesh = sharding.make_mesh(MeshConfig(**sizes))
    shapes = dotted(params)
    places = dotted(nnx.to_pure_dict(sharding.param_shardings(params, mesh)))
    assert places.keys() == shapes.keys() == PLACES.keys()
    for name, place in places.items():
        shape = shapes[name].shape
        split = [1 if axis == "." else mesh.shape[axis] for axis in PLACES[name].split()]
        expected = tuple(size // n for size, n in zip(shape, split, strict=True))
        assert place.mesh == mesh and place.shard_shape(shape) == expected, name


def dotted(tree) -> dict:
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(
            tree, is_leaf=lambda x: isinstance(x, nnx.Variable)
        )
    }


def test_a_parameter_that_cannot_be_placed_is_named():
    _, params = state.model_graph(preset_model("neo_2p7b", num_layers=2))
    mesh = sharding.make_mesh(MeshConfig(tensor=8))
    with pytest.raises(ConfigError) as error:
        sharding.param_shardings(params, mesh)
    assert str(error.value) == (
        "mesh: parameter blocks.attention.key.kernel: heads=20 does not divide over "
        "tensor=8; use one of {1, 2, 4, 5, 10, 20}."
    )


# -------------------------------------------------------------------------- activations


def test_batches_are_split_by_sequence_and_by_position():
    mesh = sharding.make_mesh(MeshConfig(data=2, fsdp=2, context=2))
    place = sharding.batch_sharding(mesh, (8, 64))
    assert place.shard_shape((8, 64)) == (2, 32)
    for shape, words in (((6, 64), "batch=6 does not divide"), ((8, 63), "seq=63 does not")):
        with pytest.raises(ConfigError, match=f"data.batch_size or data.seq_len: {words}"):
            sharding.batch_sharding(mesh, shape)


def test_constrain_without_a_mesh_is_the_identity():
    x = jnp.ones((3, 5))
    assert sharding.constrain(x, "batch", "seq") is x
    # As is a mesh of one device.
    with jax.set_mesh(sharding.make_mesh(MeshConfig(), jax.devices()[:1])):
        assert sharding.constrain(x, "batch", "seq") is x


def test_constrain_places_an_activation(mesh):
    x = np.arange(8 * 4 * 6, dtype=np.float32).reshape(8, 4, 6)
    with jax.set_mesh(mesh):
        placed = jax.jit(lambda x: sharding.constrain(2 * x, "batch", "seq", "mlp"))(x)
    assert placed.sharding.is_equivalent_to(
        NamedSharding(mesh, PartitionSpec(("data", "fsdp"), None, "tensor")), 3
    )
    np.testing.assert_array_equal(placed, 2 * x)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("batch", "sequence"), "'sequence' is unknown"),
        (("batch",), "1 axis names"),
        (("batch", "mlp"), "mlp=5 does not divide over tensor=2"),
    ],
)
def test_constrain_refuses_what_the_table_cannot_place(mesh, names, words):
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=words):
        jax.jit(lambda x: sharding.constrain(x, *names))(jnp.ones((8, 5)))
