"""The settings of the split protocols, their defaults and checks, and what each protocol leaks."""

import datetime

import pyarrow as pa

from .seeds import check_seed
from .tables import clean_seconds

# What each protocol lets training know that a deployed system would not. In addition, for all of them, filters count
# the interactions of all splits, and the catalogue lists the items of all splits.
LEAKS = {
    "leave_one_out": "training has interactions of other users that are newer than a user's targets",
    "last_n": "training has interactions of other users that are newer than a user's targets",
    "temporal_users": "training users may interact after the first test user has begun; with order_users_by='last', no "
    "training target is newer than a test target",
    "global_time": "none in time: all of training is older than all of validation, which is older than all of test",
    "time_folds": "none in time within a fold, but the test window of a fold validates the next one: choose settings "
    "by the validation of the same fold",
    "random": "training has later interactions of the same user and of all others, and histories have items that are "
    "newer than the targets: figures are too high for a system that must predict the future",
    "cold_items": "that of leave_one_out; in addition, filters counted the interactions with cold items, histories "
    "close the gaps that they leave, and validation has the same cold items as test",
}
PROTOCOLS = tuple(LEAKS)
# Validation and test rows of these protocols have several relevant items.
SEVERAL_TARGETS = ("last_n", "global_time", "time_folds", "random")
# These protocols need all interactions in memory at once, not those of one user at a time.
IN_MEMORY = ("temporal_users", "random")
USER_ORDERS = ("first", "last")

# Settings of some protocols only, with the default of each of them.
_SHARES = dict.fromkeys(("global_time", "time_folds", "random"), 0.1)
_DEFAULTS = {
    "order_users_by": {"temporal_users": "first"},
    "cold_share": {"cold_items": 0.1},
    "cold_seed": {"cold_items": 0},
    "num_targets": {"last_n": 5},
    "test_share": _SHARES,
    "validation_start": {"global_time": None},
    "test_start": {"global_time": None},
    "num_folds": {"time_folds": 3},
    "fold": {"time_folds": None},
    "split_seed": {"random": 0},
}

Moment = str | int | float | datetime.datetime | datetime.date


def checked_protocol(protocol: str, **settings) -> dict:
    """Check the settings of `build_sequences` replacing None with the protocol's defaults; data sets save the result.

    Raises:
        TypeError, ValueError: as `build_sequences`, for settings that are wrong whatever the data.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol is {protocol!r}: expected one of {', '.join(PROTOCOLS)}")
    temporal = protocol == "temporal_users"
    if settings["max_history"] is None and temporal:
        settings["max_history"] = 10
    if settings["min_history"] is None:
        settings["min_history"] = 3 if temporal else 1
    _fill_in(protocol, settings)
    _check_integers(settings)
    least = 1
    if protocol in ("leave_one_out", "last_n", "random", "cold_items"):  # every user is in every split
        least = 2 * settings.get("num_targets", 1) + 1
    if settings["min_user_interactions"] is None:
        settings["min_user_interactions"] = max(3, least)
    if settings["max_history"] is not None and settings["max_history"] < settings["min_history"]:
        raise ValueError(
            f"max_history={settings['max_history']} is below min_history={settings['min_history']}: expected a window "
            "that holds the shortest history"
        )
    if not isinstance(settings["drop_repeats"], bool):
        raise TypeError(f"drop_repeats is {settings['drop_repeats']!r}: expected True or False")
    rating = settings["min_rating"]
    if rating is not None:
        if isinstance(rating, bool) or not isinstance(rating, int | float) or rating != rating:
            raise TypeError(f"min_rating is {rating!r}: expected a number or None")
        settings["min_rating"] = float(rating)  # 3 and 3.0 are one setting, with one fingerprint
    if temporal and settings["order_users_by"] not in USER_ORDERS:
        raise ValueError(f"order_users_by is {settings['order_users_by']!r}: expected one of {', '.join(USER_ORDERS)}")
    if settings["min_user_interactions"] < least:
        several = f" with num_targets={settings['num_targets']}" if protocol == "last_n" else ""
        raise ValueError(
            f"min_user_interactions is {settings['min_user_interactions']}: {protocol}{several} needs {least} or more, "
            "because every user has a test target, a validation target and at least one item before them"
        )
    for name in ("cold_seed", "split_seed"):
        check_seed(name, settings.get(name))
    _check_share("cold_share", "items", 1, settings)
    _check_windows(protocol, settings)
    return {"name": protocol, **settings}


def _fill_in(protocol: str, settings: dict) -> None:
    """Fill in the defaults of the protocol's own settings; remove those of other protocols, which must be None."""
    if settings["test_start"] is not None and settings["test_share"] is not None:
        raise ValueError("test_start and test_share are given: expected the moment or the share, not both")
    for name, defaults in _DEFAULTS.items():
        if protocol in defaults:
            if settings[name] is None:
                settings[name] = defaults[protocol]
        elif settings[name] is not None:
            raise ValueError(f"{name} applies to {', '.join(defaults)} only: leave it out for {protocol}")
        elif name != "order_users_by":  # earlier versions saved it for all protocols
            del settings[name]
    if settings.get("test_start") is not None:
        settings["test_share"] = None


def _check_integers(settings: dict) -> None:
    least = {
        "min_item_interactions": 1,
        "min_history": 1,
        "num_candidates": 0,
        "candidate_seed": None,
    }
    optional = {"min_user_interactions": 1, "max_history": 1, "num_targets": 1, "num_folds": 2, "fold": 1}
    optional |= {"cold_seed": None, "split_seed": None}
    least |= {name: lowest for name, lowest in optional.items() if settings.get(name) is not None}
    for name, lowest in least.items():
        value = settings[name]
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"{name} is {value!r}: expected an integer")
        if lowest is not None and value < lowest:
            raise ValueError(f"{name} is {value}: expected {lowest} or more")
    if settings["num_candidates"] == 1:
        raise ValueError("num_candidates is 1, the target alone: expected 2 or more, or 0 to leave candidates out")


def _check_share(name: str, of: str, below: float, settings: dict) -> None:
    share = settings.get(name)
    if share is None:
        return
    if isinstance(share, bool) or not isinstance(share, int | float):
        raise TypeError(f"{name} is {share!r}: expected a number")
    if not 0 < share < below:
        raise ValueError(f"{name} is {share}: expected a share of the {of}, above 0 and below {below:g}")


def _check_windows(protocol: str, settings: dict) -> None:
    """Check the settings of protocols that split by time or share, and turn moments into seconds since 1970."""
    if protocol == "time_folds":
        fold, num_folds = settings["fold"], settings["num_folds"]
        if fold is None or fold > num_folds:
            raise ValueError(
                f"fold is {fold}: expected 1 to num_folds={num_folds}, the oldest to the newest; each fold is a data "
                "set of its own"
            )
        # The test windows of all folds, a window to validate the first fold, and something to train on.
        _check_share("test_share", f"interactions, for {num_folds + 1} windows", 1 / (num_folds + 1), settings)
    _check_share("test_share", "interactions, for test and as much for validation", 0.5, settings)
    if protocol != "global_time":
        return
    starts = settings["validation_start"], settings["test_start"]
    if (starts[0] is None) != (starts[1] is None):
        raise ValueError(
            f"validation_start is {starts[0]!r} and test_start is {starts[1]!r}: expected both, or neither for windows "
            "by test_share"
        )
    if starts[0] is None:
        return
    for name in ("validation_start", "test_start"):
        settings[name] = _seconds(name, settings[name])
    if settings["validation_start"] >= settings["test_start"]:
        raise ValueError(f"validation_start is {starts[0]!r} and test_start is {starts[1]!r}: expected an earlier one")


def _seconds(name: str, moment: Moment) -> int | float:
    """A moment in seconds since 1970."""
    if isinstance(moment, bool) or not isinstance(moment, Moment):
        raise TypeError(f"{name} is {moment!r}: expected seconds since 1970, or a time such as 2018-01-31")
    try:
        return clean_seconds(pa.chunked_array([pa.array([moment])]), name)[0].as_py()
    except ValueError as error:
        raise ValueError(
            f"{name} is {moment!r}: expected seconds since 1970, or a time in ISO 8601 such as 2018-01-31 or "
            "2018-01-31T12:00:00Z"
        ) from error


__all__ = ["IN_MEMORY", "LEAKS", "PROTOCOLS", "SEVERAL_TARGETS", "USER_ORDERS", "Moment", "checked_protocol"]
