"""Draws sparse attention and its index beside dense attention: time against the number of keys, on log axes."""

from collections.abc import Sequence
from itertools import groupby

from matplotlib.axes import Axes

from engine.bench.method_lines import method_styles, style_times
from engine.bench.micro.micro_ratio import setting_of
from engine.bench.micro.micro_results import PrefillPart, RowResult
from engine.bench.png import new_figure, to_png
from engine.bench.timing import summarize


def draw_sparse(results: Sequence[RowResult]) -> bytes:
    """The plot as a PNG: two panels, attention and index, for each setting, batch size, number of new tokens behind
    cached ones, heads and backend. All ``results`` have times."""
    groups = [list(group) for _, group in groupby(sorted(results, key=_group_key), key=_group_key)]
    figure = new_figure(13, 4.6 * len(groups))
    for (attention, index), group in zip(figure.subplots(len(groups), 2, squeeze=False), groups, strict=True):
        _draw(attention, group, PrefillPart.ATTENTION)
        _draw(index, group, PrefillPart.INDEX)
    return to_png(figure)


def _group_key(result: RowResult) -> tuple[object, ...]:
    """Prompts without cached tokens are one line; those behind cached ones one for each number of new tokens."""
    row = result.row
    num_new = row.unique_seq_len if row.num_shared else 0
    return (*setting_of(result), row.num_heads, row.num_kv_heads, row.head_dim, row.backend, row.batch_size, num_new)


def _num_keys(result: RowResult) -> int:
    return result.row.num_shared + result.row.unique_seq_len


def _draw(axes: Axes, group: Sequence[RowResult], part: PrefillPart) -> None:
    """Median and, shaded, the 20th to the 80th percentile; dashed, what the machine could do at most."""
    drawn = [result for result in group if result.row.operation == part]
    row, (_, device_name, dtype) = group[0].row, setting_of(group[0])
    behind = f", {row.unique_seq_len:,} new tokens behind cached ones" if row.num_shared else ""
    what = "attention" if part is PrefillPart.ATTENTION else "making the index"
    title = f"One layer, {what}: batch {row.batch_size}{behind}, {row.heads} heads of {row.head_dim}"
    axes.set_title(f"{title}\n{dtype} on {device_name}", fontsize=9, loc="left")
    if not drawn:
        axes.set_axis_off()
        return
    for method, (color, dashes) in method_styles(result.row.method for result in group).items():
        line = sorted((r for r in drawn if r.row.method == method), key=_num_keys)
        if not line:
            continue
        xs, times = list(map(_num_keys, line)), [summarize(result.times_ms) for result in line]
        axes.plot(xs, [one.median for one in times], dashes, color=color, marker="o", ms=3.5, label=method)
        axes.fill_between(xs, [o.p20 for o in times], [o.p80 for o in times], color=color, alpha=0.18, linewidth=0)
    style_times(axes, sorted(set(map(_num_keys, group))), "keys of a sequence", "time (ms)")
