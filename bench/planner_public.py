"""Whether the cost model holds on hardware that is not here, against public measurements.

    python bench/planner_public.py --data DIR [--output FILE]

DIR holds Vidur's profiles (Agrawal et al., 2024): Llama-2-70B's operators by tokens and
tensor-parallel degree, and NCCL's collectives by bytes and workers, on A100 and H100. At most five
points of a table calibrate, chosen by rule; `CostModel`, `unit_row` and `Link` predict the others.

Operators: the product with the most weights, on one device, at 1, 512 and 4096 tokens (memory,
arithmetic, arithmetic); the one with the fewest, on 8 devices, at 1 token (launch); the activation
on one device at 4096 tokens (element-wise). Collectives: for each of the two links, within a node
and between nodes, the largest group at 1 and at 64 MiB; for a sum between nodes also the smallest
group at 64 MiB, which has one rail.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import transformers
from public_tables import Messages, Points, read_messages, read_operators
from report import header

from partition import Bandwidths, GemmRate, Link, ModelProfile, RuntimeRates
from partition.cost import CostModel, Load, PassShape, compute_time, unit_row
from partition.profile import UnitKind

ELEMENT_BYTES = 2
TENSOR_PARALLEL = (1, 2, 4, 8)
MIB = 1 << 20
GPU_ROW_TILE = 128
NO_LINK = Link(bandwidth=1.0, latency_s=0.0)


@dataclass(frozen=True, slots=True)
class Operator:
    """What the planner prices together: the table's columns it adds up (its kernels), and the
    parameters that it uses, by the ends of their names, or its bytes per token on a rank."""

    columns: tuple[str, ...]
    parameters: tuple[str, ...] = ()
    token_bytes: Callable[[int], float] | None = None


def operators(config: transformers.LlamaConfig) -> dict[str, Operator]:
    """The table's operators. What has no parameters reads its inputs and writes its output."""
    rows = (config.num_attention_heads + config.num_key_value_heads) * config.head_dim
    pre, post = "input_layernorm", "post_attention_layernorm"
    products = {
        "attn_pre_proj": ("q_proj.weight", "k_proj.weight", "v_proj.weight"),
        "attn_post_proj": ("o_proj.weight",),
        "mlp_up_proj": ("gate_proj.weight", "up_proj.weight"),
        "mlp_down_proj": ("down_proj.weight",),
    }
    found = {name: Operator((name,), ends) for name, ends in products.items()}
    found |= {f"{name} + add": Operator((name, "add"), (f"{name}.weight",)) for name in (pre, post)}
    kernels = ("attn_rope", "mlp_act", pre, post, "add", "add", *products)
    return found | {
        "mlp_act": Operator(
            ("mlp_act",),
            token_bytes=lambda world: 5 * config.intermediate_size * ELEMENT_BYTES / world,
        ),
        "attn_rope": Operator(
            ("attn_rope",), token_bytes=lambda world: 2 * rows * ELEMENT_BYTES / world
        ),
        "emb": Operator(("emb",), token_bytes=lambda world: 2 * config.hidden_size * ELEMENT_BYTES),
        "whole layer": Operator(kernels, ("weight",)),
    }


class OperatorModel:
    """The planner's price of an operator."""

    def __init__(self, config: transformers.LlamaConfig) -> None:
        profile = ModelProfile.from_config(config, "bfloat16")
        model = CostModel(profile=profile, tensor_parallel=1, activation_bytes=ELEMENT_BYTES)
        self.profile, self.model, self.operators = profile, model, operators(config)

    def load(self, name: str, world: int) -> Load:
        """What one of ``world`` ranks holds and does; a kernel counts as a layer, for its
        latency."""
        operator, heads = self.operators[name], self.profile.heads
        sums: dict[str, float] = defaultdict(float)
        for unit in self.profile.units:
            own = tuple(p for p in unit.parameters if p.name.endswith(operator.parameters or "-"))
            if own and unit.layer is not None and unit.kind is not UnitKind.EMBEDDING:
                part = replace(unit, parameters=own)
                size = part.num_bytes(heads, 0, world)
                for key, value in unit_row(part, self.profile, 0, world, size, size).items():
                    sums[key] += value
        if operator.token_bytes is not None:
            sums["activation_bytes"] += operator.token_bytes(world)
        return Load.stack([sums | {"num_layers": len(operator.columns)}])

    def seconds(self, load: Load, tokens: int, rates: Bandwidths) -> float:
        shape = PassShape(num_tokens=tokens, num_sequences=0, context=0.0)
        terms = self.model.terms(load, shape, rates, group_link=NO_LINK, next_link=None)
        return float(compute_time(terms)[0])

    def rates(self, points: Points) -> tuple[Bandwidths, list[tuple[str, int, int]]]:
        """The device's rates from five points, and which these are."""
        used = [("mlp_up_proj", n, 1) for n in (1, 512, 4096)]
        used += [("attn_post_proj", 1, 8), ("mlp_act", 4096, 1)]
        one, _, _, small, act = used
        up, out, moved = (self.load(name, world) for name, _, world in (one, small, act))
        weights, few = float(up.dense_bytes[0]), float(out.dense_bytes[0])
        memory = (weights - few) / (points[one] - points[small])
        launch = max(0.0, points[small] - few / memory)
        elementwise = 4096 * float(moved.activation_bytes[0]) / (points[act] - launch)
        gemm = []
        for key in used[1:3]:
            beside = launch + key[1] * float(up.activation_bytes[0]) / elementwise
            flops = key[1] * float(up.flops_per_token[0])
            gemm.append(GemmRate(rows=key[1], flops_per_s=flops / (points[key] - beside)))
        rates = Bandwidths(
            device_memory=memory,
            host_to_device=memory,
            device_to_host=memory,
            disk_read=memory,
            disk_write=memory,
            gemm=tuple(gemm),
            row_tile=GPU_ROW_TILE,
            runtime=RuntimeRates(
                layer_latency_s=launch, pass_latency_s=0.0, elementwise=elementwise
            ),
        )
        return rates, used


def error_cell(errors: list[float]) -> str:
    """Median and 90th percentile of relative errors, in percent."""
    if len(errors) < 2:
        return "-"
    return f"{statistics.median(errors):.1%} / {statistics.quantiles(errors, n=10)[-1]:.1%}"


def operator_report(title: str, points: Points, model: OperatorModel) -> list[str]:
    rates, used = model.rates(points)
    tokens = sorted({key[1] for key in points})
    runtime = rates.runtime
    lines = ["| operator | " + " | ".join(f"TP {world}" for world in TENSOR_PARALLEL) + " |"]
    lines.append("|---" * (len(TENSOR_PARALLEL) + 1) + "|")
    products: list[float] = []
    elementwise: list[float] = []
    for name, operator in model.operators.items():
        cells = []
        for world in TENSOR_PARALLEL:
            load, errors = model.load(name, world), []
            for n in tokens:
                if (name, n, world) in used:
                    continue
                measured = sum(points[column, n, world] for column in operator.columns)
                errors.append(abs(model.seconds(load, n, rates) / measured - 1))
            cells.append(error_cell(errors))
            if name != "whole layer":  # it is the sum of the others
                (products if load.flops_per_token[0] else elementwise).extend(errors)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    gemm = ", ".join(f"{r.flops_per_s / 1e12:.0f} TFLOP/s at {r.rows}" for r in rates.gemm)
    calibration = "; ".join(
        f"{name}, tokens {n}, TP {world}: {points[name, n, world] * 1e3:.3f} ms"
        for name, n, world in used
    )
    return [
        f"## {title}\n",
        f"- {len(used)} points calibrate: {calibration}",
        f"- rates: memory {rates.device_memory / 1e12:.2f} TB/s, products {gemm} rows, "
        f"element-wise {(runtime.elementwise or 0) / 1e12:.2f} TB/s, launch "
        f"{runtime.layer_latency_s * 1e6:.1f} us",
        f"- {len(products + elementwise)} times predicted, error median / p90: "
        f"**{error_cell(products + elementwise)}** ({len(products)} products "
        f"{error_cell(products)}, the rest {error_cell(elementwise)})\n",
        *lines,
        "",
    ]


def nearest(sizes: list[int], aim: int) -> int:
    return min(sizes, key=lambda size: abs(size - aim))


def measured_link(small: tuple[int, float], large: tuple[int, float], world: int) -> Link:
    """The Link whose sum over ``world`` (2: or whose message) takes these seconds for these
    bytes: latency + moved bytes / bandwidth (Hockney, 1994)."""
    slope = (large[1] - small[1]) / (large[0] - small[0])
    share = 2 * (world - 1) / world  # 1 where two ranks take part
    return Link(bandwidth=share / slope, latency_s=max(0.0, small[1] - slope * small[0]))


def collective_report(title: str, times: Messages, collective: str) -> list[str]:
    groups = sorted({key[:2] for key in times})
    links: dict[bool, Link] = {}
    used: set[tuple[int, int, int]] = set()
    for within in sorted({workers == per_node for workers, per_node in groups}):
        alike = [group for group in groups if (group[0] == group[1]) == within]
        widest = max(alike)
        sizes = [key[2] for key in times if key[:2] == widest]
        ends = [nearest(sizes, aim) for aim in (MIB, 64 * MIB)]
        small, large = ((size, times[*widest, size]) for size in ends)
        links[within] = measured_link(small, large, widest[0])
        used |= {(*widest, size) for size in ends}
        if not within and collective == "all_reduce":  # one device a node: what one rail carries
            rail = (*min(alike), ends[1])
            slope = (times[rail] - links[within].latency_s) / ends[1]
            links[within] = replace(
                links[within], bandwidth=1 / slope, all_reduce_bandwidth=links[within].bandwidth
            )
            used.add(rail)
    errors: dict[tuple[int, int], list[float]] = defaultdict(list)
    for (workers, per_node, size), measured in times.items():
        if (workers, per_node, size) in used:
            continue
        link = links[workers == per_node]
        if workers != per_node and collective == "all_reduce":
            link = link.between_nodes(per_node)
        predicted = (
            link.send_s(size) if collective == "send_recv" else link.all_reduce_s(size, workers)
        )
        errors[workers, per_node].append(abs(predicted / measured - 1))
    everything = [error for group in errors.values() for error in group]
    calibration = "; ".join(
        f"{w} workers, {d} a node, {size} bytes: {times[w, d, size] * 1e3:.3f} ms"
        for w, d, size in sorted(used)
    )
    rates = "; ".join(
        f"{'within a node' if within else 'between nodes'} {link.bandwidth / 1e9:.1f} GB/s + "
        f"{link.latency_s * 1e6:.0f} us"
        for within, link in links.items()
    )
    return [
        f"## {title}\n",
        f"- {len(used)} points calibrate: {calibration}",
        f"- links: {rates}",
        f"- {len(everything)} times predicted, error median / p90: **{error_cell(everything)}**\n",
        "| workers | a node | times | error median / p90 |",
        "|---|---|---|---|",
        *(f"| {w} | {d} | {len(errors[w, d])} | {error_cell(errors[w, d])} |" for w, d in groups),
        "",
    ]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True, help="the folder of the tables")
    parser.add_argument("--output", type=Path, help="write the report to this file, too")
    options = parser.parse_args(arguments)
    model = OperatorModel(
        transformers.LlamaConfig(
            hidden_size=8192,
            intermediate_size=28672,
            num_attention_heads=64,
            num_key_value_heads=8,
            num_hidden_layers=1,
            vocab_size=32768,
        )
    )
    lines = [header("The cost model against public measurements")]
    for device in ("a100", "h100"):
        path = options.data / f"{device}_llama2_70b_mlp.csv"
        title = f"{device.upper()}, operators of Llama-2-70B"
        lines += operator_report(title, read_operators(path), model)
        for collective in ("all_reduce", "send_recv"):
            path = options.data / f"{device}_dgx_{collective}.csv"
            times = read_messages(path, collective)
            lines += collective_report(f"{device.upper()}, {collective}", times, collective)
    report = "\n".join(lines)
    print(report)
    if options.output:
        options.output.write_text(report, encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
