"""8-bit weights in a small handmade graph: the table is stored once, for its look-ups and for its products."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from hf_ilora.serving.int8_weights import quantize_weights

NUM_ITEMS, HIDDEN, FILTERS = 500, 24, 3
FLOAT, INT64 = onnx.TensorProto.FLOAT, onnx.TensorProto.INT64


@pytest.fixture
def arrays():
    generator = np.random.default_rng(0)
    table = generator.normal(size=(NUM_ITEMS, HIDDEN)).astype(np.float32)
    table[3] = 0  # a row without numbers, as that of padding
    table[4] *= 1000  # a row with a scale of its own
    return {
        "table": table,
        "layer": generator.normal(size=(HIDDEN, HIDDEN)).astype(np.float32),
        "filters": generator.normal(size=(FILTERS, HIDDEN, 1)).astype(np.float32),
        "bias": generator.normal(size=NUM_ITEMS).astype(np.float32),
        "stacked": generator.normal(size=(1, FILTERS, HIDDEN)).astype(np.float32),
    }


@pytest.fixture
def model(arrays):
    """Scores the table for states, (users, hidden), that the model reads, and looks items up."""
    nodes = [
        helper.make_node("Gather", ["table", "items"], ["found"], axis=0),
        helper.make_node("MatMul", ["states", "layer"], ["hidden"]),
        helper.make_node("Gemm", ["states", "table"], ["products"], transB=1),
        helper.make_node("Add", ["products", "bias"], ["scores"]),
        helper.make_node("Identity", ["filters"], ["read_filters"]),
        helper.make_node("Identity", ["stacked"], ["read_stacked"]),
    ]
    inputs = [
        helper.make_tensor_value_info("states", FLOAT, ["users", HIDDEN]),
        helper.make_tensor_value_info("items", INT64, ["users", "items"]),
    ]
    dimensions = {"found": 3, "hidden": 2, "scores": 2, "read_filters": 3, "read_stacked": 3}
    outputs = [helper.make_tensor_value_info(name, FLOAT, [None] * number) for name, number in dimensions.items()]
    initializers = [numpy_helper.from_array(array, name) for name, array in arrays.items()]
    graph = helper.make_graph(nodes, "scorer", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


@pytest.fixture
def run(model):
    """Answers of the quantised model by name."""
    quantize_weights(model)
    onnx.checker.check_model(model)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return lambda states, items: dict(zip(names, session.run(None, {"states": states, "items": items}), strict=True))


STATES = np.random.default_rng(1).normal(size=(5, HIDDEN)).astype(np.float32)
STATES[1] *= 100
STATES[2] = 0
ITEMS = np.array([[1, 3, 4], [0, 2, 499], [7, 7, 7], [8, 9, 10], [1, 1, 4]])


def rounded(rows):
    """Every row as the nearest of 255 steps between -max and max, one row at a time."""
    result = np.zeros_like(rows)
    for number, row in enumerate(rows):
        step = np.float32(np.abs(row).max()) / np.float32(127)
        if step:
            result[number] = np.rint(row / step) * step
    return result


def test_looked_up_rows_are_rounded_to_255_steps_of_the_row(arrays, run):
    np.testing.assert_allclose(run(STATES, ITEMS)["found"], rounded(arrays["table"])[ITEMS], rtol=1e-5)


def test_scores_are_products_of_rounded_rows_and_rounded_states(arrays, run):
    expected = rounded(STATES).astype(np.float64) @ rounded(arrays["table"]).astype(np.float64).T + arrays["bias"]
    found = run(STATES, ITEMS)["scores"]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    error = np.abs(found - (STATES @ arrays["table"].T + arrays["bias"]))
    assert 0 < error[0, 5:].max() < 0.2  # rounding shows, and costs little beside scores of about 5


def test_the_scores_of_a_user_do_not_depend_on_the_others(run):
    together = run(STATES, ITEMS)["scores"]
    for user in range(len(STATES)):
        np.testing.assert_array_equal(run(STATES[user : user + 1], ITEMS[:1])["scores"][0], together[user])


def test_other_matrices_are_rounded_by_rows_and_vectors_are_kept(arrays, run):
    answers = run(STATES, ITEMS)
    np.testing.assert_allclose(answers["hidden"], STATES @ rounded(arrays["layer"]), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(answers["read_filters"][:, :, 0], rounded(arrays["filters"][:, :, 0]), rtol=1e-5)
    np.testing.assert_allclose(answers["read_stacked"][0], rounded(arrays["stacked"][0]), rtol=1e-5)


def test_every_weight_is_stored_once_in_a_byte_per_number(model, arrays, run):
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    assert set(arrays) & set(stored) == {"bias"}
    assert stored["table.uint8"].dtype == np.uint8 and stored["table.uint8"].shape == (NUM_ITEMS, HIDDEN)
    assert stored["table.scales"].shape == (NUM_ITEMS, 1) and stored["stacked.scales"].shape == (1, FILTERS, 1)
    numbers = sum(array.nbytes for name, array in stored.items() if not name.startswith("int8/"))
    assert numbers < 0.32 * sum(array.nbytes for array in arrays.values())
