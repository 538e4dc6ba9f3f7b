"""Networks as they are typed."""

import pytest

from wavelet_lm.config import ConfigError
from wavelet_lm.experiments.model_names import model_configs, split_names


def test_names_are_split_around_lists_of_numbers():
    text = "gpt, wavelet_lm+levels=2+per_scale_mixer_widths=1,1,.5,wavelet_gpt:db4@0.25"
    names = ["gpt", "wavelet_lm+levels=2+per_scale_mixer_widths=1,1,.5", "wavelet_gpt:db4@0.25"]
    assert split_names(text) == names
    configs = model_configs(names, {"C": 32, "wavelet_shared_kernels": False})
    assert list(configs) == names
    gpt, wavelet_lm, averaged = configs.values()
    assert (gpt.model, wavelet_lm.model, averaged.model) == ("gpt", "wavelet_lm", "wavelet_gpt")
    assert wavelet_lm.per_scale_mixer_widths == (1, 1, 0.5) and wavelet_lm.levels == 2
    assert (averaged.wavelet_module, averaged.wavelet_fraction) == ("db4", 0.25)
    assert {config.C for config in configs.values()} == {32}


def test_shared_keys_of_a_wavelet_gpt_are_its_own():
    shared = {"wavelet_module": "ema", "wavelet_fraction": 0.75}
    configs = model_configs(["gpt", "wavelet_gpt", "wavelet_gpt@0.5", "wavelet_gpt:haar"], shared)
    chosen = [(c.wavelet_module, c.wavelet_fraction) for c in configs.values()]
    assert chosen == [("haar", 0.5), ("ema", 0.75), ("ema", 0.5), ("haar", 0.75)]
    with pytest.raises(ConfigError, match="model gpt has no moving averages"):
        model_configs(["gpt"], shared)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "has an empty name"),
        ("gpt,", "has an empty name"),
        ("gpt,gpt", "gpt is given twice"),
        ("gpt,wavlet_gpt", "model is wavlet_gpt; it must be wavelet_lm | gpt | wavelet_gpt"),
        ("gpt,,wavelet_gpt", "model is gpt,; it must be"),
        ("gpt:haar", "gpt has no moving averages; drop :haar"),
        ("wavelet_lm@0.5", "wavelet_lm has no moving averages; drop @0.5"),
        ("wavelet_gpt:haar:ema", "is no model; write MODEL"),
        ("wavelet_gpt@half", "--wavelet_fraction is 'half'; it must be a number"),
        ("wavelet_gpt@1.5", "wavelet_fraction is 1.5; it must be > 0 and <= 1"),
        ("gpt+layers", "'layers' sets nothing; write +KEY=VALUE"),
        ("gpt+layer=3", "unknown key 'layer'; did you mean layers"),
        ("gpt+layers=two", "--layers is 'two'; it must be a whole number"),
        ("gpt+layers=0", "layers is 0; it must be >= 1"),
        ("gpt+layers=1+layers=2", "layers is given twice"),
        ("gpt+model=wavelet_lm", "model is given twice"),
        ("wavelet_gpt:haar+wavelet_module=ema", "wavelet_module is given twice"),
        ("gpt+block_size=8", "block_size is no key of the network"),
        ("gpt+lr=0.1", "lr is no key of the network"),
        ("gpt+heads=3", "heads is 3; C (2048) must be divisible by it"),
    ],
)
def test_mistakes(text, words):
    with pytest.raises(ConfigError) as error:
        model_configs(split_names(text), {})
    assert words in str(error.value)
    assert "\n" not in str(error.value)
