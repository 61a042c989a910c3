"""Pictures: what people write is drawn as it stands, and a person can read which line is which and what it is worth."""

import pytest
import torch

from pplug_hf.evaluation import plots

pytest.importorskip("matplotlib")

ROWS = [f"row-{i}" for i in range(12)] + ["b:last-4", "a:last-8", "a:last-2", "a", "b"]


@pytest.fixture
def drawn(monkeypatch):
    made = []
    figure = plots._figure
    monkeypatch.setattr(plots, "_figure", lambda *a, **k: made.append(figure(*a, **k)) or made[-1])
    return made


def results(reference="a"):
    rows = [{"row": row, "mae": i / 10, "interval": [i / 20, i / 5]} for i, row in enumerate(ROWS)]
    bins = [{"from": low, "to": low + low // 2, "rows": {row: low for row in ROWS}} for low in (1, 2, 4)]
    return {"rows": rows, "by_history_length": bins, "reference": reference}


def test_texts_with_dollars_and_without_spaces_are_drawn_as_they_stand(tmp_path, drawn):
    texts = [r"from $5 to $\frac{6", "a" * 80, "\uac00" * 80, "two\nlines", "short"]
    made = plots.plot_weights(torch.arange(5, 0, -1) / 15, texts, title=r"what costs $\x $? " * 100)
    made.savefig(tmp_path / "w.png")
    ((figure, axes),) = drawn
    labels = [label.get_text() for label in axes.get_yticklabels()]
    assert labels == [texts[0], "a" * 68 + " …", "\uac00" * 33 + " …", "two lines", "short"]
    assert all(0 <= edge <= 1 for edge in axes.get_position().extents)
    assert axes.get_position().height > 0.3  # a long title leaves room
    assert made is figure and (tmp_path / "w.png").stat().st_size > 1000
    assert figure._suptitle.get_text().startswith(r"what costs $\x $?")


def test_the_names_of_many_rows_stand_beside_their_lines(tmp_path, drawn):
    plots.plot_history_length(results(), "mae").savefig(tmp_path / "h.png")
    ((figure, (left, right)),) = drawn
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ROWS
    assert not any(legend.get_window_extent().overlaps(axes.get_window_extent()) for axes in (left, right))
    looks = {(line.get_color(), line.get_linestyle(), line.get_linewidth()) for line in left.lines}
    assert len(looks) == len(ROWS)
    assert max(left.lines, key=lambda line: line.get_linewidth()).get_label() == "a"
    assert [label.get_text() for label in left.get_xticklabels()] == ["1", "2 to 3", "4 to 6"]
    assert "less is better" in left.get_ylabel()


def test_newest_items_are_in_order_whatever_the_order_of_the_rows(tmp_path, drawn):
    plots.plot_history_length(results(), "mae").savefig(tmp_path / "h.png")
    right = drawn[0][1][1]
    ticks = [label.get_text() for label in right.get_xticklabels()]
    assert ticks == ["2", "4", "8", "all"]
    points = {
        line.get_label(): [(ticks[int(x)], float(y)) for x, y in zip(*line.get_data(), strict=True)]
        for line in right.lines
    }
    assert points == {"b": [("4", 1.2), ("all", 1.6)], "a": [("2", 1.4), ("8", 1.3), ("all", 1.5)]}


def test_without_rows_of_the_newest_items_there_is_one_panel(tmp_path, drawn):
    found = results()
    found["rows"] = [record for record in found["rows"] if ":" not in record["row"]]
    plots.plot_history_length(found, "accuracy").savefig(tmp_path / "h.png")
    (figure, axes) = drawn[0]
    assert figure.axes == [axes]
    assert axes.get_ylabel() == "accuracy"


@pytest.mark.parametrize(("low", "high"), [(0.97, 1.06), (0.5, 1.7), (0.01, 30)])
def test_weights_can_be_read_off_the_axis(tmp_path, drawn, low, high):
    places = [
        {"from": place, "to": place, "weight": [value, value * 0.99, value * 1.01]}
        for place, value in ((1, high), (2, 1.0), (3, low))
    ]
    plots.plot_weight_profiles({"a": {"by_age": places, "by_rank": places[::-1]}}).savefig(tmp_path / "p.png")
    for axes in drawn[0][1]:
        least, most = axes.get_ylim()
        seen = [tick for tick in axes.get_yticks() if least <= tick <= most]
        assert 3 <= len(seen) <= 14
        labels = [text.get_text() for text in axes.get_yticklabels()]
        assert len(set(labels)) == len(labels)
