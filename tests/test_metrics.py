"""Metrics against scikit-learn, rouge-score and the benchmark's rules written out."""

import json
import math
import sys
import warnings
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nltk.translate.meteor_score import single_meteor_score
from rouge_score.rouge_scorer import RougeScorer
from sklearn.metrics import accuracy_score, f1_score, mean_absolute_error, mean_squared_error

from pplug_hf.cli import main
from pplug_hf.data.records import Example
from pplug_hf.errors import ConfigurationError, MismatchError, MissingPackageError
from pplug_hf.evaluation.compare import Comparison
from pplug_hf.evaluation.rendering import report
from pplug_hf.tasks import lamp_metrics, text_metrics
from pplug_hf.tasks.lamp_qa import RubricJudge
from pplug_hf.tasks.metrics import METRICS
from pplug_hf.tasks.task import TASKS, get_task, higher_is_better, main_metric, per_example, score, score_each
from pplug_hf.tasks.text_metrics import UnicodeTokenizer, meteor

TAGS = get_task("LaMP-2").labels
JUDGED_BY_ANSWERS = [name for name in TASKS if name != "LaMP-QA"]  # which a judge of one's own reads more for
answers = st.sampled_from([*TAGS, "western", "", "Comedy"])
ratings = st.sampled_from(
    ["1", "2", "3", "4", "5", "3.5", "7", "-1", " 2 ", "1e0", "", "five", "4 stars", "nan", "inf"]
)


def pairs(prediction, gold):
    return st.lists(st.tuples(prediction, gold), min_size=1, max_size=40)


@settings(deadline=None, max_examples=60)
@given(pairs(answers, st.sampled_from(TAGS)))
def test_accuracy_and_f1_are_the_benchmarks(rows):
    predictions, golds = map(list, zip(*rows, strict=True))
    index = {tag: number for number, tag in enumerate(TAGS)}
    y_pred, y_true = [index.get(text, -1) for text in predictions], [index[text] for text in golds]
    result = score("LaMP-2", predictions, golds)
    f1 = f1_score(y_true, y_pred, labels=range(len(TAGS)), average="macro", zero_division=0)
    assert result["accuracy"] == pytest.approx(accuracy_score(y_true, y_pred))
    assert result["f1"] == pytest.approx(f1)
    assert result["unparsed"] == y_pred.count(-1)


def slow_rating(prediction, gold):
    try:
        number = float(prediction)
        if math.isfinite(number):
            return number
    except ValueError:
        pass
    return 1.0 if abs(1 - float(gold)) > abs(5 - float(gold)) else 5.0


@settings(deadline=None, max_examples=60)
@given(pairs(ratings, st.sampled_from("12345")))
def test_mae_and_rmse_are_the_benchmarks(rows):
    predictions, golds = map(list, zip(*rows, strict=True))
    y_pred, y_true = [slow_rating(*row) for row in rows], [float(gold) for gold in golds]
    result = score("LaMP-3", predictions, golds)
    assert result["mae"] == pytest.approx(mean_absolute_error(y_true, y_pred))
    assert result["rmse"] == pytest.approx(math.sqrt(mean_squared_error(y_true, y_pred)))
    assert result["unparsed"] == sum(text in ("", "five", "4 stars", "nan", "inf") for text in predictions)


@pytest.mark.parametrize("name", ["LaMP-4", "LaMP-5", "LaMP-6", "LaMP-7"])
def test_rouge_is_the_mean_of_rouge_score(name):
    golds = ["The cat sat on the mat", "Running dogs", "A title: of two parts", "日本語", "x"]
    predictions = ["the cat on a mat", "dogs run", "of two parts, a title", "日本語", ""]
    scorer = RougeScorer(["rouge1", "rougeL"], use_stemmer=False)
    rows = [scorer.score(gold, text) for gold, text in zip(golds, predictions, strict=True)]
    result = score(name, predictions, golds)
    assert result["rouge-1"] == pytest.approx(np.mean([row["rouge1"].fmeasure for row in rows]))
    assert result["rouge-L"] == pytest.approx(np.mean([row["rougeL"].fmeasure for row in rows]))
    assert result["unparsed"] == 2  # empty, and in another script
    assert list(per_example(name, predictions, golds)[-2:]) == [0, 0]  # other scripts have no tokens


def test_rouge_by_hand():
    # 3 of 4 given words are among the 6 of the gold: P 3/4, R 3/6, F 0.6; in order only 2: F 0.4
    result = score("LaMP-4", ["c b z a"], ["a b c d e f"])
    assert result["rouge-1"] == pytest.approx(0.6)
    assert result["rouge-L"] == pytest.approx(0.2)


@pytest.mark.parametrize(
    ("prediction", "gold", "error"),
    [
        ("4", "4", 0),
        (" 4\n", "4", 0),
        ("3.5", "4", 0.5),
        ("7", "5", 2),  # beyond the scale is taken as it is
        ("", "1", 4),
        ("", "2", 3),
        ("", "3", 2),
        ("", "4", 3),
        ("", "5", 4),
        ("four", "4", 3),
        ("4 stars", "4", 3),
        ("nan", "5", 4),
    ],
)
def test_error_of_a_rating(prediction, gold, error):
    assert per_example("LaMP-3", [prediction], [gold])[0] == error


@pytest.mark.parametrize(
    ("prediction", "error"), [("4 stars", 0), ("I say 3 or 4", 1), ("", 3), ("none", 3), ("3.5", 0.5)]
)
def test_fallback_of_the_papers_authors(prediction, error):
    assert per_example("LaMP-3", [prediction], ["4"], fallback="first-digit")[0] == error
    assert score("LaMP-3", [prediction], ["4"], fallback="first-digit")["mae"] == error


@pytest.mark.parametrize(
    ("prediction", "right", "unparsed"),
    [
        ("comedy", 1, 0),
        (" comedy\n", 1, 0),
        ("Comedy", 0, 1),
        ("comedy.", 0, 1),
        ("", 0, 1),
        ("action", 0, 0),
    ],
)
def test_labels_must_match_exactly_but_for_space_around(prediction, right, unparsed):
    result = score("LaMP-2", [prediction], ["comedy"])
    assert (result["accuracy"], result["unparsed"]) == (right, unparsed)


def test_f1_is_over_all_labels_also_those_not_seen():
    assert score("LaMP-2", ["comedy"], ["comedy"])["f1"] == pytest.approx(1 / 15)
    assert score("LaMP-1", ["[1]", "[2]"], ["[1]", "[2]"])["f1"] == 1


def test_without_labels_those_of_the_golds_count():
    assert score("demo", ["a", "b", "z"], ["a", "b", "b"]) == {
        "accuracy": pytest.approx(2 / 3),
        "f1": pytest.approx((1 + 2 / 3) / 2),
        "unparsed": 1,
    }


def test_the_scale_is_the_tasks_own():
    task = replace(TASKS["LaMP-3"], labels=("0", "5", "10"))
    assert list(per_example(task, ["x", "x", "x"], ["0", "5", "10"])) == [10, 5, 10]


@pytest.mark.parametrize("name", JUDGED_BY_ANSWERS)
def test_mean_of_the_examples_is_the_main_score(name):
    golds = list(TASKS[name].labels) or ["a title", "another title"]
    predictions = [*golds[1:], "nonsense"]
    values = per_example(name, predictions, golds)
    assert values.shape == (len(golds),) and values.dtype == np.float64
    assert values.mean() == pytest.approx(score(name, predictions, golds)[main_metric(name)])


@pytest.mark.parametrize("name", JUDGED_BY_ANSWERS)
def test_right_answers_get_the_best_score(name):
    golds = list(TASKS[name].labels) or ["a title", "another title"]
    best = 1 if higher_is_better(name) else 0
    if TASKS[name].metric == "meteor":
        best -= 0.5 / 2**3  # a single piece of two words counts as a break, too
    assert list(per_example(name, golds, golds)) == [best] * len(golds)
    assert score(name, golds, golds)["unparsed"] == 0


def test_main_metric_and_direction():
    assert [main_metric(f"LaMP-{n}") for n in range(1, 6)] == [
        "accuracy",
        "accuracy",
        "mae",
        "rouge-1",
        "rouge-1",
    ]
    assert [name for name in TASKS if not higher_is_better(name)] == ["LaMP-3"]


def test_per_example_error_is_not_negated():
    assert per_example("LaMP-3", ["1"], ["5"])[0] == 4


@pytest.mark.parametrize("function", [score, per_example])
def test_mistakes_are_explained(function):
    with pytest.raises(MismatchError, match="2 predictions and 1 golds"):
        function("LaMP-2", ["a", "b"], ["comedy"])
    with pytest.raises(MismatchError, match="0 predictions"):
        function("LaMP-2", [], [])
    with pytest.raises(
        MismatchError, match=r"1 of 2 golds are not labels of LaMP-2 \(first at place 1\).*sci-fi"
    ) as raised:
        function("LaMP-2", ["comedy", "comedy"], ["comedy", "my illness"])
    assert "illness" not in str(raised.value)
    with pytest.raises(MismatchError, match="gold at place 1 of LaMP-3 is not a number") as raised:
        function("LaMP-3", ["5", "5"], ["5", "my illness"])
    assert "illness" not in str(raised.value)
    with pytest.raises(ConfigurationError, match="farthest, first-digit"):
        function("LaMP-3", ["5"], ["5"], fallback="guess")


# ---- other scripts, METEOR ------------------------------------------------------------------------------------------

FOREIGN = ["日本の夏", "привет мир", "مرحبا بالعالم", "हिन्दी में लिखो", "ภาษาไทย", "한국어 문장"]
LONG = replace(get_task("LaMP-4"), name="long", metric="meteor")
UNICODE = replace(get_task("LaMP-4"), name="unicode", metric="rouge-unicode")


def test_rouge_says_which_golds_it_cannot_read(tmp_path, capsys):
    with pytest.warns(
        UserWarning, match=r"6 of 8 golds \(75.0%\) have no token that rouge-1 and rouge-L read: .*rouge-unicode"
    ):
        result = score("LaMP-4", [*FOREIGN, "a film", "x"], [*FOREIGN, "a film", "y"])
    assert result == {"rouge-1": 1 / 8, "rouge-L": 1 / 8, "unparsed": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        score("LaMP-4", ["日本", "a"], ["Zoë", "2"])
        score(UNICODE, FOREIGN, FOREIGN)
    golds = tmp_path / "golds.json"
    content = [{"id": str(i), "output": text} for i, text in enumerate(FOREIGN)]
    golds.write_text(json.dumps({"task": "LaMP_4", "golds": content}))
    with pytest.warns(UserWarning, match="6 of 6 golds"):
        assert main(["score", "--golds", str(golds), "--predictions", str(golds)]) == 0
    (note,) = json.loads(capsys.readouterr().out)["notes"]
    assert note.startswith("6 of 6 golds (100.0%)")


def test_results_and_table_say_it_too():
    asked = [Example(str(i), str(i), "article: x", "x", text, []) for i, text in enumerate(FOREIGN)]
    with pytest.warns(UserWarning, match="6 of 6"):
        made = Comparison(get_task("LaMP-4"), asked, "mine", {"mine": [FOREIGN]}, full=True)
        results = made.results()
    assert results["notes"][0].startswith("6 of 6 golds")
    assert results["notes"][0] in report(made, {**results, "runs": {}}, "dev")
    assert "notes" not in Comparison(UNICODE, asked, "mine", {"mine": [FOREIGN]}).results()


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("日本の夏 2020", "日 本 の 夏 2020"),
        ("Привет, Мир!", "привет мир"),
        ("مرحبا بالعالم", "مرحبا بالعالم"),
        ("हिन्दी में", "हिन्दी में"),
        ("ラーメンが", "ラ ー メ ン が"),
        ("한국어 문장", "한국어 문장"),
        ("The Größe of café", "the grösse of café"),
        ("\uff11\uff12 🎬", "12"),
    ],
)
def test_words_of_any_script(text, tokens):
    assert UnicodeTokenizer().tokenize(text) == tokens.split()


def test_rouge_of_other_scripts():
    same = score(UNICODE, FOREIGN, FOREIGN)
    assert same == {"rouge-1-unicode": 1, "rouge-L-unicode": 1, "unparsed": 0}
    assert score(UNICODE, ["夏の日本", "мир", "🎬"], ["日本の夏", "привет мир", "x"]) == {
        "rouge-1-unicode": pytest.approx((1 + 2 / 3) / 3),
        "rouge-L-unicode": pytest.approx((0.5 + 2 / 3) / 3),
        "unparsed": 1,
    }
    golds, texts = ["The cat sat on the mat", "two words"], ["the cat on a mat", "words two"]
    plain = score("LaMP-4", texts, golds)
    assert score(UNICODE, texts, golds)["rouge-1-unicode"] == pytest.approx(plain["rouge-1"])


class NoSynonyms:
    """WordNet without an entry."""

    def synsets(self, word):
        return []


@settings(deadline=None, max_examples=200)
@given(
    *[
        st.lists(
            st.sampled_from(
                ["the", "cat", "cats", "run", "runs", "running", "on", "a", "mat", "mats", ".", ",", "fast"]
            ),
            max_size=12,
        )
    ]
    * 2
)
def test_meteor_is_nltks_without_synonyms(given_words, gold_words):
    expected = single_meteor_score(gold_words, given_words, wordnet=NoSynonyms()) if gold_words else 0
    assert meteor(" ".join(given_words), " ".join(gold_words)) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("metric", "module"),
    [
        *((name, "rouge_score.rouge_scorer") for name in ("rouge", "rouge-unicode", "meteor")),
        ("rouge-unicode", "regex"),
        ("meteor", "nltk.tokenize"),
        ("meteor", "nltk.stem"),
    ],
)
def test_a_missing_package_is_noticed_before_anything_is_answered(metric, module, monkeypatch):
    task, asked = replace(LONG, metric=metric), [Example("1", "u", "article: x", "x", "y", [])]
    assert Comparison(task, asked, "mine")
    for found in (text_metrics._word_finder, text_metrics._word_tokenizer, text_metrics._stemmer):
        found.cache_clear()
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(MissingPackageError, match=r"pip install 'pplug-hf\[eval\]'"):
        Comparison(task, asked, "mine")


def test_answers_are_judged_once(monkeypatch):
    """By a judge, which usually costs money, and by the package's own metrics, of which none is fast."""
    judged = []

    class Judge(RubricJudge):
        def judge(self, answer, aspect, extra):
            judged.append(answer)
            return float(answer)

    monkeypatch.setitem(METRICS, "rubric", Judge())
    extra = {"rubric_aspects": [{"aspect": "a"}, {"aspect": "b"}]}
    asked = [Example(str(i), str(i), "question: x", "x", None, [], extra) for i in range(3)]
    results = Comparison(get_task("LaMP-QA"), asked, "mine", {"mine": [["1", "0", "0.5"]]}, full=True).results()
    assert results["rows"][0]["rubric"] == 0.5 and judged == ["1", "1", "0", "0", "0.5", "0.5"]

    kinds, matched = [], []
    real, rouge = text_metrics.meteor, lamp_metrics.rouge_scores
    monkeypatch.setattr(text_metrics, "meteor", lambda *pair: matched.append(pair) or real(*pair))
    monkeypatch.setattr(lamp_metrics, "rouge_scores", lambda kind, *rest: kinds.append(kind) or rouge(kind, *rest))
    scores, values = score_each(LONG, ["a cat", "b"], ["a dog", "b"])
    assert len(matched) == 2 and sorted(kinds) == ["rouge1", "rougeL"]
    assert scores == score(LONG, ["a cat", "b"], ["a dog", "b"]) and scores["meteor"] == values.mean()
    kinds.clear()
    assert score_each(UNICODE, ["a cat"], ["a dog"])[0]["rouge-1-unicode"] == 0.5 and len(kinds) == 2


def test_meteor_reads_other_scripts_and_says_what_does_not():
    with pytest.warns(UserWarning, match=r"2 of 3 golds .* no token that rouge-1 and rouge-L read.* a 0 there"):
        found = score(LONG, ["привет мир", "", "a film"], ["привет мир", "夏", "a film"])
    assert found == {"meteor": pytest.approx(2 * 0.9375 / 3), "rouge-1": 1 / 3, "rouge-L": 1 / 3, "unparsed": 1}


def test_meteor_by_hand():
    # 2 of 3 words match in one piece: P = R = 2/3, and half of (1 / 2) ** 3 is lost
    assert meteor("The dogs slept", "the dog ran") == pytest.approx(2 / 3 * (1 - 0.5 / 8))
    assert meteor("", "the dog") == meteor("a cat", "the dog") == 0
    predictions, golds = ["The dogs slept", "x"], ["the dog ran", "x"]
    result = score(LONG, predictions, golds)
    assert list(result) == ["meteor", "rouge-1", "rouge-L", "unparsed"]
    assert result["meteor"] == pytest.approx(per_example(LONG, predictions, golds).mean())
    assert result["rouge-1"] == score("LaMP-4", predictions, golds)["rouge-1"]
    assert (main_metric(LONG), higher_is_better(LONG)) == ("meteor", True)
