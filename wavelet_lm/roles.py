"""What a parameter is for: every module declares its own, once, and whoever counts or trains asks.

A module may have these attributes; what it does not declare it has from the module that holds it.

    component   the name of what its parameters are a part of, in tables of figures
    roles       of its own parameters by name, where they are no vectors; of a part's as `part.name`
    runs()      how often its parts run, for one run of the module itself
    n_products  products of one position beside those with its weights
    joints()    its weights that are read together (`transforms/joined.py`)

A linear layer of PyTorch is a `MAP` and a `BIAS`, an embedding a table of which one row is read, a
LayerNorm's component "norms".
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple, TypeVar

from torch import nn

Module = TypeVar("Module", bound=nn.Module)


@dataclass(frozen=True)
class Role:
    """What one parameter does.

    is_map: the matrix of a linear map within the network, which Muon and weight decay are for;
    vectors: how many vectors of one position it multiplies, 0 where it is no factor of a product;
    rows: of a table, how many one position reads; component: where it is not its module's;
    is_added: to a product, in the product's precision.
    """

    is_map: bool = False
    vectors: int = 0
    rows: int | None = None
    component: str | None = None
    is_added: bool = False

    @property
    def in_products(self) -> bool:
        """Whether mixed precision reads it in half precision, and nothing else does."""
        return self.vectors > 0 or self.is_added


VECTOR = Role()
MAP = Role(is_map=True, vectors=1)
# A factor of a product that is no map within the network: a head, keys, filters.
FACTOR = Role(vectors=1)
TABLE = Role(rows=1)
BIAS = Role(is_added=True)

# What modules of PyTorch itself would declare.
COMPONENT_OF = {nn.LayerNorm: "norms"}
ROLES_OF: dict[type[nn.Module], dict[str, Role]] = {
    nn.Linear: {"weight": MAP, "bias": BIAS},
    nn.Embedding: {"weight": TABLE},
    nn.Conv1d: {"weight": FACTOR, "bias": BIAS},
}


class Runs(NamedTuple):
    """How often a part runs for one position.

    reads: in generation, where each run reads its weights; products: in training, where one run
    over the bands of a packet's level is a product for each of them.
    """

    reads: int | Fraction
    products: int | Fraction

    def __mul__(self, other: "Runs") -> "Runs":  # type: ignore[override]
        return Runs(self.reads * other.reads, self.products * other.products)


ONCE = Runs(1, 1)


class Use(NamedTuple):
    """One place of a parameter, or of products without weights (`parameter` is then None)."""

    name: str
    module: nn.Module
    parameter: nn.Parameter | None
    role: Role
    component: str | None
    runs: Runs

    @property
    def n_read(self) -> int:
        """How many numbers of the parameter one position reads in each of the runs."""
        if self.role.rows is None:
            return self.parameter.numel()
        return self.role.rows * self.parameter.shape[-1]


def declared(module: Module, component: str, **roles: Role) -> Module:
    """The module with a component of its own, and other roles of its parameters."""
    module.component = component
    if roles:
        module.roles = roles
    return module


def uses(module: nn.Module) -> Iterator[Use]:
    """Every place of every parameter, in the order of the modules; of a tied one each of them."""
    for place in _places(_Place("", module, _component(module, None), ONCE, {}), {}):
        dot = f"{place.name}." if place.name else ""
        for key, parameter in place.module._parameters.items():
            if parameter is not None:
                role = place.roles.get(key, VECTOR)
                own = role.component or place.component
                yield Use(dot + key, place.module, parameter, role, own, place.runs)
        if n_products := getattr(place.module, "n_products", 0):
            role = Role(vectors=n_products)
            yield Use(place.name, place.module, None, role, place.component, place.runs)


def component_of(module: nn.Module, name: str) -> str | None:
    """The component of the part of that name."""
    component = getattr(module, "component", None)
    for key in filter(None, name.split(".")):
        module = module.get_submodule(key)
        component = _component(module, component)
    return component


def maps(module: nn.Module) -> set[nn.Parameter]:
    """The matrices of linear maps, which Muon and weight decay are for, without tied tables."""
    found, others = set(), set()
    for use in uses(module):
        if use.parameter is not None:
            (found if use.role.is_map else others).add(use.parameter)
    return found - others


def _component(module: nn.Module, inherited: str | None) -> str | None:
    of_type = next((c for kind, c in COMPONENT_OF.items() if isinstance(module, kind)), inherited)
    return getattr(module, "component", of_type)


class _Place(NamedTuple):
    """One place of a module in the tree; `roles` are those of its parameters and its parts'."""

    name: str
    module: nn.Module
    component: str | None
    runs: Runs
    roles: Mapping[str, Role]


def _places(place: _Place, declared_runs: dict[nn.Module, Runs]) -> Iterator[_Place]:
    module = place.module
    of_type = next((r for kind, r in ROLES_OF.items() if isinstance(module, kind)), {})
    roles = {**getattr(module, "roles", of_type), **place.roles}
    yield place._replace(roles=roles)
    of_parts = dict(declared_runs)
    if hasattr(module, "runs"):
        for part, times in module.runs().items():
            of_parts[part] = of_parts.get(part, ONCE) * times
    for key, part in module._modules.items():
        if part is not None:
            name = f"{place.name}.{key}" if place.name else key
            prefix = f"{key}."
            given = {k.removeprefix(prefix): r for k, r in roles.items() if k.startswith(prefix)}
            times = place.runs * of_parts.get(part, ONCE)
            component = _component(part, place.component)
            yield from _places(_Place(name, part, component, times, given), of_parts)
