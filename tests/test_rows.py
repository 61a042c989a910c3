"""Names of methods: what each means, and what is said about those that mean nothing."""

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pplug_hf.errors import ConfigurationError
from pplug_hf.methods.base import Plain, Retrieval
from pplug_hf.methods.label_frequencies import LabelFrequencies
from pplug_hf.methods.names import canonical, default_rows, method_of, methods_of, name_of, parse_plugs
from pplug_hf.methods.persona import Plug
from pplug_hf.methods.retrievers import RANKERS
from pplug_hf.tasks.task import TASKS

PLUGS = {name: [f"runs/{name}"] for name in ("pplug", "mean", "no-instruction", "instruction-only", "v1.2_b")}

MEANINGS = {
    "no-persona": Plain(),
    "frequencies": LabelFrequencies(),
    "random@4": Retrieval("random", 4),
    "bm25s@12": Retrieval("bm25s", 12),
    "pplug": Plug("pplug", "runs/pplug"),
    "no-instruction": Plug("no-instruction", "runs/no-instruction"),
    "v1.2_b": Plug("v1.2_b", "runs/v1.2_b"),
    "pplug:wrong-user": Plug("pplug", "runs/pplug", history="wrong-user"),
    "pplug:nearest-user": Plug("pplug", "runs/pplug", history="nearest-user"),
    "mean:no-history": Plug("mean", "runs/mean", history="no-history"),
    "pplug:top-4": Plug("pplug", "runs/pplug", history="top", items=4),
    "pplug:last-8": Plug("pplug", "runs/pplug", history="last", items=8),
    "pplug+bm25@1": Plug("pplug", "runs/pplug", retrieval=Retrieval("bm25", 1)),
    "pplug+dense@4:paper-order": Plug("pplug", "runs/pplug", retrieval=Retrieval("dense", 4), paper_order=True),
    "pplug:top-4+bm25@1": Plug("pplug", "runs/pplug", history="top", items=4, retrieval=Retrieval("bm25", 1)),
    "instruction-only+bm25@1": Plug("instruction-only", "runs/instruction-only", retrieval=Retrieval("bm25", 1)),
}


@pytest.mark.parametrize("name", MEANINGS)
def test_what_a_name_means(name):
    assert method_of(name, PLUGS) == MEANINGS[name]


@given(
    st.sampled_from(("", *PLUGS)),
    st.sampled_from(["", ":wrong-user", ":nearest-user", ":no-history", ":top-3", ":last-10"]),
    st.sampled_from(["", *RANKERS]),
    st.integers(1, 999),
    st.booleans(),
)
@example("instruction-only", ":frequencies", "", 1, False)
@example("pplug", ":frequencies", "", 1, False)
def test_a_rows_name_is_what_it_was_read_from(plug, change, ranker, k, paper):
    if not plug:
        text = f"{ranker}@{k}" if ranker else "no-persona"
    else:
        change = "" if plug == "instruction-only" and change != ":frequencies" else change
        text = plug + change + (f"+{ranker}@{k}" + ":paper-order" * paper if ranker else "")
    assert name_of(method_of(text, PLUGS)) == text


@pytest.mark.parametrize(
    "text, at",
    [
        ("", "''"),
        ("nopersona", "'nopersona': no plug has this name"),
        ("bm25", "'bm25': no plug has this name.*for retrieval write bm25@4"),
        ("bm26@4", "'bm26': rankers are random, recency, bm25, bm25s, dense"),
        ("bm25@", "'': a whole number"),
        ("bm25@0", "'0': a whole number of at least 1"),
        ("bm25@-1", "'-1': a whole number"),
        ("bm25@4:paper-order", "'paper-order': turns may stand here and, with a plug in front of the"),
        ("pplug:frequencies+bm25@1", "'bm25@1': pplug takes no retrieved items"),
        ("pplugs", "'pplugs': no plug has this name"),
        ("pplug:", "'': what stands behind a plug is one of wrong-user, no-history, top-N, last-N"),
        ("pplug:whole", "'whole': what stands"),
        ("pplug:top", "'top': what stands"),
        ("pplug:tpo-4", "'tpo-4': what stands"),
        ("pplug:top-x", "'x': a whole number"),
        ("pplug:top-0", "'0': a whole number"),
        ("pplug:wrong-user:top-4", "'wrong-user:top-4': what stands"),
        ("pplug+", "'': rankers are"),
        ("pplug+bm25", r"'bm25': say how many items, as in bm25@4"),
        ("pplug+bm25@1:paper", "'paper': turns may stand here and, with a plug"),
        ("pplug+bm25@1+bm25@2", r"'1\+bm25@2': a whole number"),
        ("+bm25@1", "'': no plug has this name"),
        ("instruction-only:nearest-user", "'nearest-user': plugs of this name are asked without history"),
        ("pplug:nearest-3", "'nearest-3': what stands"),
        ("instruction-only:wrong-user", "'wrong-user': plugs of this name are asked without history"),
        ("no-persona:top-4", "'no-persona': no plug"),
        ("pplug:top-٤", "a whole number"),
    ],
)
def test_what_means_nothing(text, at):
    with pytest.raises(ConfigurationError, match=f"(?s)There is no row .*{at}.*Rows are no-persona, frequencies"):
        method_of(text, PLUGS)


def test_the_message_names_what_there_is():
    with pytest.raises(ConfigurationError, match="of the plugs pplug, mean, no-instruction"):
        method_of("x", PLUGS)
    with pytest.raises(ConfigurationError, match="of plugs, once they are named"):
        method_of("pplug")


def test_a_row_given_twice_is_one():
    methods = methods_of(["no-persona", "bm25@1", "no-persona", "bm25@01"])
    assert (
        methods == {"no-persona": [Plain()], "bm25@1": [Retrieval("bm25", 1)]} and next(iter(methods)) == "no-persona"
    )


def test_each_seed_is_a_method():
    assert methods_of(["a:top-2"], {"a": ["x", "y"]}) == {
        "a:top-2": [Plug("a", folder, history="top", items=2) for folder in ("x", "y")]
    }


# ---- plugs ------------------------------------------------------------------------------------------------------


def test_plugs_have_names_and_seeds():
    assert parse_plugs(["a=x/1,x/2", "b=hub/plug", "a=x/3"]) == {"a": ["x/1", "x/2", "x/3"], "b": ["hub/plug"]}
    assert parse_plugs([]) == {}


@pytest.mark.parametrize(
    "texts, message",
    [
        (["runs/a"], "write NAME=FOLDER"),
        (["a="], "write NAME=FOLDER"),
        (["a=x,,y"], "write NAME=FOLDER"),
        (["=x"], "got the name ''"),
        (["bm25=x"], "got the name 'bm25'.*none of no-persona, frequencies, random"),
        (["no-persona=x"], "none of no-persona"),
        (["a b=x"], "use letters"),
        (["a:b=x"], "use letters"),
        (["a=x,x"], "'x' twice"),
        (["a=x", "a=x"], "'x' twice"),
    ],
)
def test_plugs_that_cannot_be(texts, message):
    with pytest.raises(ConfigurationError, match=message):
        parse_plugs(texts)


# ---- without being asked ----------------------------------------------------------------------------------------


def names(task="LaMP-2", plugs=("pplug", "instruction-only"), users=2, frequencies=True, dense=True, **options):
    return default_rows(TASKS[task], plugs, users=users, frequencies=frequencies, dense=dense, **options)


RETRIEVAL = ["recency@1", "recency@4", "bm25@1", "bm25@4", "dense@1", "dense@4"]
OWN = ["pplug:wrong-user", "pplug:no-history", "pplug:top-4", "pplug+bm25@1", "pplug"]


def test_the_usual_rows():
    assert names() == ["no-persona", "frequencies", *RETRIEVAL, "instruction-only", *OWN]


def test_the_usual_rows_leave_out_what_cannot_be():
    assert names("LaMP-4", users=1, dense=False) == ["no-persona", *RETRIEVAL[:4], "instruction-only", *OWN[1:]]
    assert "frequencies" not in names("LaMP-1") + names("demo") + names(frequencies=False)
    assert names("LaMP-7", plugs=()) == ["no-persona", *RETRIEVAL]
    assert names("LaMP-7", plugs=("instruction-only",)) == ["no-persona", *RETRIEVAL, "instruction-only"]


def test_the_reference_gets_the_controls():
    assert names(plugs=("pplug", "mean"), reference="mean")[-6:] == [
        "pplug",
        *(n.replace("pplug", "mean") for n in OWN),
    ]


@given(st.permutations(names()))
def test_the_usual_order_needs_no_memory(shuffled):
    own = set(OWN) | {"instruction-only"}
    got = canonical(shuffled)
    assert [name for name in got if name not in own] == ["no-persona", "frequencies", *sorted_by_ranker()]
    assert set(got[-6:]) == own and got[-1] == "pplug"


def sorted_by_ranker():
    return sorted(RETRIEVAL, key=lambda name: (list(RANKERS).index(name.split("@")[0]), int(name.split("@")[1])))
