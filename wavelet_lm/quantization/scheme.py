"""Which weights are kept in how many bits: what was asked for, and what a file says of itself."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass

from wavelet_lm.config import Config, QuantizationConfig
from wavelet_lm.errors import UserError
from wavelet_lm.fusion.fuse import COMPONENTS
from wavelet_lm.json_files import brief, parse_json

VERSION = 1


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits by component, and how weights of less than 8 bits are grouped.

    Attributes:
        bits: of every component (`COMPONENTS` of `fuse.py`): 2, 4, 8, or 16 = left as they are.
        group_size: weights of a row that share a scale, below 8 bits; 8 bits have one per row.
        backend: whose products read the matrices: native, torchao or bitsandbytes.
        calibrated: roundings below 8 bits were compensated for on a text.
    """

    bits: dict[str, int]
    group_size: int
    backend: str = "native"
    calibrated: bool = False

    @classmethod
    def of(cls, config: QuantizationConfig, calibrated: bool = False) -> Scheme:
        """What the `quantize_*` keys ask for; `quantize_bits` where a component has no key."""
        bits = {
            name: getattr(config, f"quantize_{name}_bits", None) or config.quantize_bits
            for name in COMPONENTS
        }
        return cls(
            bits=bits,
            group_size=config.quantize_group_size,
            backend=config.quantize_backend,
            calibrated=calibrated,
        )

    @classmethod
    def uniform(cls, bits: int) -> Scheme:
        """The same bits for everything."""
        return cls.of(Config(quantize_bits=bits))

    def precision(self, component: str) -> int:
        """Bits of a component's weights."""
        return self.bits[component]

    def describe(self) -> str:
        """In a few words, for a line of a log."""
        most = self.bits["rest"]
        others = [f"{name} {bits}" for name, bits in self.bits.items() if bits != most]
        words = f"{most}-bit weights" + (f" ({', '.join(others)})" if others else "")
        if self.backend != "native":
            words += f" by {self.backend}"
        return words + (", calibrated" if self.calibrated else "")

    def to_json(self) -> str:
        """The scheme as a line of a checkpoint's header."""
        return json.dumps({"version": VERSION, **dataclasses.asdict(self)})

    @classmethod
    def from_json(cls, text: str, source: str) -> Scheme:
        """The scheme of a file.

        Raises:
            UserError: this version does not know it.
        """
        try:
            values = parse_json(text, source)
            version = values.pop("version")
            scheme = cls(**values)
            known = (
                version == VERSION
                and scheme.backend == "native"
                and tuple(scheme.bits) == COMPONENTS
                and all(bits in (2, 4, 8, 16) for bits in scheme.bits.values())
                and scheme.group_size > 0
                and scheme.group_size % 16 == 0
            )
        except (UserError, TypeError, KeyError, AttributeError):
            known = False
        if not known:
            raise UserError(
                f"{source}: quantized by a scheme that this version does not know ({brief(text)});"
                " quantize the run again, or use the version that wrote the file"
            )
        return scheme
