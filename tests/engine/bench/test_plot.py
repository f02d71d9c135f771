import struct

import pytest

pytest.importorskip("matplotlib")

from drawn import keep_figures  # noqa: E402
from sweeps import result  # noqa: E402

from engine.bench import plot as plot_module  # noqa: E402
from engine.bench.plot import Comparison, draw  # noqa: E402
from engine.bench.report import build_rows, plot  # noqa: E402
from engine.bench.results import Status  # noqa: E402


@pytest.fixture
def figures(monkeypatch):
    return keep_figures(monkeypatch)


def bold(axes):
    """Each mode's line as ``{colour: (xs, ys)}``, the faint ones left out."""
    lines = [line for line in axes.lines if line.get_alpha() is None]
    assert len({line.get_color() for line in lines}) == len(lines), "a mode has two lines"
    return {line.get_color(): (list(line.get_xdata()), [round(y) for y in line.get_ydata()]) for line in lines}


def texts(axes):
    return {text.get_text(): text for text in axes.texts}


GRID = [
    result("hydragen", 10 * batch_size - num_shared / 100, batch_size, num_shared)
    for batch_size in (32, 64, 128)
    for num_shared in (1024, 4096)
] + [result("noattention", 12 * batch_size, batch_size, 1024) for batch_size in (32, 64, 128)]


def test_throughput_against_batch_and_against_prefix(figures):
    data = draw([Comparison("a title", "results/a", GRID)])
    assert data.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", data[16:24])
    assert width > 1000
    assert height > 400

    left, right = figures[0].axes
    blue, grey = plot_module._COLORS["hydragen"], plot_module._COLORS["noattention"]
    assert (left.get_xlabel(), left.get_title("left")) == ("batch size (sequences)", "at shared prefix 4,096")
    assert (right.get_xlabel(), right.get_title("left")) == ("shared prefix (tokens)", "at batch size 128")
    assert bold(left)[blue] == ([32, 64, 128], [279, 599, 1239])
    assert bold(right)[blue] == ([1024, 4096], [1270, 1239])
    # The ceiling, run at one shared length, stands for all of them.
    assert bold(left)[grey] == ([32, 64, 128], [384, 768, 1536])
    assert bold(right)[grey][1] == [1536, 1536]
    for axes in (left, right):
        assert axes.get_xscale() == axes.get_yscale() == "log"
        assert set(texts(axes)) == {"hydragen", "noattention\n(ceiling)"}


def test_a_panel_shows_where_the_most_modes_have_a_line(figures):
    """The baseline ran at the smallest batch only, as one that runs out of memory does."""
    baseline = [result("hydragen_noshared", 100, 32, 1024), result("hydragen_noshared", 50, 32, 4096)]
    draw([Comparison("", "", GRID + baseline)])
    _, right = figures[0].axes
    assert right.get_title("left") == "at batch size 32"
    assert "hydragen_noshared" in texts(right)


def test_a_mode_without_the_shown_value_says_which_it_has(figures):
    draw([Comparison("", "", [*GRID, result("vllm", 100, 48, 512)])])
    left, right = figures[0].axes
    assert "vllm\n(at shared prefix 512)" in texts(left)
    assert "vllm\n(at batch size 48)" in texts(right)


def test_labels_do_not_touch(figures):
    modes = ("hydragen", "hydragen_noshared", "hf", "vllm", "custom", "noattention")
    draw([Comparison("", "", [result(mode, 1000 + i) for i, mode in enumerate(modes)])])
    left, _ = figures[0].axes
    boxes = sorted((text.get_window_extent() for text in left.texts), key=lambda box: box.y0)
    assert len(boxes) == len(modes)
    assert all(below.y1 <= above.y0 + 1 for below, above in zip(boxes, boxes[1:], strict=False))


def test_a_prefix_of_no_tokens_is_shown(figures):
    draw([Comparison("", "", [result("hydragen", 100, num_shared=n) for n in (0, 64, 128)])])
    _, right = figures[0].axes
    assert right.get_xscale() == "symlog"
    assert [text.get_text() for text in right.get_xticklabels()] == ["0", "64", "128"]


def test_noisy_points_are_hollow(figures):
    draw([Comparison("", "", [result("hydragen", 100), result("hydragen", 150, batch_size=64, noise=0.5)])])
    left, _ = figures[0].axes
    faces = [tuple(color[:3]) for color in left.collections[0].get_facecolors()]
    assert faces[0] != (1, 1, 1)
    assert faces[1] == (1, 1, 1)


def test_each_unique_length_has_its_own_panels(tmp_path, figures):
    results = [
        result("hydragen"),
        result("hydragen", num_unique=3),
        result("hydragen", num_unique=1),  # has no throughput
        result("hf", status=Status.DOES_NOT_FIT),
    ]
    path = tmp_path / "report.png"
    plot(build_rows(results), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert len(figures[0].axes) == 4


def test_nothing_to_draw(figures):
    assert draw([Comparison("", "", [result("hf", status=Status.DOES_NOT_FIT)])]).startswith(b"\x89PNG")
    assert figures[0].texts[0].get_text() == "no cell has a decode throughput"
