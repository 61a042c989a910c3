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


SETTINGS = {"split": "dev", "backbone": "/home/alice/models/bart-small/"}
KNOWN = {"task": "LaMP-2", "examples": 1410, "users": 60, "settings": SETTINGS, "reference": "b"}
HEADING = "LaMP-2, dev: 1,410 questions of 60 users, bart-small"


def rows_of(*intervals):
    names = ["a", "b", "c"]
    return [
        {"row": name, "seeds": 1, "accuracy": 0.25 * (i + 1), "interval": interval}
        for i, (name, interval) in enumerate(zip(names, intervals, strict=True))
    ]


def test_pictures_say_of_what_they_are(drawn):
    assert plots.heading(KNOWN) == HEADING
    assert plots.heading({"task": "shop", "settings": {}}) == "shop" and plots.heading({}) == ""
    records = rows_of([0.2, 0.3], [0.4, 0.6], [0.7, 0.8])
    plots.plot_rows(records, "accuracy", "b", plots.heading(KNOWN))
    bins = [{"from": n, "to": n, "examples": 1000 * n, "rows": {r["row"]: n for r in records}} for n in (1, 2)]
    plots.plot_history_length({**KNOWN, "rows": records, "by_history_length": bins}, "accuracy")
    places = [{"from": n, "to": n, "examples": 5 * n, "weight": [1, None, None]} for n in (1, 2)]
    plots.plot_weight_profiles({"b": {"by_age": places, "by_rank": places}}, plots.heading(KNOWN))
    assert [figure._suptitle.get_text() for figure, _ in drawn] == [HEADING] * 3
    assert [label.get_text() for label in drawn[1][1].get_xticklabels()] == ["1\nn = 1,000", "2\nn = 2,000"]
    assert "without intervals" in drawn[1][1].get_xlabel()
    assert [label.get_text() for label in drawn[2][1][0].get_xticklabels()] == ["1\nn = 5", "2\nn = 10"]


def test_bars_of_rows_have_values_and_the_reference_is_darker_not_red(drawn):
    plots.plot_rows(rows_of([0.2, 0.3], [0.4, 0.6], [0.7, 0.8]), "accuracy", "b")
    plots.plot_rows(rows_of([None, None], [None, None], [None, None]), "accuracy", "b")
    (_, known), (_, unknown) = drawn
    colours = [bar.get_facecolor()[:3] for bar in known.patches]
    assert colours[0] == colours[2] != colours[1] and sum(colours[1]) < sum(colours[0])
    assert all(blue > red for red, _, blue in colours)
    assert [text.get_text() for text in known.texts] == ["0.250", "0.500", "0.750"]
    assert known.get_xlabel() == "accuracy (95 % interval over users)"
    assert unknown.get_xlabel() == "accuracy (no intervals: they need two users)"


def test_few_of_many_items_are_drawn_with_values_dates_and_the_answer(drawn):
    weights = torch.tensor([0.9, 0.05, 0.03] + [0.02 / 97] * 97)
    dates = ["2021-03-01", None] + ["2019"] * 98
    plots.plot_weights(weights, [f"item {i}" for i in range(100)], "for: sea", dates=dates, answer="the moon")
    ((figure, axes),) = drawn
    assert [t.get_text() for t in axes.get_yticklabels()] == ["2021-03-01 item 0", "item 1", "2019 item 2"]
    assert [text.get_text() for text in axes.texts] == ["90.0%", "5.0%", "3.0%"]
    assert axes.get_xlabel() == "weight (sum over all 100 items: 1; the other 97 have 2.0% together)"
    assert figure._suptitle.get_text() == "for: sea\nAnswer: the moon"


def test_labels_end_with_a_word():
    text = "the quick brown fox jumps over the lazy dog"
    assert plots._cut(text, 43) == text
    for most in range(8, 43):
        cut = plots._cut(text, most)
        assert len(cut) <= most and cut.endswith(" …") and text.startswith(cut[:-2] + " ")
    assert plots._cut("donaudampfschifffahrt", 10) == "donaudam …"
