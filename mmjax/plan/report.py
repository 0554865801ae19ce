"""A plan as people read it: aligned text."""

from collections import Counter
from collections.abc import Mapping, Sequence

from mmjax.chips import GIB
from mmjax.plan.hlo import Part
from mmjax.plan.plan import Plan
from mmjax.plan.search import Trial

DEPTH = 3  # named scopes that the table by part tells apart
SMALL = 0.01  # parts with less of the cycles than this share one line


def format_plan(plan: Plan, title: str, price_per_chip_hour: float | None = None) -> str:
    """The whole plan; `title` says what is planned, the price in any currency."""
    sections = [_heading(plan, title), _parameters(plan), _memory(plan)]
    if plan.readings:
        sections += [_collectives(plan), _cycles(plan), _pace(plan, price_per_chip_hour)]
    return "\n\n".join([*sections, _verdict(plan)])


def format_trials(trials: Sequence[Trial]) -> str:
    """What was tried to make a step fit, and what did."""
    rows = []
    for trial in trials:
        if trial.plan is None:
            rows.append([" ".join(trial.overrides), "", "", "no run"])
            continue
        cycles, needed = trial.plan["cycles"]["estimate"], trial.plan["hbm_bytes"]["peak"]
        estimate = "" if cycles is None else f"{cycles / 1e6:,.0f}"
        verdict = "fits" if trial.fits else "does not fit"
        rows.append([" ".join(trial.overrides), _gib(needed), estimate, verdict])
    helpful = [" ".join(trial.overrides) for trial in trials if trial.fits]
    return "\n".join(
        [
            _table(["Tried by compiling", "GiB", "estimate, M", ""], rows),
            *(f"Fits with {change}" for change in helpful),
            *([] if helpful else ["None of it is enough: take more chips, or a smaller model."]),
        ]
    )


def _heading(plan: Plan, title: str) -> str:
    config, topology = plan.step.config, plan.step.topology
    mesh = " × ".join(f"{axis} {size}" for axis, size in plan.step.mesh.items())
    per_chip = config.batch_size / topology.chips
    return (
        f"{title} on {topology.name}\n"
        f"{topology.chips:,} chips, {len(topology.devices):,} devices, mesh {mesh}; "
        f"{config.batch_size:,} samples a step, {per_chip:,.4g} a chip.\n"
        f"The word of a compiler ({topology.compiler}), not a measurement; docs/plan.md says how "
        "to read it."
    )


def _parameters(plan: Plan) -> str:
    parts = plan.step.parameters
    rows = [[name, f"{size:,}"] for name, size in parts.items()]
    return _table(["Parameters", ""], [*rows, ["all", f"{sum(parts.values()):,}"]])


def _memory(plan: Plan) -> str:
    state, memory = plan.step.state_bytes, plan.step.memory
    sizes = {f"state: {name}": size for name, size in state.items()}
    if memory.arguments is not None and memory.temporary is not None:
        sizes["batch, and what layouts add"] = memory.arguments - sum(state.values())
        sizes["activations, and casts of weights"] = plan.activations
        sizes["temporary: gradients, work"] = memory.temporary - plan.activations
    sizes |= {"needed": memory.peak, "there is": memory.limit}
    return _table(["HBM of a chip", "GiB"], [[name, _gib(size)] for name, size in sizes.items()])


def _collectives(plan: Plan) -> str:
    runs = plan.readings["estimate"].collective_runs
    one_way = plan.step.topology.chip.ici_bandwidth / 2
    rows = [
        [kind, f"{runs[kind]:,}", f"{size / 1e6:,.1f}", f"{size / one_way * 1e3:.2f}"]
        for kind, size in plan.collective_bytes.items()
    ]
    header = ["Collectives of a chip and step", "runs", "MB", "ms at the links' full rate"]
    return _table(header, rows or [["none", "", "", ""]])


def _cycles(plan: Plan) -> str:
    """Both readings by part of the model, the dearest first."""
    columns = {name: _by_depth(totals.cycles) for name, totals in plan.readings.items()}
    sums = {name: column.total() for name, column in columns.items()}

    def cells(values: Mapping[str, float]) -> list[str]:
        return [
            cell
            for name in columns
            for cell in (f"{values[name] / 1e6:,.2f}", f"{values[name] / max(sums[name], 1):.1%}")
        ]

    rows, rest = [], Counter[str]()
    for part, _ in columns["estimate"].most_common():
        values = {name: column[part] for name, column in columns.items()}
        if part and any(values[name] >= SMALL * sums[name] for name in columns):
            rows.append([" / ".join(part), *cells(values)])
        else:
            rest.update(values)
    rows += [["everything else", *cells(rest)], ["all", *cells(sums)]]
    header = [title for name in columns for title in (f"{name}, M", "share")]
    notes = []
    if plan.floor is not None and (counted := plan.floor.kernel_cycles):
        named = ", ".join(f"{name} {cycles / 1e6:,.2f} M" for name, cycles in counted.items())
        notes.append(f"Of these, in custom kernels, by their schedules: {named}.")
    if kernels := plan.uncounted_kernels:
        named = ", ".join(f"{name} ({runs} runs)" for name, runs in kernels.items())
        notes.append(f"Custom kernels have no estimate and are not counted: {named}.")
    if loops := plan.readings["estimate"].unread_loops:
        notes.append(f"Loops of unknown length, counted once: {', '.join(sorted(loops))}.")
    return "\n".join([_table(["Cycles of a step", *header], rows), *notes])


def _pace(plan: Plan, price: float | None) -> str:
    """What the cycles mean: speed, hours and money."""
    config, chips = plan.step.config, plan.step.topology.chips
    columns = {}
    for name, totals in plan.readings.items():
        seconds = plan.seconds(totals)
        chip_hours = config.total_steps * seconds / 3600 * chips
        columns[name] = {
            "seconds a step": f"{seconds:.4g}",
            "MFU": f"{plan.mfu(totals):.1%}",
            "samples/s": f"{config.batch_size / seconds:,.0f}",
            f"hours of {config.total_steps:,} steps": f"{chip_hours / chips:,.1f}",
            "chip-hours": f"{chip_hours:,.0f}",
        }
        if price is not None:
            columns[name][f"price at {price:g} a chip-hour"] = f"{chip_hours * price:,.0f}"
    titles = columns["estimate"]
    flops = ["model TFLOPs a step", *(f"{plan.step.flops / 1e12:,.4g}" for _ in columns)]
    rows = [[title, *(column[title] for column in columns.values())] for title in titles]
    note = (
        "A bracket: the floor knows no stall, and the estimate is several times too high in places."
        if plan.floor is not None
        else "The estimate is several times too high in places; --schedules adds a floor under it."
    )
    return _table(["If nothing waited", *columns], [flops, *rows]) + "\n" + note


def _verdict(plan: Plan) -> str:
    memory = plan.step.memory
    if plan.fits:
        return f"Fits: {1 - memory.peak / memory.limit:.0%} of the HBM is left."
    return (
        f"Does not fit: a chip needs {_gib(memory.peak)} GiB and has {_gib(memory.limit)}. "
        "--search compiles what may help."
    )


def _by_depth(cycles: Mapping[Part, int]) -> Counter[Part]:
    found = Counter[Part]()
    for part, value in cycles.items():
        found[part[:DEPTH]] += value
    return found


def _gib(size: float) -> str:
    return f"{size / GIB:,.2f}"


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns by name: the first to the left, numbers to the right."""
    lines = [header, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(header))]
    formatted = [
        "  ".join([line[0].ljust(widths[0]), *map(str.rjust, line[1:], widths[1:])]).rstrip()
        for line in lines
    ]
    formatted.insert(1, "-" * max(map(len, formatted)))
    return "\n".join(formatted)
