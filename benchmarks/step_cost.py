"""What a compiled training step launches and moves on a CUDA GPU, counted on a machine without one.

    python benchmarks/step_cost.py --configs tiny,lifting
    python benchmarks/step_cost.py --configs headline --largest 20 --json headline.json
    python benchmarks/step_cost.py --configs headline,mini --decode
    python benchmarks/step_cost.py --configs tiny --check benchmarks/results/step_cost.json

torch.compile writes the code of a step in bfloat16 for a device that is not there (`fake_cuda.py`);
its kernels are counted and nothing runs. Counts, not times:

- kernels: nodes of the compiler's schedule, each a launch, forward and backward;
- in products, outside: bytes that they read and write, in the library's kernels (matrix products
  above all) and in those that the compiler writes, of slices and looked-up rows those alone;
- kept: bytes that the backward pass reads and the forward pass has made;
- optimizer: bytes a parameter of clipping and the update, operation by operation.

With `--decode` it is the compiled step that reads one token of one text, in bfloat16.

A config is one of the table's names or a file. The headline takes two minutes of a CPU, `tiny` half
of one. `--largest N` lists the kernels outside of products that move the most. `--check` fails
where kernels or bytes are a tenth above those of a file that was stored before.
"""

from __future__ import annotations

if __name__ == "__main__":
    from wavelet_lm.environment import start

    start()  # before the imports below, which take seconds

if __name__ == "__main__":
    from fake_cuda import pretend

    from wavelet_lm.errors import run_command

    run_command(pretend)  # before PyTorch asks for devices

import math
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from report import check_targets, natural, table, write_results
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from wavelet_lm.cli.flags import OneLineParser
from wavelet_lm.compiler import MERGED_KERNELS, first_that_compiles, training_options
from wavelet_lm.config import Config, read_json_object
from wavelet_lm.errors import UserError, run_command
from wavelet_lm.fusion.fuse import fuse
from wavelet_lm.inference.decoder import REDUCTIONS, StaticSession
from wavelet_lm.models.registry import model_without_weights, n_params
from wavelet_lm.training.optimizers import Optimizer
from wavelet_lm.training.precision import Precision
from wavelet_lm.training.weights import Weights
from wavelet_lm.training.working_weights import WorkingWeights

ROOT = Path(__file__).resolve().parents[1]
GROWTH = 1.1  # that a change may bring unseen
COUNTED = ("kernels", "in_products", "outside", "kept", "optimizer")
# Kernels of the project's own, which the compiler calls as it does products.
OWN_PASSES = ("wavelet_lm::scale_norm_backward",)

# Name: file, vocabulary, keys that differ.
CONFIGS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "headline": ("config.json", 50257, {}),
    "mini": ("configs/mini.json", 50257, {}),
    "quickstart": ("configs/quickstart.json", 256, {}),
    # The quick start of before: two-layer nets on six levels, product keys.
    "lifting": (
        "configs/quickstart.json",
        256,
        {
            "levels": 6,
            "block_size": 128,
            "micro_batch_size": 8,
            "lifting_linear_only": False,
            "wavelet_crawl": True,
            "mixer_transform": "fwht",
            "per_scale_mixer_widths": (1, 1, 1, 0.5, 0.5, 0.5, 0.5),
            "delta_memory": False,
            "pkm_enabled": True,
            "pkm_num_keys": 1024,
            "pkm_top_k": 8,
        },
    ),
    # The headline's parts, as small as they come.
    "tiny": (
        "config.json",
        250,
        {
            "C": 32,
            "layers": 1,
            "levels": 2,
            "block_size": 32,
            "mlp_expansion": 2,
            "per_scale_mixer_widths": (1, 0.5, 0.5),
            "pkm_num_keys": 64,
            "pkm_top_k": 4,
            "fwpkm_enabled": False,
        },
    ),
}


def config_of(name: str) -> tuple[Config, int]:
    """A config of the table or of a file, in bfloat16 on CUDA, and its vocabulary."""
    file, vocab_size, keys = CONFIGS.get(name, (name, 50257, {}))
    path = ROOT / file if name in CONFIGS else Path(file)
    if name not in CONFIGS and not path.is_file():
        raise UserError(
            f"{name or 'an empty name'} is neither a file nor one of {', '.join(CONFIGS)}"
        )
    keys = {**read_json_object(str(path)), **keys, "device": "cuda", "amp_dtype": "bf16"}
    return Config.from_dict(keys, source=name), vocab_size


def count(config: Config, vocab_size: int) -> dict[str, Any]:
    """The figures of one step of a config."""
    device = torch.device("cuda", 0)
    with FakeTensorMode(allow_non_fake_inputs=True), captured() as graphs:
        model = without_storage(model_without_weights(config, vocab_size), device)
        B, T = config.micro_batch_size, config.block_size
        idx = torch.zeros(B, T, dtype=torch.int64, device=device)
        precision = Precision(config, device)
        working = WorkingWeights(model, precision.dtype)
        torch._dynamo.reset()

        def run(options: dict[str, Any]) -> None:
            compiled = torch.compile(model.loss, fullgraph=True, options=options)
            with suppress(Ready), precision.autocast(), working.in_place():
                compiled(idx, idx, model.first_window(B, device))

        first_that_compiles(run, training_options(), lambda line: print(line, file=sys.stderr))
        optimizer = optimizer_bytes(model, config, precision, working)
    n = n_params(model)
    forward, backward = graphs[False], graphs[True]
    row = {"parameters": n, "tokens": B * T}
    for key in ("kernels", "in_products", "outside"):
        row[key] = [forward[key], backward[key]]
    row |= {"kept": backward["kept"], "optimizer": round(optimizer / n, 1)}
    return {**row, "largest": forward["largest"] + backward["largest"]}


def count_decoding(config: Config, vocab_size: int) -> dict[str, Any]:
    """The figures of the step that decodes one token of one text, as `Decoder` compiles it."""
    device = torch.device("cuda", 0)
    fused = fuse(model_without_weights(config, vocab_size).eval(), torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True), captured() as graphs, torch.no_grad():
        model = without_storage(fused, device)
        token = torch.zeros(1, 1, dtype=torch.int64, device=device)
        decoder = SimpleNamespace(model=model, longest=None, adapts=False)
        session = StaticSession(decoder, model(token, None)[1], max_step=1)
        torch._dynamo.reset()
        try:
            options = {**REDUCTIONS, **MERGED_KERNELS}
            step = torch.compile(session.decode, fullgraph=True, dynamic=False, options=options)
            step(token)
        except Ready:
            pass
    step = graphs[False]
    row = {"parameters": n_params(model), "tokens": 1, "kept": 0, "optimizer": 0.0}
    row |= {key: [step[key]] for key in ("kernels", "in_products", "outside")}
    return {**row, "largest": step["largest"]}


def optimizer_bytes(
    model: nn.Module, config: Config, precision: Precision, working: WorkingWeights
) -> int:
    """Bytes that clipping and the update of a model of fake tensors read and write."""
    from wavelet_lm.kernels import multi_tensor

    def backward() -> None:
        with working.in_place():
            for p in model.parameters():
                p.grad = torch.empty_like(p) if p.requires_grad else None

    traffic = Traffic()

    def one_pass(launcher: Any, kernel: Any, kind: Any, rows: list, *_: Any, **__: Any) -> None:
        """A step's kernel: gradients are read, copies written, weights and states both."""
        for weight, gradient, copy, *states in rows:
            traffic.n_bytes += _bytes([weight, gradient, *states])
            traffic.n_bytes += _bytes([weight, copy, *states])

    original, multi_tensor.Launcher.launch = multi_tensor.Launcher.launch, one_pass
    try:
        optimizer = Optimizer(model, config, copies=working.copies)
        for _ in range(2):  # the first one makes the state
            optimizer.zero_grad()
            backward()
            traffic.n_bytes = 0
            with traffic:
                working.gather(in_float32=config.grad_accum > 1)
                precision.update(optimizer, Weights(model), config.grad_clip)
    finally:
        multi_tensor.Launcher.launch = original
    return traffic.n_bytes


def without_storage(model: nn.Module, device: torch.device) -> nn.Module:
    """A model of fake tensors on the device in place of its tensors on the meta device."""
    memo: dict[Tensor, Tensor] = {}

    def fake(x: Tensor) -> Tensor:
        if x not in memo:
            new = torch.empty_like(x, device=device)
            is_parameter = isinstance(x, nn.Parameter)
            memo[x] = nn.Parameter(new, x.requires_grad) if is_parameter else new
        return memo[x]

    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: fake(x) for name, x in tensors.items() if x is not None})
    return model


class Ready(Exception):
    """Both graphs are compiled, and the forward one is about to run."""


@contextmanager
def captured() -> Iterator[dict[bool, dict[str, Any]]]:
    """What the compiler's graphs cost, by whether they are backward ones, in place of running."""
    from torch._inductor.graph import GraphLowering

    graphs: dict[bool, dict[str, Any]] = {}

    def run(*_: Any) -> None:
        raise Ready

    def written(graph: GraphLowering) -> SimpleNamespace:
        graph.codegen()
        graphs[graph.is_backward] = graph_cost(graph)
        return SimpleNamespace(call=run, __file__=None)

    original = GraphLowering.compile_to_module
    GraphLowering.compile_to_module = written
    try:
        with torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
            yield graphs
    finally:
        GraphLowering.compile_to_module = original


def graph_cost(graph: Any) -> dict[str, Any]:
    """Kernels and bytes of a graph that has been scheduled."""
    nodes = [node for node in graph.scheduler.nodes if is_kernel(node)]
    kernels = [(is_product(node), moved(node), described(node)) for node in nodes]
    inputs = zip(graph.graph_input_names, graph.example_inputs, strict=True)
    return {
        "kernels": len(kernels),
        "in_products": sum(n for product, n, _ in kernels if product),
        "outside": sum(n for product, n, _ in kernels if not product),
        "largest": [(n, what) for product, n, what in kernels if not product],
        "kept": sum(
            x.numel() * x.element_size()
            for name, x in inputs
            if isinstance(x, Tensor) and not name.startswith(("primals", "tangents"))
        ),
    }


def is_kernel(node: Any) -> bool:
    """Whether a node of the schedule is a launch: not one of several results, not a view."""
    from torch._inductor.ir import MultiOutput
    from torch._inductor.scheduler import NopKernelSchedulerNode

    is_result = isinstance(getattr(node, "node", None), MultiOutput)
    return not (is_result or isinstance(node, NopKernelSchedulerNode))


def is_product(node: Any) -> bool:
    """Whether a node of the schedule is a library's, and none of the project's own passes."""
    return node.is_extern() and own_pass(node) is None


def own_pass(node: Any) -> Any:
    """The call of a pass of the project's own in a node of the schedule, None where it has none."""
    overload = getattr(node.node, "op_overload", None)
    return node.node if overload is not None and overload.name() in OWN_PASSES else None


def moved(node: Any) -> int:
    """Bytes that a kernel reads and writes: of slices and of rows that are looked up, those alone.

    PyTorch's own count, which a library's kernel has here, takes the whole buffer where several
    operations are fused.
    """
    from torch._inductor.scheduler import ForeachKernelSchedulerNode

    if isinstance(node, ForeachKernelSchedulerNode):  # several kernels in one launch
        return sum(map(moved, node.snodes))
    if call := own_pass(node):
        return sum(
            _size(buffer.get_name(), sys.maxsize) for buffer in (*call.inputs, *call.outputs)
        )
    if node.is_extern():
        return node.get_read_write_buffers_sizes()
    inner = node.get_nodes()

    def leaves(buffer: str) -> bool:
        """Whether anything else reads it."""
        users = node.scheduler.name_to_buf[buffer].users
        return any(user.node not in inner for user in users)

    touched: dict[str, dict[Any, int]] = {}
    made = {buffer.get_name() for part in inner for buffer in part.get_outputs()}
    for part in inner:
        for dep in (*part.read_writes.reads, *part.read_writes.writes):
            if dep.name not in made or leaves(dep.name):
                touched.setdefault(dep.name, {})[dep] = numbers(dep)
    return sum(_size(buffer, sum(deps.values())) for buffer, deps in touched.items())


def numbers(dep: Any) -> int:
    """How many of a buffer's numbers a dependency reads or writes."""
    from torch._inductor.dependencies import MemoryDep

    if not isinstance(dep, MemoryDep):  # an order of kernels, by which nothing is read
        return 0
    used = dep.index.free_symbols
    pairs = zip(dep.var_names, dep.size, strict=True)
    return math.prod(int(size) for var, size in pairs if dep.is_indirect() or var in used)


def _size(buffer: str, most: int) -> int:
    """Bytes of a buffer, or of as many of its numbers."""
    from torch._inductor.virtualized import V

    numel, dtype = int(V.graph.get_numel(buffer)), V.graph.get_dtype(buffer)
    return min(numel, most) * dtype.itemsize


def described(node: Any) -> str:
    """What a kernel makes, as dtype and shape, and of which operations of the graph."""
    made = [
        f"{str(b.node.get_dtype()).removeprefix('torch.')} {[*map(int, b.node.get_size())]}"
        for b in node.get_outputs()
        if b.node.has_tensor_output()
    ]
    origins = {origin.name for part in node.get_nodes() for origin in part.node.get_origins()}
    return f"{', '.join(dict.fromkeys(made))} of {' '.join(sorted(origins))}"


class Traffic(TorchDispatchMode):
    """Counts the bytes that every operation reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.n_bytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.is_view or func.namespace == "prim":  # which move nothing
            return result
        written = tree_leaves(result)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += tree_leaves(value)
        copies = func._schema.name in ("aten::copy_", "aten::_foreach_copy_")
        read = tree_leaves((args[1:] if copies else args, kwargs))
        self.n_bytes += _bytes(read) + _bytes(written)
        return result


def _bytes(values: list[Any]) -> int:
    tensors = {id(x): x for x in values if isinstance(x, Tensor)}
    return sum(x.numel() * x.element_size() for x in tensors.values())


# --- what is stored ------------------------------------------------------------------------------


def grown(row: dict[str, Any], stored: dict[str, Any]) -> list[str]:
    """What of a row is more than `GROWTH` times that of the stored one, in words."""
    found = []
    for key in COUNTED:
        now, before = (sum(tree_leaves(r[key])) for r in (row, stored))
        if now > GROWTH * before:
            found.append(f"{key} grew from {before:,} to {now:,}")
    return found


def is_row(row: object) -> bool:
    """Whether it has a name and all that is counted."""
    return isinstance(row, dict) and row.keys() >= {"config", *COUNTED}


def stored_rows(file: str, names: Collection[str]) -> dict[str, dict[str, Any]]:
    """The rows of a file by their configs; `UserError` where one of `names` is not there."""
    rows = read_json_object(file).get("rows")
    if not (isinstance(rows, list) and all(map(is_row, rows))):
        raise UserError(f"{file} has no rows of this benchmark; write it anew with --json")
    stored = {row["config"]: row for row in rows}
    for name in names:
        if name not in stored:
            raise UserError(
                f"{file} has no row for {name}; give --configs some of {','.join(stored)}"
            )
    return stored


def check(rows: list[dict[str, Any]], stored: dict[str, dict[str, Any]], file: str) -> None:
    """Raise `UserError` where a row has grown beyond that of the file."""
    for row in rows:
        name = row["config"]
        found = grown(row, stored[name])
        if found:
            raise UserError(
                f"a step of {name} costs more than {file} says: {'; '.join(found)}; where that is"
                f" meant, store it with --json {file}"
            )


def main() -> None:
    parser = OneLineParser(description=__doc__.splitlines()[0])
    parser.add_argument("--configs", default=",".join(CONFIGS), metavar="LIST")
    parser.add_argument("--decode", action="store_true", help="count the decoding of one token")
    parser.add_argument(
        "--largest", type=natural, default=0, metavar="N", help="list N kernels [0]"
    )
    parser.add_argument("--check", metavar="FILE", help="compare with what is stored there")
    parser.add_argument("--json", metavar="FILE", help="write the results there")
    args = parser.parse_args()
    check_targets([args.json])
    configs = {name: config_of(name) for name in args.configs.split(",")}
    counted = count_decoding if args.decode else count
    if args.decode:
        configs = {f"{name}, decoding": config for name, config in configs.items()}
    stored = stored_rows(args.check, configs) if args.check else {}  # before minutes of counting
    rows = []
    for name, (config, vocab_size) in configs.items():
        row = {"config": name, "vocab_size": vocab_size, **counted(config, vocab_size)}
        largest = sorted(row.pop("largest"), reverse=True)[: args.largest]
        for n, what in largest:
            print(f"{name}: {n / 1e6:,.1f} MB, {what}")
        rows.append(row)
    print(as_table(rows))
    if args.json:
        write_results(args.json, rows)
    if args.check:
        check(rows, stored, args.check)


def as_table(rows: list[dict[str, Any]]) -> str:
    head = ["config", "kernels", "in products MB", "outside MB", "kept MB", "optimizer B/parameter"]

    def megabytes(*values: int) -> str:
        return " + ".join(f"{value / 1e6:,.1f}" for value in values)

    cells = [
        [
            row["config"],
            " + ".join(f"{n:,}" for n in row["kernels"]),
            megabytes(*row["in_products"]),
            megabytes(*row["outside"]),
            megabytes(row["kept"]),
            row["optimizer"],
        ]
        for row in rows
    ]
    return table(head, cells)


if __name__ == "__main__":
    run_command(main)
