"""Public data sets by name, from small files in the form in which their authors publish them."""

import gzip
import json
from pathlib import Path

import pytest

from hf_ilora import load_public_dataset


def write(folder: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        content = text.encode()
        (folder / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return folder


def json_lines(rows: list[dict]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def python_lines(rows: list[dict]) -> str:
    """As programs of Python 2 printed dictionaries: text as u'...'."""

    def printed(value) -> str:
        if isinstance(value, dict):
            return "{" + ", ".join(f"{printed(key)}: {printed(each)}" for key, each in value.items()) + "}"
        return f"u{value!r}" if isinstance(value, str) else repr(value)

    return "".join(printed(row) + "\n" for row in rows)


# --- Amazon Reviews 2014 ---

REVIEWS_2014 = [
    {"reviewerID": "A1", "asin": "0205616461", "reviewerName": "K", "helpful": [0, 0], "reviewText": "it's \"ok\"",
     "overall": 5.0, "summary": "s", "unixReviewTime": 1369699200, "reviewTime": "05 28, 2013"},
    {"reviewerID": "A2", "asin": "B00A", "helpful": [1, 2], "reviewText": "", "overall": 2.0, "summary": "",
     "unixReviewTime": 1369612800, "reviewTime": "05 27, 2013"},
]  # fmt: skip
META_2014 = [
    {"asin": "B0ther", "title": "Never reviewed", "related": {"also_bought": ["B00A"]}},
    {"asin": "B00A", "description": "It's 'good'", "title": "Nail File &amp; Brush", "price": 5.99,
     "salesRank": {"Beauty": 3}, "related": {"also_viewed": ["0205616461"]}, "categories": [["Beauty"]]},
    {"asin": "0205616461", "imUrl": "http://x/y.jpg", "title": "Bio-Active \"Serum\" (2012)"},
]  # fmt: skip


@pytest.mark.parametrize(("core", "lines"), [("", json_lines), ("_5", json_lines), ("", python_lines)])
def test_amazon_2014_is_read_from_reviews_and_loose_metadata(core, lines, tmp_path):
    files = {f"reviews_Beauty{core}.json.gz": lines(REVIEWS_2014), "meta_Beauty.json.gz": ""}
    files["meta_Beauty.json.gz"] = "".join(f"{row!r}\n" for row in META_2014)
    interactions, items = load_public_dataset("amazon-2014", write(tmp_path, files))
    assert interactions.to_dict() == {
        "user_id": ["A1", "A2"],
        "item_id": ["0205616461", "B00A"],
        "timestamp": [1369699200, 1369612800],
        "rating": [5.0, 2.0],
    }
    assert items.to_dict() == {
        "item_id": ["0205616461", "B00A"],
        "title": ['Bio-Active "Serum" (2012)', "Nail File & Brush"],
        "year": [None, None],
        "genres": [[], []],
    }


def test_amazon_2014_has_ratings_without_a_header_too(tmp_path):
    ratings = "A1,0205616461,5.0,1369699200\nA2,B00A,2.0,1369612800\n"
    folder = write(tmp_path, {"ratings_Beauty.csv": ratings, "meta_Beauty.json": json_lines(META_2014)})
    interactions, items = load_public_dataset("amazon-2014", str(folder / "ratings_Beauty.csv"))
    assert interactions["rating"][:] == [5.0, 2.0] and interactions["item_id"][:] == ["0205616461", "B00A"]
    assert items["title"][1] == "Nail File & Brush"


def test_items_without_a_title_are_an_error_or_have_their_ids(tmp_path):
    files = {"reviews_Beauty.json": json_lines(REVIEWS_2014), "meta_Beauty.json": "{'asin': 'B00A', 'title': ' '}\n"}
    folder = write(tmp_path, files)
    with pytest.raises(ValueError, match=r"2 of 2 items of amazon-2014 have no title, first \['0205616461', 'B00A'\]"):
        load_public_dataset("amazon-2014", folder)
    _, items = load_public_dataset("amazon-2014", folder, missing_titles="item_id")
    assert items["title"][:] == ["0205616461", "B00A"]
    (folder / "meta_Beauty.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no meta_Beauty.json beside .*pass items=, or pass missing_titles="):
        load_public_dataset("amazon-2014", folder)
    _, items = load_public_dataset("amazon-2014", folder, missing_titles="item_id")
    assert items["title"][:] == ["0205616461", "B00A"]


# --- Amazon Reviews 2023 ---

META_2023 = [
    {"main_category": "All Beauty", "title": "Hair &#39;Spray&#39;", "average_rating": 4.8, "price": None,
     "images": [{"thumb": "t"}], "details": {"UPC": "1"}, "parent_asin": "B01CUP"},
    {"main_category": "All Beauty", "title": "Comb", "price": "from 3", "details": {"S": 2}, "parent_asin": "B02PAN"},
]  # fmt: skip


def test_amazon_2023_counts_milliseconds_and_parents(tmp_path):
    reviews = [
        {"rating": 5.0, "title": "Such a scent", "text": "t", "images": [], "asin": "B00YQ6", "parent_asin": "B01CUP",
         "user_id": "AGKH", "timestamp": 1588687728923, "helpful_vote": 0, "verified_purchase": True},
        {"rating": 1.0, "title": "No", "text": "", "images": [], "asin": "B02PAN", "parent_asin": "B02PAN",
         "user_id": "AGKH", "timestamp": 1588687728000, "helpful_vote": 0, "verified_purchase": False},
    ]  # fmt: skip
    folders = {"raw/review_categories/All_Beauty.jsonl": json_lines(reviews)}
    folders["raw/meta_categories/meta_All_Beauty.jsonl"] = json_lines(META_2023)
    beside = {"All_Beauty.jsonl.gz": json_lines(reviews), "meta_All_Beauty.jsonl.gz": json_lines(META_2023)}
    for path in (write(tmp_path, folders) / "raw", write(tmp_path / "beside", beside)):
        interactions, items = load_public_dataset("amazon-2023", path)
        assert interactions.to_dict() == {
            "user_id": ["AGKH", "AGKH"],
            "item_id": ["B01CUP", "B02PAN"],
            "timestamp": [1588687728.923, 1588687728.0],
            "rating": [5.0, 1.0],
        }
        assert items["title"][:] == ["Hair 'Spray'", "Comb"]


def test_amazon_2023_is_read_from_its_benchmark_too(tmp_path):
    text = "user_id,parent_asin,rating,timestamp\nAGKH,B02PAN,1.0,1588687728000\n"
    folder = write(tmp_path, {"All_Beauty.csv.gz": text, "elsewhere/meta.jsonl": json_lines(META_2023)})
    settings = {"items": folder / "elsewhere" / "meta.jsonl"}
    interactions, items = load_public_dataset("amazon-2023", folder, **settings)
    assert interactions["timestamp"][:] == [1588687728] and items["title"][:] == ["Comb"]
    part = {"All_Beauty.train.csv": text, "meta_All_Beauty.jsonl": json_lines(META_2023)}
    _, items = load_public_dataset("amazon-2023", write(tmp_path / "last_out", part))
    assert items["title"][:] == ["Comb"]


# --- Steam ---

GAMES = [
    {"publisher": "P", "genres": ["Action"], "app_name": "Lost Summoner Kitty", "title": "Other", "id": "761140"},
    {"app_name": "Twice", "id": "612880"},
    {"app_name": "Twice again", "id": "612880"},
    {"url": "http://store/without-an-id", "app_name": "Nothing"},
    {"title": "Only a title", "id": "7"},
]


def test_steam_is_read_from_literals_of_python(tmp_path):
    def review(user: str, product: str, date: str) -> dict:
        return {"username": user, "hours": 0.1, "products": 41, "product_id": product, "page_order": 0, "date": date,
                "text": "it's 'u\"product_id\"'", "early_access": False, "page": 1}  # fmt: skip

    reviews = [
        review("Chaos Syren", "761140", "2017-12-17"),
        review("o\"'ne", "612880", "2017-12-16"),
        review("  ", "7", "2017-12-16"),
        review("été ", "7", "2011-01-05"),
    ]
    files = {"steam_reviews.json.gz": python_lines(reviews), "steam_games.json.gz": python_lines(GAMES)}
    interactions, items = load_public_dataset("steam", write(tmp_path, files))
    assert interactions.to_dict() == {
        "user_id": ["Chaos Syren", "o\"'ne", "été"],
        "item_id": ["761140", "612880", "7"],
        "timestamp": [1513468800, 1513382400, 1294185600],
    }
    assert items["title"][:] == ["Lost Summoner Kitty", "Twice", "Only a title"]
    assert len(load_public_dataset("steam", tmp_path, limit_data_rows=2)[0]) == 2


def test_characters_that_python_2_printed_as_surrogates_are_read(tmp_path):
    row = "{u'username': u'%s', u'product_id': u'7', u'date': u'2017-12-17'}\n"
    users = (r"\ud83d\ude0a", r"\U0001f60b", r"half \ud83d", r"\xe9t\xe9")
    games = r"{u'app_name': u'Smile \ud83d\ude0a', u'id': u'7'}"
    files = {"steam_reviews.json": "".join(row % user for user in users), "steam_games.json": games}
    interactions, items = load_public_dataset("steam", write(tmp_path, files))
    assert interactions["user_id"][:] == ["\U0001f60a", "\U0001f60b", "half \ufffd", "été"]
    assert items["title"][:] == ["Smile \U0001f60a"]


def test_lines_that_are_not_literals_are_named_and_not_run(tmp_path):
    good = "{u'username': u'a', u'product_id': u'7', u'date': u'2017-12-17'}\n"
    for bad in ("{u'username': open('x', 'w')}\n", "[1]\n", "{u'username': u'cut\n"):
        folder = write(tmp_path, {"steam_reviews.json": good + bad, "steam_games.json": python_lines(GAMES)})
        with pytest.raises(ValueError, match=r"line 2 of .*steam_reviews.json is .*expected an object"):
            load_public_dataset("steam", folder)
    assert not Path("x").exists()


# --- Yelp ---


def test_yelp_is_read_with_its_stars(tmp_path):
    def review(user: str, business: str, stars: float, date: str) -> dict:
        return {"review_id": "r", "user_id": user, "business_id": business, "stars": stars, "useful": 0, "funny": 0,
                "cool": 0, "text": "t", "date": date}  # fmt: skip

    reviews = [
        review("u1", "b-2", 3.0, "2018-07-07 22:09:11"),
        review("u1", "b_1", 5.0, "1970-01-01 00:01:00"),
    ]
    businesses = [{"business_id": name, "name": f"Café {name}", "stars": 3.5, "attributes": {"WiFi": "u'no'"},
                   "categories": None, "hours": None} for name in ("b_1", "b-2", "b3")]  # fmt: skip
    files = {"yelp_academic_dataset_review.json": json_lines(reviews)}
    files["yelp_academic_dataset_business.json"] = json_lines(businesses)
    interactions, items = load_public_dataset("yelp", write(tmp_path, files))
    assert interactions.to_dict() == {
        "user_id": ["u1", "u1"],
        "item_id": ["b-2", "b_1"],
        "timestamp": [1531001351, 60],
        "rating": [3.0, 5.0],
    }
    assert items["title"][:] == ["Café b-2", "Café b_1"]


# --- Gowalla ---


def test_gowalla_is_read_backwards_so_that_ties_keep_their_order(tmp_path):
    rows = [
        ("0", "2010-10-19T23:55:27Z", "30.2359091167", "-97.7951395833", "22847"),
        ("0", "2010-10-18T22:17:43Z", "30.2691029532", "-97.7493953705", "420315"),
        ("0", "2010-10-18T22:17:43Z", "30.2557309927", "-97.7633857727", "316637"),
        ("5", "1970-01-01T00:00:09Z", "0", "0", "16516"),
    ]
    text = "".join("\t".join(row) + "\n" for row in rows)
    interactions, items = load_public_dataset("gowalla", write(tmp_path, {"loc-gowalla_totalCheckins.txt.gz": text}))
    assert interactions.to_dict() == {
        "user_id": [5, 0, 0, 0],
        "item_id": [16516, 316637, 420315, 22847],
        "timestamp": [9, 1287440263, 1287440263, 1287532527],
    }
    assert items["title"][:] == ["16516", "316637", "420315", "22847"]


# --- LastFM ---

PLAYS = [
    ("user_000001", "2009-05-04T23:08:57Z", "f1b1cf71", "Deep Dish", "", 'Ibiza "09'),
    ("user_000001", "2009-05-04T13:54:10Z", "", "None", "", "NaN"),
    ("user_000002", "1970-01-01T00:00:05Z", "x", " Deep Dish", "y", 'Ibiza "09'),
    ("user_000002", "1970-01-01T00:00:04Z", "x", "Deep Dish", "y", ""),
]
LASTFM_1K = "userid-timestamp-artid-artname-traid-traname.tsv"


def test_lastfm_1k_has_artists_or_tracks_by_name(tmp_path, caplog):
    text = "".join("\t".join(row) + "\n" for row in PLAYS) + "user_000002\ta line\twith too few\n"
    folder = write(tmp_path, {f"lastfm-dataset-1K/{LASTFM_1K}": text})
    interactions, items = load_public_dataset("lastfm-1k", folder)
    assert interactions.to_dict() == {
        "user_id": ["user_000002", "user_000002", "user_000001", "user_000001"],
        "item_id": ["Deep Dish", "Deep Dish", "None", "Deep Dish"],
        "timestamp": [4, 5, 1241445250, 1241478537],
    }
    assert items["title"][:] == ["Deep Dish", "None"]
    assert "skipped 1 lines that have not 6 values, first 'user_000002\\ta line" in caplog.text
    interactions, items = load_public_dataset("lastfm-1k-tracks", folder)
    assert interactions["item_id"][:] == ['Deep Dish - Ibiza "09', "None - NaN", 'Deep Dish - Ibiza "09']
    assert "dropped 1 rows without a user or an item" in caplog.text


def test_lastfm_2k_has_who_tagged_whom_and_when(tmp_path, caplog):
    tags = "userID\tartistID\ttagID\ttimestamp\r\n2\t52\t13\t1238536800000\r\n2\t52\t15\t1238536800000\r\n"
    tags += "2\t52\t18\t1238536801500\r\n2\t63\t13\t-428720400000\r\n7\t63\t13\t1238536800000\r\n"
    artists = 'id\tname\turl\tpictureURL\r\n52\tMorcheeba\thttp://a\thttp://b\r\n63\tAir "Fr\thttp://c\t\r\n'
    folder = write(tmp_path, {"user_taggedartists-timestamps.dat": tags, "artists.dat": artists})
    interactions, items = load_public_dataset("lastfm-2k", folder)
    assert interactions.to_dict() == {
        "user_id": [2, 2, 7],
        "item_id": [52, 52, 63],
        "timestamp": [1238536800.0, 1238536801.5, 1238536800.0],
    }
    assert items.to_dict()["title"] == ["Morcheeba", 'Air "Fr']
    assert "dropped 1 rows with times before 2002" in caplog.text


# --- mistakes ---


@pytest.mark.parametrize(
    ("name", "files", "settings", "error", "message"),
    [
        ("netflix", {}, {}, ValueError, "there is no public data set 'netflix'; expected one of amazon-2014"),
        ("steam", {"a.txt": ""}, {}, FileNotFoundError, r"contains \['a.txt'\]; expected steam_reviews.json or"),
        ("yelp", {"yelp_dataset.tar": ""}, {}, ValueError, "is an archive; .*unpack it"),
        ("gowalla", {}, {"items": "x.csv"}, ValueError, "items is given for gowalla, which has no titles but its ids"),
        ("steam", {}, {"items": "x.json"}, FileNotFoundError, "there is no file x.json: check items"),
        ("steam", {}, {"missing_titles": "drop"}, ValueError, "missing_titles is 'drop'; expected 'raise' or"),
        ("steam", {}, {"limit_data_rows": 0}, ValueError, "limit_data_rows is 0"),
        (
            "amazon-2014",
            {"reviews_A.json.gz": "", "reviews_B_5.json": "", "meta_A.json.gz": ""},
            {},
            ValueError,
            "has 2 files of amazon-2014: reviews_A.json.gz, reviews_B_5.json; expected one: pass the file itself",
        ),
        ("gowalla", {"loc-gowalla_totalCheckins.txt": "1\t2\n"}, {}, ValueError, "has no line of user, check-in time"),
        (
            "gowalla",
            {"loc-gowalla_totalCheckins.txt": "0\t2010-10-19T23:55:27Z\t1\t2\tx\n"},
            {},
            ValueError,
            "item_id of .*; expected whole numbers",
        ),
        (
            "lastfm-2k",
            {"user_taggedartists-timestamps.dat": "a\tb\n"},
            {},
            ValueError,
            r"begins with 'a\\tb\\n'; expect",
        ),
        (
            "yelp",
            {"yelp_academic_dataset_review.json": '{"user_id": "u", "business_id": "b", "stars": 1}\n'},
            {},
            ValueError,
            "has no column 'date'",
        ),
    ],
)
def test_wrong_names_files_and_settings_are_errors(name, files, settings, error, message, tmp_path):
    write(tmp_path, files)
    path = tmp_path / "yelp_dataset.tar" if "yelp_dataset.tar" in files else tmp_path
    with pytest.raises(error, match=message):
        load_public_dataset(name, path, **settings)
