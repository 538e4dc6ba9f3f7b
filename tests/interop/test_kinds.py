"""`convert` and `push` on what they do not take: what it is, what they take, what to do."""

import json

import pytest

from tests.cli.commands import typed
from wavelet_lm.errors import UserError

OF_ANOTHER = '{"model_type": "gpt2"}'
OF_OURS = '{"model_type": "wavelet_lm"}'


@pytest.fixture
def folder(tmp_path):
    """What people have: a run, one without its best weights, folders of transformers, files."""
    files = {
        "logs/RUN/best.safetensors": "",
        "logs/RUN/config.json": "{}",
        "early/last.safetensors": "",
        "early/config.json": "{}",
        "hf/config.json": OF_OURS,
        "gpt2/config.json": OF_ANOTHER,
        "adapter/adapter_config.json": "{}",
        "published/best_model.pt": "",
        "published/config.json": json.dumps({"C": 8}),
        "broken/config.json": "{",
        "notes.txt": "",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


@pytest.mark.parametrize(
    ("given", "is_what", "instead"),
    [
        ("logs/RUN", "a run folder", "a run folder is used as it is"),
        ("early", "a run folder without best.safetensors", "a run folder is used as it is"),
        ("gpt2", "a folder of transformers, of another model (model_type 'gpt2')", ""),
        (
            "adapter",
            "an adapter alone",
            "merge the adapter first (merge_and_unload, save_pretrained)",
        ),
        ("published", "neither a run folder", "give one of those in it: best_model.pt"),
        (".", "neither a run folder", "give one of those in it: hf"),
        ("broken", "neither a run folder", ""),
        ("notes.txt", "no published checkpoint (.pt or .pth)", ""),
        ("nowhere", "there is no such file or folder", None),
    ],
)
def test_convert_says_what_it_was_given_and_takes(folder, given, is_what, instead):
    with pytest.raises(UserError) as error:
        typed("convert", folder / given, "--out", folder / "new")
    assert str(error.value).startswith(f"{folder / given}: {is_what}")
    if instead is not None:
        assert "save_pretrained makes it" in str(error.value)
        assert str(error.value).endswith(instead)
    assert not (folder / "new").exists()


@pytest.mark.parametrize(
    ("given", "is_what", "instead"),
    [
        ("logs", "neither a run folder", "give one of those in it: RUN"),
        ("early", "a run folder without best.safetensors", ""),
        ("hf", "a folder of transformers", "wavelet-lm convert {} --out RUN"),
        ("gpt2", "a folder of transformers, of another model (model_type 'gpt2')", ""),
        ("logs/RUN/best.safetensors", "a file", "give {parent}"),
        ("published/best_model.pt", "a file", "wavelet-lm convert {} --out RUN"),
        ("nowhere", "there is no such file or folder", None),
    ],
)
def test_push_says_what_it_was_given_and_takes(folder, given, is_what, instead):
    path = folder / given
    with pytest.raises(UserError) as error:
        typed("push", path, "ann/waves")
    assert str(error.value).startswith(f"{path}: {is_what}")
    if instead is not None:
        assert "push takes a run folder with its best.safetensors" in str(error.value)
        assert str(error.value).endswith(instead.format(path, parent=path.parent))


@pytest.mark.parametrize("arguments", [("convert", "--out", "new"), ("push", "ann/waves")])
def test_what_is_in_the_hub_is_not_on_this_machine(arguments):
    command, *rest = arguments
    with pytest.raises(UserError, match=r"^hf://ann/waves: is in the hub; give a"):
        typed(command, "hf://ann/waves", *rest)
