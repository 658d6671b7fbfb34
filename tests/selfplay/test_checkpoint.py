"""A checkpoint exists whole or not at all, and says which file of it was damaged."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from selfplay.checkpoint import (
    CheckpointError,
    existing,
    latest,
    load,
    path_of,
    read_state,
    verify,
)
from selfplay.learner import Budget, Learner, LearnerSettings
from selfplay.objectives import Sft
from selfplay.optimizers import OptimizerSettings
from tests.selfplay.learning import FakeTrace, random_tree, tiny_policy
from tests.selfplay.places import held, save


@pytest.fixture
def checkpoints(tmp_path):
    """Of a run that is held."""
    held(tmp_path)
    return tmp_path / "checkpoints"


@pytest.fixture(scope="module")
def learner():
    import numpy as np

    learner = Learner(tiny_policy(), Sft(value=0.5), LearnerSettings(OptimizerSettings(), max_length=64, threads=1))
    learner.learn(1, [FakeTrace(random_tree(np.random.default_rng(0)))], Budget(steps=1))
    return learner


def test_what_was_saved_is_what_is_loaded(learner, checkpoints):
    state = {"iteration": 3, "rng": [1, 2], "rates": {"a": 0.5}}
    folder = save(checkpoints, 3, learner.policy, learner.state_dict(), state)
    assert folder == path_of(checkpoints, 3) == checkpoints / "00003"
    assert {p.name for p in folder.iterdir()} == {"policy", "value_head.safetensors", "optimizer.pt", "state.json"}
    policy, optimizer, found = load(folder)
    assert found == state == read_state(folder)
    for ours, theirs in ((policy.model, learner.policy.model), (policy.head, learner.policy.head)):
        old = theirs.state_dict()
        assert all(torch.equal(value, old[name]) for name, value in ours.state_dict().items())
    fresh = Learner(policy, Sft(value=0.5), learner.settings)
    fresh.load_state_dict(optimizer)
    before, after = learner.state_dict()["adamw"]["state"], fresh.state_dict()["adamw"]["state"]
    assert all(torch.equal(before[k]["exp_avg_sq"], after[k]["exp_avg_sq"]) for k in before)


def test_the_policy_folder_loads_with_transformers_alone(learner, checkpoints):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = save(checkpoints, 0, learner.policy, None, {})
    model = AutoModelForCausalLM.from_pretrained(folder / "policy")
    ids = AutoTokenizer.from_pretrained(folder / "policy")("w5 w6", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(model(ids).logits, learner.policy.model(ids).logits)


def test_every_damaged_or_missing_file_is_named(learner, checkpoints):
    folder = save(checkpoints, 1, learner.policy, learner.state_dict(), {})
    verify(folder)
    names = list(json.loads((folder / "state.json").read_text())["files"])
    assert {"policy/model.safetensors", "value_head.safetensors", "optimizer.pt"} <= set(names)
    for name in names:
        path = folder / name
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name} has sha256"):
            load(folder)
        path.write_bytes(content[:-1])
        with pytest.raises(CheckpointError, match=f"{name} has size"):
            verify(folder)
        path.unlink()
        with pytest.raises(CheckpointError, match=f"lacks {name}"):
            verify(folder)
        path.write_bytes(content)
    verify(folder)


def test_a_checkpoint_without_state_does_not_exist(learner, checkpoints):
    save(checkpoints, 1, learner.policy, None, {})
    save(checkpoints, 2, learner.policy, None, {})
    assert latest(checkpoints) == 2
    (path_of(checkpoints, 2) / "state.json").unlink()
    assert latest(checkpoints) == 1
    with pytest.raises(CheckpointError, match="there is no checkpoint"):
        load(path_of(checkpoints, 2))
    path_of(checkpoints, 1).joinpath("state.json").write_text("{", encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json cannot be read"):
        read_state(path_of(checkpoints, 1))
    assert latest(checkpoints / "nowhere") is None


def test_saving_again_replaces_the_checkpoint(learner, checkpoints):
    save(checkpoints, 1, learner.policy, None, {"try": 1})
    save(checkpoints, 1, learner.policy, None, {"try": 2})
    assert read_state(path_of(checkpoints, 1)) == {"try": 2}
    assert [p.name for p in checkpoints.iterdir()] == ["00001"]


def test_a_state_that_is_no_json_leaves_nothing_behind(learner, checkpoints):
    with pytest.raises(CheckpointError, match="cannot be written"):
        save(checkpoints, 1, learner.policy, None, {"bad": object()})
    assert latest(checkpoints) is None
    assert list(checkpoints.iterdir()) == []


def test_an_optimizer_file_that_runs_code_is_refused(learner, checkpoints):
    folder = save(checkpoints, 1, learner.policy, {"x": torch.zeros(1)}, {})
    torch.save({"x": subprocess.Popen}, folder / "optimizer.pt")
    manifest = json.loads((folder / "state.json").read_text())
    del manifest["files"]["optimizer.pt"]
    (folder / "state.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"optimizer\.pt cannot be read"):
        load(folder)


class Death(BaseException):
    """The process ends here: nothing may catch it."""


@pytest.fixture
def dying(monkeypatch):
    """Set `left` to n: the n-th sync, rename, removal or new folder from there kills the process."""
    calls = {"left": -1}

    def wrap(real):
        def call(*args, **kwargs):
            calls["left"] -= 1
            if calls["left"] == 0:
                raise Death
            return real(*args, **kwargs)

        return call

    for name in ("fsync", "rename", "unlink", "rmdir", "mkdir"):
        monkeypatch.setattr(os, name, wrap(getattr(os, name)))
    return calls


def test_death_at_any_moment_of_saving_leaves_whole_checkpoints_only(learner, checkpoints, dying):
    """The next save goes on from whatever was left."""
    save(checkpoints, 1, learner.policy, None, {"try": 0})
    for moment in itertools.count(1):
        dying["left"] = moment
        try:
            save(checkpoints, 2, learner.policy, None, {"try": moment})
        except Death:
            dying["left"] = -1
            for number in existing(checkpoints):
                verify(path_of(checkpoints, number))
            assert read_state(path_of(checkpoints, 1)) == {"try": 0}
        else:
            break
    dying["left"] = -1
    assert moment > 20
    assert read_state(path_of(checkpoints, 2)) == {"try": moment}
    assert sorted(p.name for p in checkpoints.iterdir()) == ["00001", "00002"]


SAVER = """
import itertools, pathlib, sys
from tests.selfplay.places import save
from tests.selfplay.learning import tiny_policy
policy = tiny_policy()
print("ready", flush=True)
for number in itertools.count():
    save(pathlib.Path(sys.argv[1]), number % 4, policy, None, {"number": number})
"""


@pytest.mark.slow
def test_a_writer_that_was_killed_leaves_whole_checkpoints_only(checkpoints):
    writer = subprocess.Popen([sys.executable, "-c", SAVER, str(checkpoints)], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    assert writer.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    writer.stdout.close()
    for number in existing(checkpoints):
        load(path_of(checkpoints, number))
    save(checkpoints, 9, tiny_policy(), None, {})
    assert latest(checkpoints) == 9
