"""What the cells say together: lines over an axis, claims."""

from unclip.sweep import findings


def record(model, guidance, seed, fd, cosine, **settings):
    own = {"model": model, "guidance": guidance, "seed": seed, **settings}
    values = [
        {"metric": "fd-clip", "key": "fd-clip/x/N=5", "value": fd},
        {"metric": "clip_cosine", "key": "clip_cosine/x/N=5", "value": cosine},
    ]
    return {"id": f"{model}-{guidance}-{seed}", "settings": own, "values": values}


RECORDS = [
    record("a", 1.0, 0, 4.0, 0.1),
    record("a", 1.0, 1, 6.0, 0.3),
    record("a", 2.0, 0, 3.0, 0.5),
    record("b", 1.0, 0, 9.0, 0.2),
    record("b", 2.0, 0, 2.5, 0.4),
]


def test_lines_average_seeds_and_split_by_the_rest():
    found = findings.lines(RECORDS, "clip_cosine/x/N=5", "fd-clip/x/N=5", "guidance")
    assert found["a"] == [(1.0, 0.2, 5.0), (2.0, 0.5, 3.0)]
    assert found["b"] == [(1.0, 0.2, 9.0), (2.0, 0.4, 2.5)] and len(found) == 2
    assert findings.varied(RECORDS) == ["model", "guidance", "seed"]


def test_claims_compare_the_best_cells():
    claims = [
        ("one", "fd-clip", "a", "<", "b"),
        ("two", "clip_cosine", "a", ">", "b"),
        ("three", "fd-clip", "a", "<", "c"),
        ("four", "fid", "a", "<", "b"),
    ]
    rows = findings.judged(RECORDS, claims)
    assert [row["here"] for row in rows] == [
        "does not agree",
        "agrees",
        "not measured",
        "not measured",
    ]
    assert (rows[0]["value"], rows[0]["other value"]) == (3.0, 2.5)
    assert (rows[1]["value"], rows[1]["other value"]) == (0.5, 0.4)
    costs = [("five", "rise:fd-clip", "a", "<", "b"), ("six", "rise:clip_cosine", "a", "<", "z")]
    rising = [*RECORDS, record("a", 3.0, 0, 3.5, 0.6), record("b", 3.0, 0, 8.5, 0.1)]
    cost, none = findings.judged(rising, costs)
    assert (cost["value"], cost["other value"], cost["here"]) == (0.5, 6.0, "agrees")
    assert (none["value"], none["other value"], none["here"]) == (0.0, None, "not measured")
    found = findings.findings(RECORDS, claims)
    assert found["claims"] == rows
    assert [(row["model"], row["guidance"], row["fd-clip/x/N=5"]) for row in found["models"]] == [
        ("a", 2.0, 3.0),
        ("b", 2.0, 2.5),
    ]
    lucky = [
        record("c", 1.0, 0, 1.0, 0.0),
        record("c", 1.0, 1, 9.0, 0.0),
        record("c", 2.0, 0, 4.0, 0.0),
    ]
    (chosen,) = findings.best(lucky, "fd-clip/x/N=5")  # not the luckiest seed
    assert chosen["settings"]["guidance"] == 2.0
