"""The shares of several processes are written by a thread, which must be waited for and heard."""

import errno
import time

import pytest
import torch.distributed as dist

from tests.training import runs
from wavelet_lm.errors import UserError
from wavelet_lm.models.registry import build_model
from wavelet_lm.training import sharded_checkpoint
from wavelet_lm.training.processes import ALONE
from wavelet_lm.training.run_folder import RunFolder
from wavelet_lm.training.sharded_checkpoint import ShardedCheckpoint, ShardedSaver
from wavelet_lm.training.weights import Weights


@pytest.fixture
def save(tmp_path):
    """Begins to save a small model by the group of this one process; what is left to call ends."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    (tmp_path / "checkpoints").mkdir()
    saver = ShardedSaver(RunFolder(tmp_path), keep=1, processes=ALONE)
    model = build_model(runs.run_config(tmp_path), 64)

    def begin(step: int):
        saver.save(model, Weights(model), {"step": step, "total_steps": 9}, {})
        return saver.finish

    yield begin
    dist.destroy_process_group()


def test_a_state_has_its_name_before_training_goes_on(save, tmp_path, monkeypatch):
    forget = sharded_checkpoint.forget_older

    def slowly(*arguments):
        time.sleep(0.3)
        forget(*arguments)

    monkeypatch.setattr(sharded_checkpoint, "forget_older", slowly)
    save(2)
    save(4)()
    (folder,) = (tmp_path / "checkpoints").iterdir()
    assert ShardedCheckpoint(folder).metadata["step"] == 4


def test_a_state_that_cannot_get_its_name_is_an_error(save, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sharded_checkpoint, "sync_folder", full)
    finish = save(2)
    with pytest.raises(UserError, match="the disk is full"):
        finish()
