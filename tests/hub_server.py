"""A small Hub on loopback: repositories, commits, large files, branches, tags and tokens, and the faults of real ones.

It answers the requests of huggingface_hub and transformers when models are pushed and loaded. `*.parquet` and
`*.safetensors` are large files: uploaded apart from the commit, and answered with a redirect.
"""

import base64
import hashlib
import json
import re
import secrets
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

WRITER, READER, STRANGER = "hf_writer", "hf_reader", "hf_stranger"
LARGE_SUFFIXES = (".parquet", ".safetensors")
# "user/name" of a model, "datasets/user/name" and "spaces/user/name" of the others, as the Hub's addresses have them.
REPO = r"(?P<repo>(?:datasets/|spaces/)?[^/]+/[^/]+)"
DATE = "2026-01-01T00:00:00.000Z"


@dataclass
class Commit:
    """One state of a repository: its files by path, and the commit before it."""

    oid: str
    title: str
    parent: str | None
    files: dict[str, bytes]


@dataclass
class Repository:
    """Commits by oid, and the branches and tags that name them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    def commit(self, revision: str) -> Commit | None:
        return self.commits.get(self.branches.get(revision, self.tags.get(revision, revision)))

    def add(self, branch: str, title: str, files: dict[str, bytes]) -> Commit:
        parent = self.branches.get(branch)
        oid = secrets.token_hex(20)  # never one of an earlier repository of the same name, which a client may have kept
        self.commits[oid] = Commit(oid, title, parent, files)
        self.branches[branch] = oid
        return self.commits[oid]

    def history(self, branch: str = "main") -> list[Commit]:
        """Newest first."""
        commits = [self.commit(branch)]
        while commits[-1].parent is not None:
            commits.append(self.commits[commits[-1].parent])
        return commits


class HubServer(ThreadingHTTPServer):
    """The Hub.

    Attributes:
        tokens: user and role ("write" or "read") of each token.
        repositories: by id, "user/name".
        large_files: uploaded files, by their sha256.
        faults: (method, part of the path, fault) of requests to come; each happens once. Faults: a status such as 503;
            "drop" (no answer, nothing done); "drop_answer" (done, but no answer); "cut" (half of the body);
            "flip" (another last byte);
            "overtaken" (somebody else's commit on every main branch comes first).
        renamed: the new id of a repository by its old one; requests for the old one are redirected.
        requests: (method, path) of the requests so far.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.tokens = {WRITER: ("user", "write"), READER: ("user", "read"), STRANGER: ("stranger", "write")}
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.faults: list[tuple[str, str, int | str]] = []
        self.renamed: dict[str, str] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def start(self) -> "HubServer":
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def rename(self, repo: str, new: str) -> None:
        self.repositories[new] = self.repositories.pop(repo)
        self.renamed[repo] = new

    def count(self, method: str, part: str) -> int:
        """How many requests there were with this method and this part in their path."""
        return sum(asked == method and part in path for asked, path in self.requests)

    def take_fault(self, method: str, path: str) -> int | str | None:
        with self.lock:
            self.requests.append((method, path))
            for number, (asked, part, fault) in enumerate(self.faults):
                if asked == method and part in path:
                    del self.faults[number]
                    return fault
        return None


class _Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, code: str | None = None, **content):
        super().__init__(message)
        self.status, self.content = status, {"error": message} | content
        self.headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})


def blob_oid(content: bytes) -> str:
    """The name that git gives to a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    server: HubServer
    protocol_version = "HTTP/1.1"

    ROUTES = (
        ("GET", r"/api/whoami-v2", "whoami"),
        ("POST", r"/api/repos/create", "create"),
        ("POST", r"/api/validate-yaml", "validate"),
        ("POST", rf"/api/models/{REPO}/preupload/(?P<revision>[^/]+)", "preupload"),
        ("POST", rf"/api/models/{REPO}/commit/(?P<revision>[^/]+)", "add_commit"),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>[^/]+)", "add_branch"),
        ("POST", rf"/api/models/{REPO}/tag/(?P<revision>[^/]+)", "add_tag"),
        ("GET", rf"/api/models/{REPO}/refs", "refs"),
        ("GET", rf"/api/models/{REPO}/tree/(?P<revision>[^/]+)(?P<folder>/.*)?", "tree"),
        ("POST", rf"/api/models/{REPO}/paths-info/(?P<revision>[^/]+)", "paths_info"),
        ("GET", rf"/api/models/{REPO}(/revision/(?P<revision>[^/]+))?", "info"),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", "batch"),
        ("PUT", r"/large_files/(?P<oid>\w+)", "put_large"),
        ("POST", r"/large_files/verify", "verify_large"),
        ("GET", r"/large_files/(?P<oid>\w+)", "get_large"),
        ("GET", rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", "resolve"),
    )

    def do_GET(self):
        self.handle_request("GET")

    def do_HEAD(self):
        self.handle_request("HEAD")

    def do_POST(self):
        self.handle_request("POST")

    def do_PUT(self):
        self.handle_request("PUT")

    def handle_request(self, method: str) -> None:
        self.body = self.read_body()
        split = urlsplit(self.path)
        path = re.sub("^/api/(datasets|spaces)/", r"/api/models/\1/", split.path)
        self.query = parse_qs(split.query)
        self.fault = self.server.take_fault(method, split.path)
        if self.fault == "drop":
            self.close_connection = True
            return
        if self.fault == "overtaken":
            for repository in self.server.repositories.values():
                repository.add("main", "somebody else", repository.commit("main").files | {"other.txt": b"other"})
        try:
            if isinstance(self.fault, int):
                raise _Refused(self.fault, "the server has a bad day")
            for old, new in self.server.renamed.items():
                if re.search(rf"/{re.escape(old)}(?=[/.]|$)", path):
                    moved = _Refused(307, "the repository has another name")
                    moved.headers["Location"] = self.path.replace(old, new, 1)
                    raise moved
            for route_method, pattern, name in self.ROUTES:
                match = re.fullmatch(pattern, path)
                if match and route_method == ("GET" if method == "HEAD" else method):
                    with self.server.lock:
                        status, headers, body = vars(_Handler)[name](
                            self, **{key: value and unquote(value) for key, value in match.groupdict().items()}
                        )
                    break
            else:
                raise _Refused(404, f"no {method} {split.path}")
        except _Refused as refused:
            status, headers, body = refused.status, refused.headers, json.dumps(refused.content).encode()
        if self.fault == "drop_answer":
            self.close_connection = True
            return
        self.send_response(status)
        for header, value in ({"Content-Length": str(len(body))} | headers).items():
            self.send_header(header, value)
        self.end_headers()
        if method != "HEAD":
            if self.fault == "flip":
                body = body[:-1] + bytes([body[-1] ^ 1])
            self.wfile.write(body[: len(body) // 2] if self.fault == "cut" else body)
            self.close_connection = self.fault == "cut"

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def log_message(self, *arguments):
        pass

    # --- users and their rights ---

    def user(self) -> tuple[str | None, str]:
        """Name and role; an unknown token is refused, as the Hub does, also where none is needed."""
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.tokens:
            raise _Refused(401, "Invalid credentials in Authorization header")
        return self.server.tokens.get(token, (None, "read"))

    def repository(self, repo: str, write: bool = False) -> Repository:
        name, role = self.user()
        found = self.server.repositories.get(repo)
        owns = name == repo.split("/")[-2]
        if found is None or (found.private and not owns):
            raise _Refused(401 if name is None else 404, "Repository not found", "RepoNotFound")
        if write and not (owns and role == "write"):
            raise _Refused(403, f"Forbidden: you don't have the rights to write to {repo}")
        return found

    def state(self, repo: str, revision: str, write: bool = False) -> tuple[Repository, Commit]:
        repository = self.repository(repo, write)
        commit = repository.commit(revision)
        if commit is None:
            raise _Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository, commit

    @staticmethod
    def as_json(content):
        return 200, {"Content-Type": "application/json"}, json.dumps(content).encode()

    # --- repositories ---

    def whoami(self):
        name, role = self.user()
        if name is None:
            raise _Refused(401, "Invalid username or password.")
        return self.as_json({"type": "user", "name": name, "orgs": [], "auth": {"accessToken": {"role": role}}})

    def create(self):
        name, role = self.user()
        asked = json.loads(self.body)
        owner = asked["organization"] or name
        if name is None:
            raise _Refused(401, "Invalid username or password.")
        if role != "write" or owner != name:
            raise _Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
        kind = asked.get("type") or "model"
        repo = f"{'' if kind == 'model' else f'{kind}s/'}{owner}/{asked['name']}"
        if repo in self.server.repositories:
            raise _Refused(409, "You already created this model repo", url=f"{self.server.url}/{repo}")
        repository = self.server.repositories[repo] = Repository(private=asked.get("visibility") == "private")
        repository.add("main", "initial commit", {".gitattributes": b"*.safetensors filter=lfs\n"})
        return self.as_json({"url": f"{self.server.url}/{repo}"})

    def validate(self):
        content = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", content, re.DOTALL)
        metadata = yaml.safe_load(match[1]) if match else None
        if not isinstance(metadata, dict):
            raise _Refused(400, "no metadata", errors=[{"message": "no metadata"}], warnings=[])
        for model in metadata.get("model-index", []):
            for result in model["results"]:
                if not all(metric["value"] is not None and metric["type"] for metric in result["metrics"]):
                    raise _Refused(400, "a metric without a value", errors=[{"message": "no value"}], warnings=[])
        return self.as_json({"errors": [], "warnings": []})

    def info(self, repo, revision):
        repository, commit = self.state(repo, revision or "main")
        siblings = [{"rfilename": path} for path in commit.files]
        content = {
            "id": "/".join(repo.split("/")[-2:]),
            "sha": commit.oid,
            "private": repository.private,
            "siblings": siblings,
            "tags": [],
        }
        return self.as_json(content | {"lastModified": DATE, "downloads": 0, "likes": 0})

    def refs(self, repo):
        repository = self.repository(repo)
        named = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
        content = {
            kind: [{"name": name, "ref": f"refs/{part}/{name}", "targetCommit": oid} for name, oid in each.items()]
            for kind, (part, each) in named.items()
        }
        return self.as_json(content | {"converts": []})

    def add_branch(self, repo, branch):
        repository = self.repository(repo, write=True)
        if branch in repository.branches:
            raise _Refused(409, "Reference already exists")
        repository.branches[branch] = repository.commit(json.loads(self.body).get("startingPoint", "main")).oid
        return self.as_json({})

    def add_tag(self, repo, revision):
        repository, commit = self.state(repo, revision, write=True)
        repository.tags[json.loads(self.body)["tag"]] = commit.oid
        return self.as_json({})

    def tree(self, repo, revision, folder):
        _, commit = self.state(repo, revision)
        prefix = (folder or "").strip("/")
        paths = [path for path in commit.files if path.startswith(f"{prefix}/" if prefix else "")]
        if prefix and not paths:
            raise _Refused(404, f"{prefix} does not exist", "EntryNotFound")
        return self.as_json([self.entry(commit, path) for path in paths])

    def paths_info(self, repo, revision):
        _, commit = self.state(repo, revision)
        asked = json.loads(self.body) if self.body.startswith(b"{") else parse_qs(self.body.decode())
        return self.as_json([self.entry(commit, path) for path in asked["paths"] if path in commit.files])

    @staticmethod
    def entry(commit: Commit, path: str) -> dict:
        content = commit.files[path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": blob_oid(content)}
        if path.endswith(LARGE_SUFFIXES):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        return entry

    # --- upload ---

    def preupload(self, repo, revision):
        _, commit = self.state(repo, revision, write=True)
        files = []
        for asked in json.loads(self.body)["files"]:
            path = asked["path"]
            large = path.endswith(LARGE_SUFFIXES)
            known = commit.files.get(path)
            oid = None if known is None else sha256(known) if large else blob_oid(known)
            files.append({"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid})
        return self.as_json({"files": files})

    def batch(self, repo):
        self.repository(repo, write=True)
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.server.large_files:
                url = f"{self.server.url}/large_files"
                answer["actions"] = {
                    "upload": {"href": f"{url}/{asked['oid']}?X-Amz-Signature=secret"},
                    "verify": {"href": f"{url}/verify"},
                }
            objects.append(answer)
        return self.as_json({"transfer": "basic", "objects": objects})

    def put_large(self, oid):
        if sha256(self.body) != oid:
            raise _Refused(400, "the content has another sha256")
        self.server.large_files[oid] = self.body
        return 200, {}, b""

    def verify_large(self):
        asked = json.loads(self.body)
        if len(self.server.large_files.get(asked["oid"], b"")) != asked["size"]:
            raise _Refused(422, "the file was not uploaded")
        return self.as_json({})

    def add_commit(self, repo, revision):
        repository, commit = self.state(repo, revision, write=True)
        header, *operations = [json.loads(line) for line in self.body.splitlines()]
        parent = header["value"].get("parentCommit")
        if revision not in repository.branches:
            raise _Refused(400, f"{revision} is no branch")
        if parent is not None and parent != commit.oid:
            raise _Refused(412, "A commit has happened since. Please refresh and try again.")
        files = dict(commit.files)
        for operation in operations:
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    raise _Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                del files[value["path"]]
        content = {"success": True, "hookOutput": ""}
        if self.query.get("create_pr") == ["1"]:
            number = 1 + sum(branch.startswith("refs/pr/") for branch in repository.branches)
            revision = f"refs/pr/{number}"
            repository.branches[revision] = commit.oid
            content["pullRequestUrl"] = f"{self.server.url}/{repo}/discussions/{number}"
        added = repository.add(revision, header["value"]["summary"], files)
        url = f"{self.server.url}/{repo}/commit/{added.oid}"
        return self.as_json(content | {"commitOid": added.oid, "commitUrl": url})

    # --- download ---

    def resolve(self, repo, revision, path):
        _, commit = self.state(repo, revision)
        headers = {"X-Repo-Commit": commit.oid}
        content = commit.files.get(path)
        if content is None:
            refused = _Refused(404, "Entry not found", "EntryNotFound")
            refused.headers |= headers
            raise refused
        if path.endswith(LARGE_SUFFIXES):
            oid = sha256(content)
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(content))}
            # another host, as the store of large files is: the client takes the headers above from this answer
            store = self.server.url.replace("127.0.0.1", "localhost")
            return 302, headers | {"Location": f"{store}/large_files/{oid}"}, b""
        return self.ranged(content, headers | {"ETag": f'"{blob_oid(content)}"'})

    def get_large(self, oid):
        return self.ranged(self.server.large_files[oid], {"ETag": f'"{oid}"'})

    def ranged(self, content: bytes, headers: dict[str, str]):
        """All of the content, or from where the client asks on."""
        asked = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not asked:
            return 200, headers | {"Accept-Ranges": "bytes"}, content
        start = int(asked[1])
        if start >= len(content):
            raise _Refused(416, "nothing from there on")
        return 206, headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}, content[start:]
