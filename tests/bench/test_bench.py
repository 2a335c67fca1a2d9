"""Pages show what the records say, and nothing else."""

from visistage.bench import tables
from visistage.bench.accuracy import plans_of


def test_tables_are_generated_from_records():
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.filled(text) == text, f"{page.name}: python -m visistage.bench.tables"


def test_a_changed_number_would_be_noticed():
    page = tables.ROOT / "docs" / "size.md"
    text = page.read_text()
    assert "cuda" in text
    assert tables.filled(text.replace("cuda", "cudo")) == text


def test_a_comparison_has_a_row_for_each_plan_and_the_controls_among_them():
    share = {"right": 1, "total": 2, "share": 0.5, "low": 0.1, "high": 0.9}
    times = {f"{name}_ms": {"median": 2.0} for name in ("first_token", "second_question")}
    row = {
        "plan": "dense",
        "target": None,
        "control": False,
        "visual_flops_share": 1.0,
        "accuracy": share,
        "agreement": share,
        "by_type": {"reading": share, "yes/no": share, "count": share},
        "second": None,
        "per_token_ms": {"median": 1.0},
        "visual_kv_bytes": 2048.0,
        **times,
    }
    worse = {**share, "share": 0.25}
    rows = [
        {
            "series": "demo",
            "samples": 2,
            "second_questions": 0,
            "settings": {"repetitions": 3},
            "machine": {"threads": 2},
            "left_out": ["fastv at 1 %"],
            "findings": ["A control wins."],
        },
        row,
        {**row, "plan": "scope:keep=4", "target": 0.5, "accuracy": worse},
        {**row, "plan": "random:keep=4", "target": 0.5, "control": True},
        {**row, "plan": "exit-only:e=1", "target": 0.25},
    ]
    text = tables.compared(rows)
    plans = [line.split("`")[1] for line in text.splitlines() if line.startswith("| `")]
    assert plans == ["dense", "exit-only:e=1", "random:keep=4", "scope:keep=4"]
    assert "| `random:keep=4` (control) | 100.0 % | 50.0 % | 10.0–90.0 | 50.0 % | 50.0 % |" in text
    assert "A control wins." in text
    assert "left out: fastv at 1 %" in text
    assert "compare-demo.svg" in text
    kinds = tables.compared_kinds(rows).splitlines()
    assert kinds[0] == "| plan | reading | yes/no | count |"
    assert len(kinds) == 6


def test_series_with_more_tokens_are_asked_at_the_same_shares():
    assert "scope:keep=16" in plans_of("easy-vqa")
    assert "scope:keep=64" in plans_of("demo-576")
    assert "visipruner:entry=scope-128" in plans_of("demo-576")
    assert len(plans_of("demo")) > len(plans_of("demo-576"))
