"""Loading a recommender and its catalogue by name, from a Hub server on loopback."""

import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
import torch

from hf_ilora import Catalogue, SASRecConfig, SASRecForNextItem

PROGRAM = """
import sys, torch, hf_ilora
from transformers import AutoModel
model = AutoModel.from_pretrained(sys.argv[1])
item_ids, scores = model.recommend(torch.tensor([[1, 2]]), top_k=2)
print(model.catalogue.titles(item_ids[0]), scores.tolist())
"""


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = SASRecForNextItem(SASRecConfig(num_items=6, hidden_size=8, max_length=4))
    ids = list(range(1, 7))
    columns = {"item_id": ids, "raw_id": [f"raw-{i}" for i in ids], "title": [f"Title {i}" for i in ids]}
    model.catalogue = Catalogue(pa.table(columns))
    return model.eval()


@pytest.fixture
def hub(tmp_path, model):
    """A server that answers for the repository `user/sasrec` as a Hub does, and its address."""
    folder = tmp_path / "repository"
    model.save_pretrained(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self):
            self.answer(with_body=False)

        def do_GET(self):
            self.answer(with_body=True)

        def answer(self, with_body):
            file = folder / self.path.rpartition("/")[2].partition("?")[0]
            if not self.path.startswith("/user/sasrec/resolve/") or not file.is_file():
                code = "EntryNotFound" if self.path.startswith("/user/sasrec/") else "RepoNotFound"
                self.send_response(404)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Repo-Commit", "0" * 40)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            body = file.read_bytes()
            self.send_response(200)
            self.send_header("ETag", f'"{file.name}-{len(body)}"')
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(name, hub, tmp_path):
    environment = {
        **os.environ, "HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, "-c", PROGRAM, name], env=environment, capture_output=True, text=True, check=False, timeout=120
    )


def test_model_and_catalogue_come_from_the_hub_by_name(hub, model, tmp_path):
    result = run("user/sasrec", hub, tmp_path)
    assert result.returncode == 0, result.stderr
    item_ids, scores = model.recommend(torch.tensor([[1, 2]]), top_k=2)
    assert result.stdout.strip() == f"{model.catalogue.titles(item_ids[0])} {scores.tolist()}"


def test_unknown_name_is_an_error(hub, tmp_path):
    result = run("user/nothing", hub, tmp_path)
    assert result.returncode != 0 and "user/nothing" in result.stderr


def test_catalogue_stays_with_the_model_and_must_fit(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = SASRecForNextItem.from_pretrained(tmp_path)
    assert loaded.catalogue == model.catalogue
    Catalogue(model.catalogue.table.slice(0, 5)).to_parquet(tmp_path / "items.parquet")
    with pytest.raises(
        ValueError, match=r"items\.parquet belongs to another model: the catalogue has 5 items: expected 6"
    ):
        SASRecForNextItem.from_pretrained(tmp_path)


def test_what_is_no_catalogue_of_the_model_is_refused(model):
    catalogue = model.catalogue
    for wrong in (catalogue.table, ["Title 1"], "items.parquet"):
        with pytest.raises(TypeError, match=rf"catalogue is a {type(wrong).__name__}: expected a Catalogue or None"):
            model.catalogue = wrong
    with pytest.raises(ValueError, match="the catalogue has 5 items: expected 6, the num_items of the model"):
        model.catalogue = Catalogue(catalogue.table.slice(0, 5))
    assert model.catalogue is catalogue
    model.catalogue = None
    assert model.catalogue is None


def test_missing_and_foreign_files_are_refused(model, tmp_path):
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    with pytest.raises(ValueError, match="missing keys"):
        SASRecForNextItem.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 1}))
    with pytest.raises(ValueError, match="unexpected keys"):
        SASRecForNextItem.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**config, "hidden_size": 16}))
    with pytest.raises((ValueError, RuntimeError), match="mismatch"):
        SASRecForNextItem.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"model\.safetensors"):
        SASRecForNextItem.from_pretrained(tmp_path)
