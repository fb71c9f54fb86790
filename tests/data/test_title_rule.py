import pyarrow as pa
import pytest

from hf_ilora.data.title_rule import split_titles


@pytest.mark.parametrize(
    ("raw", "title", "year"),
    [
        ("Toy Story (1995)", "Toy Story", 1995),
        ("Usual Suspects, The (1995)", "The Usual Suspects", 1995),
        ("Fish Called Wanda, A (1988)", "A Fish Called Wanda", 1988),
        ("American in Paris, An (1951)", "An American in Paris", 1951),
        (
            "Horseman on the Roof, The (Hussard sur le toit, Le) (1995)",
            "The Horseman on the Roof (Hussard sur le toit, Le)",
            1995,
        ),
        ("Good, The Bad and The Ugly, The (1966)", "The Good, The Bad and The Ugly", 1966),
        ("Die xue shuang xiong (Killer, The) (1989)", "Die xue shuang xiong (The Killer)", 1989),
        ("Seven Samurai (a.k.a. Magnificent Seven, The) (1954)", "Seven Samurai (a.k.a. The Magnificent Seven)", 1954),
        ("(500) Days, The (2009)", "The (500) Days", 2009),
        ("Ring(s), The (Rings, Les) (2000)", "The Ring(s) (Rings, Les)", 2000),
        ("Postino, Il (1994)", "Postino, Il", 1994),
        ("Misérables, Les (1995)", "Misérables, Les", 1995),
        ("Theory of Everything, Thesis (2000)", "Theory of Everything, Thesis", 2000),
        ("Tape Two (1995) (V)", "Tape Two", 1995),
        ("Some Series (1975-1979)", "Some Series", 1975),
        ("Another Series (2009\u2013 )", "Another Series", 2009),
        ("Two Friends (1986) ", "Two Friends", 1986),
        ("2001 (1968)", "2001", 1968),
        ("unknown", "unknown", None),
        ("(1995)", "(1995)", None),
        ("Nineteen (1234)", "Nineteen (1234)", None),
        ("Year (1995) in the middle", "Year (1995) in the middle", None),
        (None, None, None),
    ],
)
def test_the_year_moves_to_its_column_and_an_english_article_to_the_front(raw, title, year):
    titles, years = split_titles(pa.array([raw], pa.string()))
    assert (titles[0].as_py(), years[0].as_py()) == (title, year)
    assert (titles.type, years.type) == (pa.string(), pa.int32())


def test_chunks_keep_their_rows():
    titles, years = split_titles(pa.chunked_array([["B, The (2001)"], [], ["C", "D, A (2003)"]]))
    assert titles.to_pylist() == ["The B", "C", "A D"]
    assert years.to_pylist() == [2001, None, 2003]
