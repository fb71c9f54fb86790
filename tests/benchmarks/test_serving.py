"""The benchmark of serving measures programs that give the same answers, and bounds the memory of a large catalogue."""

import pytest
import torch

from benchmarks import serving


@pytest.fixture
def arguments(tmp_path):
    settings = {
        "num_items": [300],
        "forms": ["eager", "exact", "index"],
        "hidden_size": 8,
        "history_length": 5,
        "calls": 3,
    }
    settings |= {"table_users": 20, "rounds": 1, "memory_users": 0, "batch_size": 8}
    return serving.ServingBenchmarkArguments(str(tmp_path), **settings)


def test_every_form_is_measured(arguments):
    torch.set_num_threads(1)
    results = serving.measure(arguments)
    (catalogue,) = results["catalogues"]
    assert catalogue["items"] == 300 and set(catalogue["one_user"]) == {"eager", "exact", "index"}
    assert catalogue["one_user"]["index"]["recall"] > 0.9
    assert catalogue["table"]["recommend_all_over_bare"] > 0 and "memory" not in results
    assert catalogue["batch"]["recommend_over_product_cpu"] > 0


def test_the_bare_program_ranks_as_the_model_does(arguments):
    model = serving.clustered_model(300, arguments)
    histories = serving.random_histories(9, 300, 5)
    expected, _ = model.recommend(histories, serving.TOP_K, exclude_seen=False)
    assert serving.bare_program(model, histories, 4).tolist() == expected.tolist()


def test_the_report_has_a_row_for_each_catalogue():
    one_user = {form: {"p50_cpu_milliseconds": 1.5, "p95_cpu_milliseconds": 2.0} for form in serving.FORMS}
    one_user["onnx"]["bytes"], one_user["int8"]["bytes"] = 100, 28
    one_user["index"] |= {"recall": 0.9834, "probes": 8, "lists": 64}
    table = {"users_per_second": {"recommend_all": 900.0, "bare": 1000.0}}
    table |= {"recommend_all_over_bare": 0.9, "recommend_all_over_bare_cpu": 0.88}
    batch = {"cpu_milliseconds": {"recommend": 75.0, "product": 50.0}, "recommend_over_product_cpu": 1.5}
    setting = vars(serving.ServingBenchmarkArguments("out")) | {"torch": "2"}
    catalogue = {"items": 12_101, "one_user": one_user, "batch": batch, "table": table}
    results = {"setting": setting, "catalogues": [catalogue]}
    results["memory"] = {"users": 100_000, "items": 100_000, "added_bytes": 300 * 2**20}
    lines = serving.report(results).splitlines()
    cells = " | ".join(["1.50 (2.00)"] * 6)
    assert f"| 12,101 | {cells} | 0.983 | 0.28 |" in lines
    assert "| 12,101 | 75.0 | 50.0 | 1.50 |" in lines
    assert "| 12,101 | 900 | 1,000 | 0.90 (0.88) |" in lines
    assert "100,000 users and 100,000 items adds 300 MiB" in lines[-1]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="calls is 0: expected at least 1"):
        serving.ServingBenchmarkArguments("out", calls=0)
    with pytest.raises(ValueError, match="forms contain 'tflite': expected some of eager, compile"):
        serving.ServingBenchmarkArguments("out", forms=["tflite"])


@pytest.mark.slow
def test_exported_forms_are_measured(arguments):
    arguments.forms, arguments.table_users = ["onnx", "int8"], 0
    (catalogue,) = serving.measure(arguments)["catalogues"]
    assert set(catalogue["one_user"]) == {"onnx", "int8"}
    assert 0 < catalogue["one_user"]["int8"]["bytes"] < catalogue["one_user"]["onnx"]["bytes"]


@pytest.mark.slow
def test_recommend_ranks_a_million_items_for_256_users_in_200_megabytes(arguments):
    arguments.hidden_size, arguments.history_length = 64, 50
    assert 0 < serving.in_own_process(serving.memory_of_recommend, 256, 1_000_000, arguments) < 200 * 10**6
