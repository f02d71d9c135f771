import pytest

pytest.importorskip("matplotlib")

from drawn import keep_figures  # noqa: E402
from rows import row_result  # noqa: E402

from engine.bench.micro.micro_plot import draw_micro  # noqa: E402
from engine.bench.micro.micro_report import build_micro_rows, plot_micro  # noqa: E402


@pytest.fixture
def figures(monkeypatch):
    return keep_figures(monkeypatch)


def curves(axes):
    """Each labelled line as ``{label: (xs, ys)}``."""
    return {
        line.get_label(): (list(line.get_xdata()), [round(y, 6) for y in line.get_ydata()])
        for line in axes.lines
        if not line.get_label().startswith("_")
    }


def dashed(axes):
    return [list(line.get_ydata()) for line in axes.lines if line.get_linestyle() == "--" and len(line.get_xdata()) > 1]


GRID = [
    row_result(mode, (ms * batch_size,) * 3, batch_size=batch_size, num_unique=unique, num_bytes=10**6 * (unique + 1))
    for batch_size in (1, 2)
    for unique in (0, 16, 32)
    for mode, ms in (("base", 8.0), ("hydragen", 2.0 if unique else 1.0))
]


def test_a_panel_for_each_batch_and_prefix_and_one_of_speedups(figures):
    assert draw_micro(build_micro_rows(GRID)).startswith(b"\x89PNG")
    first, second, speedups = [axes for axes in figures[0].axes if axes.axison]
    assert (first.get_title("left"), first.get_xlabel()) == ("batch 1, shared 1,024", "unique keys of a sequence")
    assert curves(first) == {"base": ([0, 16, 32], [8, 8, 8]), "hydragen": ([0, 16, 32], [1, 2, 2])}
    assert curves(second) == {"base": ([0, 16, 32], [16, 16, 16]), "hydragen": ([0, 16, 32], [2, 4, 4])}
    # The roofline of 10^9 FLOPs at 2 TFLOP/s, and of up to 33 x 10^6 bytes at 40 GB/s.
    assert dashed(first) == [[0.5, 0.5, pytest.approx(0.825)]] * 2
    assert curves(speedups) == {"2 × 1,024": ([0, 16, 32], [8, 4, 4]), "1 × 1,024": ([0, 16, 32], [8, 4, 4])}
    assert first.get_yscale() == speedups.get_yscale() == "log"
    assert speedups.get_title("left").startswith("hydragen: times as fast as base")


def test_another_mode_has_a_line_and_speedups_of_its_own(figures):
    draw_micro(build_micro_rows([*GRID, row_result("auto", (4.0,) * 3, batch_size=1, num_unique=16)]))
    titles = [axes.get_title("left") for axes in figures[0].axes if axes.axison]
    assert len(titles) == 4 and titles[-1].startswith("auto: ")
    assert curves(figures[0].axes[0])["auto"] == ([16], [4])


def test_against_the_shared_keys_where_the_unique_ones_do_not_vary(figures):
    results = [
        row_result(mode, (ms,) * 3, batch_size=batch_size, num_shared=shared)
        for batch_size in (1, 2)
        for shared in (16, 256)
        for mode, ms in (("base", 8.0), ("hydragen", 2.0))
    ]
    draw_micro(build_micro_rows(results))
    first, second, speedups = [axes for axes in figures[0].axes if axes.axison]
    assert (first.get_title("left"), first.get_xlabel()) == ("batch 1, unique 64", "shared keys")
    assert curves(first) == {"base": ([16, 256], [8, 8]), "hydragen": ([16, 256], [2, 2])}
    assert curves(speedups) == {"2 × 64": ([16, 256], [4, 4]), "1 × 64": ([16, 256], [4, 4])}


def test_without_a_baseline_there_are_times_alone(figures):
    draw_micro(build_micro_rows([row for row in GRID if row.row.mode == "hydragen"]))
    assert len([axes for axes in figures[0].axes if axes.axison]) == 2


def test_noisy_points_are_hollow_and_bands_do_not_flatten_the_lines(figures):
    draw_micro(build_micro_rows([row_result("base", (1, 1, 1000)), row_result("base", num_unique=128)]))
    axes = figures[0].axes[0]
    faces = [tuple(color[:3]) for color in axes.collections[-1].get_facecolors()]
    assert faces[0] == (1, 1, 1) and faces[1] != (1, 1, 1)
    assert axes.get_ylim()[1] < 10


def test_each_setting_has_its_own_panels(tmp_path, figures):
    others = [row_result(num_heads=16), row_result(backend="aten"), row_result(env={"dtype": "float32"})]
    rows = build_micro_rows([*GRID, *others])
    assert plot_micro(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert len([axes for axes in figures[0].axes if axes.axison]) == 3 + 3
    titles = [part.get_suptitle() for part in figures[0].subfigs]
    assert any("16/1 heads" in title for title in titles) and any(title.endswith(", by aten") for title in titles)
