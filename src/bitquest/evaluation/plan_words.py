"""A plan in words and one table, and everything that it assumes."""

from bitquest.evaluation.plan import Choice, Plan, size_text
from bitquest.evaluation.plan_hardware import Hardware
from bitquest.evaluation.report_page import Table
from bitquest.evaluation.scaling_fitted import short_count
from bitquest.evaluation.scaling_table import range_text


def plan_table(plan: Plan, *, wide: bool = True) -> Table:
    """A row per format, best first. wide: with what a narrow terminal has no room for."""
    choices = plan.choices
    columns = {
        "format": [one.format for one in choices],
        "layers × width": [f"{one.layers}×{one.width}" for one in choices],
        "N": [short_count(one.parameters) for one in choices],
        "tokens": [short_count(one.tokens) for one in choices],
        "loss": [f"{one.loss:.3f}" for one in choices],
        "95 % interval": [_interval(one) for one in choices],
        "packed": [size_text(one.packed_bytes) for one in choices],
        "with cache": [size_text(one.packed_bytes + one.cache_bytes) for one in choices],
        "ms a token": [_milliseconds(one) for one in choices],
        f"{plan.request.train_on.name} hours": [_number(one.device_hours) for one in choices],
        "dollars": ["–" if one.dollars is None else _number(one.dollars) for one in choices],
        "training memory": [size_text(one.training_state_bytes + one.training_activation_bytes) for one in choices],
        "in range": ["no" if one.beyond else "yes" for one in choices],
    }
    if not wide:
        for name in ("N", "tokens", "with cache", f"{plan.request.train_on.name} hours", "training memory"):
            del columns[name]
    note = "* A floor: bytes over bandwidth. " if not all(one.decode_measured for one in choices) else ""
    note += "In range: whether the law was fitted to such sizes and token counts."
    return Table(tuple(columns), tuple(zip(*columns.values(), strict=True)), title="Plan", note=note)


def advice(plan: Plan) -> list[str]:
    """The recommendation and what must be said loudly, a sentence or two each."""
    best, request = plan.best, plan.request
    interval = "" if best.loss_interval is None else f" ({best.loss_interval[0]:.3f} to {best.loss_interval[1]:.3f})"
    found = [
        f"Train {best.format}: {best.layers} layers of width {best.width} (hidden {best.hidden}, {best.heads} heads), "
        f"N = {short_count(best.parameters)}, on {short_count(best.tokens)} tokens. Expected loss {best.loss:.3f}"
        f"{interval} nats per token; {size_text(best.packed_bytes)} packed; {_number(best.device_hours)} "
        f"{request.train_on.name}-hours" + ("" if best.dollars is None else f", {_number(best.dollars)} dollars") + "."
    ]
    if plan.loss_is_idle:
        shown = "it rules nothing out" if request.prefer == "loss" else "the smallest model considered is shown"
        found.append(f"Every format meets a loss of {request.loss:g} at every size considered; {shown}.")
    rivals = [one for one in plan.choices[1:] if _overlap(best, one)] if request.prefer == "loss" else []
    if rivals:
        names = ", ".join(one.format for one in rivals)
        found.append(f"Not separable from it by the law (the loss lies in the other's interval): {names}.")
    if best.beyond:
        found.append(f"EXTRAPOLATED: {'; '.join(best.beyond)}. No interval shows how wrong the law is out there.")
    if not best.fits_training_device:
        found.append(
            f"Training needs {size_text(best.training_state_bytes + best.training_activation_bytes)} and one "
            f"{request.train_on.name} has {request.train_on.memory_gb:g} GB: train fewer tokens at once, recompute "
            "activations, or shard the state over several."
        )
    for name, reason in plan.impossible.items():
        found.append(f"{name} cannot: {reason}.")
    return found


def assumptions(plan: Plan) -> list[str]:
    """Everything that the numbers rest on, a sentence or two each."""
    request = plan.request
    law, source = request.law, request.law.about.get("source") or "a file"
    taken = {one.format: one.taken_as for one in plan.choices if one.taken_as != one.format}
    found = [
        f"Law: fitted to {source}; losses are in nats per token of its data and tokenizer. {range_text(law)}",
        "Its intervals hold the law's uncertainty and a run's scatter, not other data, recipes or extrapolation.",
    ]
    if not law.e_is_identifiable:
        found.append(
            f"E is not identifiable in it (0 to {law.e_range[1]:.2g} fit as well): low losses are less certain."
        )
    if taken:
        words = ", ".join(f"{name} as {other}" for name, other in taken.items())
        found.append(f"Formats that were not fitted are taken as others: {words}.")
    found += [
        f"Every model is trained on {request.rule_for_tokens}.",
        "Llamas in about the presets' proportions, with as many key-value heads as heads.",
        f"{request.vocabulary:,} words; token table and head, which N leaves out, in {request.table_bits} bits "
        "(bf16 in unquantized models), their rounding not in the loss.",
        f"Key-value cache: {request.context:,} positions of {request.cache_bits} bits, one sequence.",
        f"Training: 6 · (N + head) floating-point operations a token, {100 * request.utilization:g} % of the peak"
        + (f"; quantized steps take {request.overhead:g} times as long" if request.overhead != 1 else
           "; the share of quantization is not counted (--overhead)") + ".",
        "Training memory: 16 bytes a parameter (float32 parameters, gradients, two averages), token table and head "
        f"included, and activations of {request.tokens_at_once:,} tokens at once, nothing recomputed.",
        f"Trained on: {_machine(request.train_on, True)}, {request.devices} at once.",
        f"Run on: {_machine(request.run_on, False)}. A token reads the blocks, the head and a full cache.",
    ]  # fmt: skip
    if request.measured is not None:
        found.append(f"Measured instead of a floor, for {', '.join(request.measured.bytes_per_second)}: "
                     f"{request.measured.where}.")  # fmt: skip
    return found


def _overlap(best: Choice, other: Choice) -> bool:
    return other.loss_interval is not None and other.loss_interval[0] <= best.loss <= other.loss_interval[1]


def _machine(machine: Hardware, training: bool) -> str:
    facts = [f"{machine.memory_gb:g} GB, {machine.bandwidth_gbs:g} GB/s"]
    if training:
        facts.insert(0, f"{machine.peak_tflops:g} Tflop/s bf16")
    text = f"{machine.name} ({', '.join(facts)}; {machine.source}, {machine.date}".rstrip(", ") + ")"
    if training and machine.price_per_hour is not None:
        text += f" at {machine.price_per_hour:g} dollars an hour, an assumption ({machine.price_source})"
    return text


def _interval(one: Choice) -> str:
    return "–" if one.loss_interval is None else f"{one.loss_interval[0]:.2f} to {one.loss_interval[1]:.2f}"


def _milliseconds(one: Choice) -> str:
    return _number(one.decode_seconds * 1e3) + ("" if one.decode_measured else "*")


def _number(value: float) -> str:
    """Three digits: 0.0123, 4.56, 1,234; from a million on with a letter."""
    if value >= 1e6:
        return short_count(value)
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
