"""Pages show what the records say, and nothing else."""

from visistage.bench import tables


def test_tables_are_generated_from_records():
    for page in tables.PAGES:
        text = page.read_text()
        assert tables.filled(text) == text, f"{page.name}: python -m visistage.bench.tables"


def test_a_changed_number_would_be_noticed():
    page = tables.ROOT / "docs" / "size.md"
    text = page.read_text()
    assert "cuda" in text
    assert tables.filled(text.replace("cuda", "cudo")) == text
