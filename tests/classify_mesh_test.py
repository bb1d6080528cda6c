"""Eight devices, and slices of batches, learn and judge a task as one device does."""

import jax
import pytest

from neo_jax import sharding
from tests.classify_test import base as base
from tests.classify_test import folder as folder
from tests.classify_test import learn
from tests.pretrain_test import lines

BATCHES = ("--config.data.batch_size=8", "--config.eval.batch_size=8")


@pytest.mark.slow
def test_eight_devices_and_slices_learn_as_one_device(
    folder, base, tmp_path, monkeypatch
) -> None:
    make_mesh = sharding.make_mesh
    with monkeypatch.context() as patch:
        patch.setattr(
            sharding,
            "make_mesh",
            lambda config, devices=None: make_mesh(config, devices or jax.devices()[:1]),
        )
        assert learn(folder, base, tmp_path / "one", "copa", *BATCHES) == 0
    how = ("--config.mesh.fsdp=4", "--config.mesh.tensor=2")
    how += ("--config.train.accumulation_steps=2",)
    assert learn(folder, base, tmp_path / "eight", "copa", *BATCHES, *how) == 0
    one, eight = lines(tmp_path / "one"), lines(tmp_path / "eight")
    assert len(one) == len(eight) > 6
    for ours, theirs in zip(eight, one, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        if theirs["split"] == "train":
            assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
        else:
            assert ours["score"] == theirs["score"]
