import hashlib
import http.server
import io
import sys
import threading
import zipfile

import numpy as np
import pytest

from jmeta.tasks import download as module
from jmeta.tasks.download import cache_dir, download, extract_zip, open_npz, progress, read_keys, write_npz

CONTENT = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8).tobytes()
PAGE = b"\n<!DOCTYPE html><html><body>Please accept our terms</body></html>"


class Server(http.server.ThreadingHTTPServer):
    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked, self.url = [], f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    """Serves CONTENT in ways that the path picks."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_GET(self):
        self.server.asked.append((self.path, self.headers.get("Range")))
        body = PAGE if self.path == "/page.zip" else CONTENT
        first = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if self.path == "/none":
            return self.send_error(404)
        if self.path == "/busy" and len(self.server.asked) < 3:
            return self.send_error(503)
        if self.path == "/norange" or first == 0:
            self.send_response(200)
            first = 0
        elif first >= len(body):
            return self.send_error(416)
        else:
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(body) - 1}/{len(body)}")
        self.send_header("Content-Length", str(len(body) - first))
        self.end_headers()
        drops = self.path == "/drop" and len(self.server.asked) < 3
        self.wfile.write(body[first : first + 100_000] if drops else body[first:])

    def log_message(self, format, *args):
        pass


@pytest.fixture
def server():
    with Server() as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield http_server
        http_server.shutdown()
        thread.join()


def sha(content):
    return hashlib.sha256(content).hexdigest()


def test_downloads_once(server, tmp_path):
    path = tmp_path / "new" / "file"
    for _ in range(2):
        assert download(server.url + "/file", path, size=len(CONTENT), sha256=sha(CONTENT)) == path
    assert path.read_bytes() == CONTENT and len(server.asked) == 1
    assert [p.name for p in path.parent.iterdir()] == ["file"]


def test_resumes_a_partial_file(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT[:1234])
    download(server.url + "/file", tmp_path / "file", sha256=sha(CONTENT))
    assert server.asked == [("/file", "bytes=1234-")]


@pytest.mark.parametrize("path, part", [("/norange", CONTENT[:999]), ("/file", CONTENT), ("/file", CONTENT + b"more")])
def test_starts_over_where_it_cannot_resume(server, tmp_path, path, part):
    (tmp_path / "file.part").write_bytes(part)
    download(server.url + path, tmp_path / "file", sha256=sha(CONTENT), delay=0.0)
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_survives_dropped_connections(server, tmp_path):
    download(server.url + "/drop", tmp_path / "file", sha256=sha(CONTENT), delay=0.0)
    assert [asked for _, asked in server.asked] == [None, "bytes=100000-", "bytes=200000-"]


def test_waits_longer_before_each_try(server, tmp_path, monkeypatch):
    waits = []
    monkeypatch.setattr(module.time, "sleep", waits.append)
    download(server.url + "/busy", tmp_path / "file", sha256=sha(CONTENT), delay=0.1)
    assert waits == [0.1, 0.2]


def test_gives_up_with_the_place_to_put_the_file(server, tmp_path):
    with pytest.raises(ConnectionError, match=r"try 1 of 6.*404.*by hand"):
        download(server.url + "/none", tmp_path / "file")
    server.asked.clear()
    with pytest.raises(ConnectionError, match=r"try 1 of 1.*100000 of 300000 bytes"):
        download(server.url + "/drop", tmp_path / "file", retries=0)
    assert not (tmp_path / "file").exists() and (tmp_path / "file.part").stat().st_size == 100_000


@pytest.mark.parametrize(
    "name, wanted, text",
    [
        ("page.zip", {}, "web page"),
        ("file.zip", {}, "not a zip archive"),
        ("file", {"sha256": "0" * 64}, "sha256 is"),
        ("file", {"size": 5}, "300000 bytes, expected 5"),
    ],
)
def test_wrong_content_is_not_kept(server, tmp_path, name, wanted, text):
    with pytest.raises(ValueError, match=text):
        download(f"{server.url}/{name}", tmp_path / name, **wanted)
    assert not list(tmp_path.iterdir())


def archive(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def test_extracts_all(tmp_path):
    extract_zip(archive(tmp_path / "a.zip", {"x/1.txt": "one", "2.txt": "two"}), tmp_path / "out")
    assert (tmp_path / "out/x/1.txt").read_text() == "one" and (tmp_path / "out/2.txt").read_text() == "two"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.zip", "out"]
    with pytest.raises(FileExistsError, match="not an empty folder"):
        extract_zip(tmp_path / "a.zip", tmp_path / "out")


def link():
    member = zipfile.ZipInfo("link")
    member.create_system, member.external_attr = 3, 0o120777 << 16
    return member


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out", "..\\out", "C:/out", link()], ids=str)
def test_no_member_leaves_the_folder(tmp_path, name):
    with pytest.raises(ValueError, match="nothing was extracted"):
        extract_zip(archive(tmp_path / "a.zip", {"first": "1", name: "2"}), tmp_path / "in" / "folder")
    assert not list((tmp_path / "in").iterdir()) and not (tmp_path / "out").exists()


def test_damaged_archives_leave_nothing(tmp_path):
    path = archive(tmp_path / "a.zip", {"one": "1" * 1000})
    path.write_bytes(path.read_bytes().replace(b"1" * 500, b"2" * 500))
    with pytest.raises(ValueError, match="damaged zip archive"):
        extract_zip(path, tmp_path / "out")
    path.write_bytes(b"PK")
    with pytest.raises(ValueError, match="damaged zip archive"):
        extract_zip(path, tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["a.zip"]


def test_cache_dir_follows_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.delenv("JMETA_CACHE_DIR", raising=False)
    assert cache_dir() == tmp_path / "xdg" / "jmeta" and cache_dir().is_dir()
    monkeypatch.setenv("JMETA_CACHE_DIR", str(tmp_path / "mine"))
    assert cache_dir() == tmp_path / "mine"


def test_write_npz_is_all_or_nothing(tmp_path):
    write_npz(tmp_path / "a.npz", x=np.arange(3))
    with pytest.raises(ZeroDivisionError):
        write_npz(tmp_path / "a.npz", x=np.arange(5), y=Broken())
    with open_npz(tmp_path / "a.npz") as file:
        assert read_keys(file, "a.npz", ["x"])[0].tolist() == [0, 1, 2]
        with pytest.raises(ValueError, match="cannot read 'y'"):
            read_keys(file, "a.npz", ["y"])
    assert len(list(tmp_path.iterdir())) == 1


class Broken:
    def __array__(self, dtype=None, copy=None):
        return np.array(1 // 0)


def test_progress_is_one_line_or_a_bar(capsys, monkeypatch):
    with progress("doing it", 3) as advance:
        advance(2)
    assert capsys.readouterr().err == "doing it\n"
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    with progress("doing it", 3) as advance:
        advance(3)
    assert "100%" in terminal.getvalue()
