import pytest
import torch

from wavelet_lm import Config, UserError
from wavelet_lm.devices import amp_dtype, autocast, reading, resolve_device


def pretend_gpus(monkeypatch, n):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: n > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: n)
    current = [0]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    monkeypatch.setattr(torch.cuda, "set_device", lambda n: current.__setitem__(0, n))


def test_auto_takes_the_gpu_if_there_is_one(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    assert resolve_device("auto") == torch.device("cpu")
    pretend_gpus(monkeypatch, 2)
    assert resolve_device("auto") == torch.device("cuda:0")
    assert resolve_device("cuda:1") == torch.device("cuda:1")
    assert resolve_device("cpu") == torch.device("cpu")


def test_a_gpu_that_is_named_is_the_current_one_from_then_on(monkeypatch):
    """Triton runs its kernels there, whatever their tensors say."""
    pretend_gpus(monkeypatch, 2)
    resolve_device("cuda:1")
    assert torch.cuda.current_device() == 1
    assert resolve_device("cuda") == torch.device("cuda:1")
    with pytest.raises(UserError):
        resolve_device("cuda:2")
    assert torch.cuda.current_device() == 1


@pytest.mark.parametrize("name", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", "meta", "cpu:0"])
def test_unknown_devices_are_one_line(monkeypatch, name):
    pretend_gpus(monkeypatch, 1)
    with pytest.raises(UserError, match="must be auto, cpu, cuda or cuda:N"):
        resolve_device(name)


def test_absent_devices_are_one_line(monkeypatch):
    pretend_gpus(monkeypatch, 0)
    with pytest.raises(UserError, match="sees no CUDA GPU"):
        resolve_device("cuda")
    pretend_gpus(monkeypatch, 2)
    with pytest.raises(UserError, match="the last CUDA GPU here is cuda:1"):
        resolve_device("cuda:2")


def test_precision_of_a_run():
    cpu = torch.device("cpu")
    assert amp_dtype(Config(), cpu) == torch.float32
    assert amp_dtype(Config(amp_dtype="bf16"), cpu) == torch.bfloat16
    assert amp_dtype(Config(amp_dtype="bf16", use_amp=False), cpu) == torch.float32
    a, b = torch.ones(2, 2), torch.ones(2, 2)
    context = autocast(cpu, torch.bfloat16)
    for _ in range(2):
        with context:
            assert (a @ b).dtype == torch.bfloat16
    with autocast(cpu, torch.float32):
        assert (a @ b).dtype == torch.float32


def test_reading_gives_the_training_mode_back():
    model = torch.nn.Dropout(0.5)
    with pytest.raises(KeyError), reading(model):
        assert not model.training
        assert torch.is_inference_mode_enabled()
        raise KeyError
    assert model.training
    assert not torch.is_inference_mode_enabled()
    with reading(model.eval()):
        pass
    assert not model.training
