"""Downloads against a server on this machine: whole, cut off and resumed, refused, and not what they should be."""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from mechedit import InputError, load_facts, load_requests
from mechedit.data import downloads, published_data
from mechedit.data.downloads import RemoteFile, cache_folder, fetch

CONTENT = bytes(range(256)) * 4000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site(ThreadingHTTPServer):
    """Serves `files`; what was asked and sent is in `log` as (status, bytes of the body)."""

    daemon_threads = True

    def __init__(self):
        self.files = {"/data.bin": CONTENT}
        self.ranges = True
        self.cut = None  # bytes after which the connection is closed
        self.tag = '"one"'
        self.claimed = None  # another Content-Length than the true one
        self.log = []
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        site = self.server
        content = site.files.get(self.path)
        if content is None:
            site.log.append((404, 0))
            self.send_error(404)
            return
        first = self._first(content) if site.ranges else 0
        body = content[first:]
        self.send_response(206 if first else 200)
        self.send_header("Content-Length", str(site.claimed or len(body)))
        if site.tag:
            self.send_header("ETag", site.tag)
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        sent = body[: site.cut]
        self.wfile.write(sent)
        site.log.append((206 if first else 200, len(sent)))

    def _first(self, content):
        """Where the body begins: after what the client has, if that is of this version."""
        range_header = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if not range_header or self.headers.get("If-Range") != self.server.tag:
            return 0
        return min(int(range_header[1]), len(content))

    def log_message(self, *_):
        pass


@pytest.fixture
def site(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    server = Site()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def names(folder):
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_a_file_is_downloaded_once_and_then_read_without_the_network(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin", sha256=SHA256, size=len(CONTENT))
    path = fetch(remote, tmp_path)
    assert path.read_bytes() == CONTENT
    assert names(tmp_path) == ["data.bin", "data.bin.sha256.json"]
    site.shutdown()
    assert fetch(remote, tmp_path) == path
    assert fetch(RemoteFile(url=remote.url), tmp_path) == path
    assert site.log == [(200, len(CONTENT))]


def test_progress_is_shown_up_to_the_end(site, tmp_path, capsys):
    fetch(RemoteFile(url=f"{site.url}/data.bin"), tmp_path)
    shown = capsys.readouterr().err
    assert "downloading data.bin" in shown
    assert "1.02M" in shown


def test_an_interrupted_download_goes_on_with_the_rest_alone(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin")
    site.cut = 600_000
    with pytest.raises(InputError, match=r"ended after 600000 of 1024000 bytes; try again, which goes on from there"):
        fetch(remote, tmp_path)
    assert names(tmp_path) == ["data.bin.part", "data.bin.part.json"]
    site.cut = None
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert site.log == [(200, 600_000), (206, 424_000)]
    assert names(tmp_path) == ["data.bin", "data.bin.sha256.json"]


def test_a_server_that_sends_no_parts_is_read_from_the_start(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin")
    site.cut, site.ranges = 600_000, False
    with pytest.raises(InputError, match="ended after"):
        fetch(remote, tmp_path)
    site.cut = None
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert site.log == [(200, 600_000), (200, 1_024_000)]


@pytest.mark.parametrize("tag", ['"two"', None])
def test_a_part_of_another_version_is_not_continued(site, tmp_path, tag):
    """Joined, the two versions would be a file that nobody published; without a hash nothing else would tell."""
    remote = RemoteFile(url=f"{site.url}/data.bin")
    site.cut = 600_000
    if tag is None:
        site.tag = None  # no name for the version at all: never to be continued
    with pytest.raises(InputError, match="ended after"):
        fetch(remote, tmp_path)
    site.cut, site.tag = None, tag
    site.files["/data.bin"] = CONTENT[::-1]
    assert fetch(remote, tmp_path).read_bytes() == CONTENT[::-1]
    assert site.log[1] == (200, 1_024_000)


def test_a_wrong_hash_leaves_nothing(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin", sha256="0" * 64)
    with pytest.raises(InputError, match=rf"has SHA-256 {SHA256}, expected 0+; what was read is removed"):
        fetch(remote, tmp_path)
    assert names(tmp_path) == []


def test_a_wrong_size_is_refused_before_it_is_read(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin", size=1000)
    with pytest.raises(InputError, match=r"has 1024000 bytes, expected 1000; the published file has changed"):
        fetch(remote, tmp_path)
    assert names(tmp_path) == []


def test_a_body_shorter_than_announced_is_no_file(site, tmp_path):
    site.claimed = len(CONTENT) + 1
    with pytest.raises(InputError, match="ended after 1024000 of 1024001 bytes"):
        fetch(RemoteFile(url=f"{site.url}/data.bin"), tmp_path)
    assert not (tmp_path / "data.bin").exists()


def test_a_missing_file_and_a_missing_server_are_named(site, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.bin answers 404 .* or put the file at .*nowhere\.bin"):
        fetch(RemoteFile(url=f"{site.url}/nowhere.bin"), tmp_path)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        closed = free.getsockname()[1]
    with pytest.raises(InputError, match=r"cannot download .*refused.* try again"):
        fetch(RemoteFile(url=f"http://127.0.0.1:{closed}/data.bin"), tmp_path)


def test_a_download_that_fails_leaves_no_lock(site, tmp_path):
    locks = []
    site.files["/other.bin"] = b"other"
    fetch(RemoteFile(url=f"{site.url}/other.bin"), tmp_path, check=lambda path: locks.extend(tmp_path.glob(".*.lock")))
    assert {path.name for path in locks} == {".other.bin.lock"}, "the control: there is one while it runs"
    with pytest.raises(InputError, match="404"):
        fetch(RemoteFile(url=f"{site.url}/nowhere.bin"), tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.bin", "other.bin.sha256.json"]


def test_a_silent_server_is_given_up(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}/data.bin"
        with pytest.raises(InputError, match=r"cannot download .*timed out"):
            fetch(RemoteFile(url=url), tmp_path, timeout=0.2)


def test_without_a_known_hash_the_first_download_is_held_against_later_uses(site, tmp_path):
    remote = RemoteFile(url=f"{site.url}/data.bin")
    path = fetch(remote, tmp_path)
    about = json.loads((tmp_path / "data.bin.sha256.json").read_text())
    assert about == {"url": remote.url, "size": len(CONTENT), "sha256": SHA256}
    path.write_bytes(CONTENT[::-1])
    with pytest.raises(InputError, match=rf"expected {SHA256}; remove .*data\.bin' and download it again"):
        fetch(remote, tmp_path)
    # Downloaded again, it has to be what it was at first.
    path.unlink()
    site.files["/data.bin"] = CONTENT[::-1]
    with pytest.raises(InputError, match=r"to trust the new one, remove .*data\.bin\.sha256\.json"):
        fetch(remote, tmp_path)
    (tmp_path / "data.bin.sha256.json").unlink()
    assert fetch(remote, tmp_path).read_bytes() == CONTENT[::-1]


def test_a_file_put_there_by_hand_is_taken_and_remembered(site, tmp_path):
    (tmp_path / "data.bin").write_bytes(b"mine")
    remote = RemoteFile(url=f"{site.url}/data.bin")
    assert fetch(remote, tmp_path).read_bytes() == b"mine"
    assert site.log == []
    (tmp_path / "data.bin").write_bytes(b"another")
    with pytest.raises(InputError, match="has bytes 7, expected 4"):
        fetch(remote, tmp_path)
    with pytest.raises(InputError, match="has SHA-256"):
        fetch(RemoteFile(url=remote.url, sha256=SHA256), tmp_path)


def test_the_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.delenv("MECHEDIT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_folder() == tmp_path / "home" / ".cache" / "mechedit"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # to be ignored, by the XDG specification
    assert cache_folder() == tmp_path / "home" / ".cache" / "mechedit"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "mechedit"
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "configured"))
    assert cache_folder() == tmp_path / "configured"


def published_at(site, monkeypatch, kind, name, file, content):
    site.files[f"/{file}"] = json.dumps(content).encode()
    entry = published_data.PublishedDataset(files=(RemoteFile(url=f"{site.url}/{file}"),), origin="a test")
    monkeypatch.setitem(published_data.PUBLISHED_DATASETS, (kind, name), entry)


def test_data_sets_are_read_by_name(site, tmp_path, monkeypatch):
    zsre = {"subject": "Rome", "src": "Where is Rome?", "answers": ["Italy"], "loc": "nq question: who", "loc_ans": "I"}
    published_at(site, monkeypatch, "requests", "zsre", "zsre_mend_eval.json", [zsre])
    (request,) = load_requests("zsre", cache=tmp_path)
    assert (request.prompt, request.target_new) == ("Where is {}?", "Italy")
    known = {"known_id": 3, "subject": "Rome", "attribute": "Italy", "template": "{} is in", "prompt": "Rome is in"}
    published_at(site, monkeypatch, "facts", "known_1000", "known_1000.json", [known])
    monkeypatch.setenv("MECHEDIT_CACHE", str(tmp_path / "by_environment"))
    assert load_facts("known_1000")[0].text == "Rome is in"
    assert (tmp_path / "by_environment" / "known_1000.json").is_file()


def test_every_published_file_has_a_name_of_its_own():
    """They share one folder."""
    urls = {remote.url for entry in published_data.PUBLISHED_DATASETS.values() for remote in entry.files}
    assert len({RemoteFile(url=url).name for url in urls}) == len(urls) == 7
    assert all(url.startswith("https://") for url in urls)


def test_an_unknown_name_lists_the_known_ones():
    with pytest.raises(InputError, match="one of the names tiny, counterfact, multi_counterfact, zsre"):
        load_requests("counterfacts")
    with pytest.raises(InputError, match="one of the names known, known_1000"):
        load_facts("knowns")


HTML = b"<!doctype html><html><body>Log in to the network</body></html>"
FACT = {"id": "1", "subject": "Rome", "prompt": "{} is in", "object": "Italy"}


class Misbehaving(ThreadingHTTPServer):
    """Sends these bytes as the whole answer, and closes the connection."""

    daemon_threads = True

    def __init__(self, answer, pause=0.0):
        self.answer, self.pause, self.requests = answer, pause, 0
        super().__init__(("127.0.0.1", 0), RawHandler)

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}/facts.json"

    def __enter__(self):
        self.thread = threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()
        self.thread.join()


class RawHandler(BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.requests += 1
        size = max(1, len(self.server.answer) // 8) if self.server.pause else len(self.server.answer)
        for start in range(0, len(self.server.answer), size):
            self.wfile.write(self.server.answer[start : start + size])
            self.wfile.flush()
            time.sleep(self.server.pause)
        self.close_connection = True

    def log_message(self, *_):
        pass


def answer(*headers, body=b"", status="200 OK"):
    return "\r\n".join([f"HTTP/1.1 {status}", *headers, "", ""]).encode("latin-1") + body


def chunk(data):
    return b"%x\r\n%s\r\n" % (len(data), data)


WHOLE = "\n".join(json.dumps({**FACT, "id": str(number)}) for number in range(4)).encode()
CHUNKED = "Transfer-Encoding: chunked"
MISBEHAVIORS = {
    # Each line of the file is a record, so that the first chunk alone could be read.
    "chunks, cut between two": (answer(CHUNKED, body=chunk(WHOLE[: WHOLE.index(b"\n") + 1])), "broke off before its"),
    "chunks, cut within one": (answer(CHUNKED, body=chunk(WHOLE)[:-20]), "broke off before its|IncompleteRead"),
    "chunks, none": (answer(CHUNKED), "broke off before its|IncompleteRead"),
    "less than announced": (answer(f"Content-Length: {len(WHOLE) + 1}", body=WHOLE), "ended after"),
    "nothing announced, cut": (answer(body=WHOLE[:-9]), "sent what is not facts.json, such as a login page or a part"),
    "empty": (answer("Content-Length: 0"), "sent what is not facts.json.*it is empty"),
    "empty, in chunks": (answer(CHUNKED, body=b"0\r\n\r\n"), "sent what is not facts.json.*it is empty"),
    "a login page": (answer(f"Content-Length: {len(HTML)}", body=HTML), "sent what is not facts.json, such as a login"),
    "an error as JSON": (answer(body=b'{"error": "log in"}'), "sent what is not facts.json"),
    "compressed unasked": (answer("Content-Encoding: gzip", body=gzip.compress(WHOLE)), "sent what is not facts.json"),
    "a redirect to itself": (answer("Location: /facts.json", status="302 Found"), "answers 302"),
    "a redirect to a file": (answer("Location: file:///etc/hostname", status="302 Found"), "answers 302"),
    "an error": (answer("Content-Length: 0", status="500 Internal Server Error"), "answers 500"),
    "no HTTP": (b"\0\1\2\3\r\n\r\n", "cannot download"),
    "a redirect to no address": (answer("Location: http://[::1", status="302 Found"), "cannot download .*IPv6"),
    "a redirect to no name": (answer(f"Location: http://{'a' * 70}.x/", status="302 Found"), "cannot download"),
    "a length in other digits": (answer("Content-Length: \u00b2", body=HTML), "sent what is not facts.json"),
    "a length of thousands of digits": (answer(f"Content-Length: {'9' * 5000}", body=HTML), "sent what is not facts"),
    "a part in other digits": (
        answer("Content-Range: bytes \u00b2-3/\u00b2", body=WHOLE, status="206 Partial Content"),
        "cannot download .*a part without its place",
    ),
    "a part of unknown size": (
        answer("Content-Range: bytes 0-99/*", body=WHOLE[: WHOLE.index(b"\n") + 1], status="206 Partial Content"),
        "cannot download .*a part of a file of unknown size",
    ),
    "an error in many words": (answer("Content-Length: 0", status=f"500 {'No ' * 9000}"), "answers 500 .No No"),
    "part of a part": (answer("Content-Range: bytes x/y", body=WHOLE, status="206 Partial Content"), "cannot download"),
}


@pytest.fixture
def no_proxy(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def publish(monkeypatch, url):
    entry = published_data.PublishedDataset(files=(RemoteFile(url=url),), origin="a test")
    monkeypatch.setitem(published_data.PUBLISHED_DATASETS, ("facts", "known_1000"), entry)


@pytest.mark.parametrize("name", MISBEHAVIORS)
def test_what_a_server_sends_instead_of_a_file_is_never_trusted(no_proxy, monkeypatch, tmp_path, name):
    data, message = MISBEHAVIORS[name]
    with Misbehaving(data) as server:
        publish(monkeypatch, server.url)
        with pytest.raises(InputError, match=message) as error:
            load_facts("known_1000", cache=tmp_path)
        assert len(str(error.value)) < 1200
        assert re.search("try again|put the file at", str(error.value))
        assert not [file for file in names(tmp_path) if file in ("facts.json", "facts.json.sha256.json")]
        # The control: the same server, once it sends the file.
        server.answer = answer(CHUNKED, body=chunk(WHOLE[:50]) + chunk(WHOLE[50:]) + b"0\r\n\r\n")
        assert len(load_facts("known_1000", cache=tmp_path)) == 4
    assert len(load_facts("known_1000", cache=tmp_path)) == 4  # from the cache, without a server
    assert names(tmp_path) == ["facts.json", "facts.json.sha256.json"]


def test_a_server_that_never_ends_fills_no_disk(no_proxy, monkeypatch, tmp_path):
    more = answer(CHUNKED, body=chunk(WHOLE) * 50)
    with Misbehaving(more) as server:
        sized = RemoteFile(url=server.url, size=len(WHOLE))
        with pytest.raises(InputError, match=rf"sent more than {len(WHOLE)} bytes of facts\.json, .*try again"):
            fetch(sized, tmp_path)
        assert names(tmp_path) == []
        monkeypatch.setattr(downloads, "LARGEST", 2 * len(WHOLE))
        with pytest.raises(InputError, match=rf"sent more than {2 * len(WHOLE)} bytes of facts\.json"):
            fetch(RemoteFile(url=server.url), tmp_path)
        assert names(tmp_path) == []
        server.answer = answer(CHUNKED, body=chunk(WHOLE) + b"0\r\n\r\n")  # the control
        assert fetch(sized, tmp_path).read_bytes() == WHOLE


def test_a_slow_server_is_waited_for(no_proxy, monkeypatch, tmp_path):
    with Misbehaving(answer(f"Content-Length: {len(WHOLE)}", body=WHOLE), pause=0.05) as server:
        assert fetch(RemoteFile(url=server.url), tmp_path, timeout=5.0).read_bytes() == WHOLE


class Dripping(Misbehaving):
    """Sends its answer a byte at a time, from one of them on, long before any wait for a byte is too long."""

    def __init__(self, answer, begin):
        self.begin = begin
        super().__init__(answer)
        self.RequestHandlerClass = DrippingHandler


class DrippingHandler(RawHandler):
    def do_GET(self):
        self.server.requests += 1
        begin = self.server.begin
        with contextlib.suppress(OSError):
            self.wfile.write(self.server.answer[:begin])
            for byte in self.server.answer[begin:]:
                self.wfile.write(bytes([byte]))
                self.wfile.flush()
                time.sleep(0.01)
        self.close_connection = True


BODY_BEGINS = len(answer(f"Content-Length: {len(WHOLE)}"))


@pytest.mark.parametrize(
    ("data", "begin", "message"),
    [
        (answer(f"Content-Length: {len(WHOLE)}", body=WHOLE), BODY_BEGINS + 40, r"it sent \d+ bytes in 0.*try again"),
        (answer(CHUNKED, body=chunk(WHOLE) + b"0\r\n\r\n"), 60, r"it sent \d+ bytes in 0.*try again"),
        (answer("A: " + "a" * 500, body=WHOLE), 20, "its answer did not begin within 0.8 seconds.*try again"),
    ],
    ids=["body", "chunk", "headers"],
)
def test_a_server_that_drips_is_given_up(no_proxy, monkeypatch, tmp_path, data, begin, message):
    with Dripping(data, begin) as server:
        start = time.monotonic()
        with pytest.raises(InputError, match=message):
            fetch(RemoteFile(url=server.url), tmp_path, timeout=0.2)
        assert time.monotonic() - start < 3
        assert names(tmp_path) in ([], ["facts.json.part", "facts.json.part.json"])
        # The control: no wait for a byte is too long, and all of it would come in the end.
        monkeypatch.setattr(downloads, "SLOWEST", 0)
        server.answer = server.answer if begin > 20 else answer(body=WHOLE)
        assert fetch(RemoteFile(url=server.url), tmp_path, timeout=0.2).read_bytes() == WHOLE


def test_what_was_trusted_before_and_cannot_be_read_says_how_to_start_over(no_proxy, monkeypatch, tmp_path):
    with Misbehaving(answer(body=HTML)) as server:
        fetch(RemoteFile(url=server.url), tmp_path)  # as earlier releases did: nothing reads it first
        publish(monkeypatch, server.url)
        with pytest.raises(InputError, match=r"to do that again, remove .*facts\.json' and .*sha256\.json'"):
            load_facts("known_1000", cache=tmp_path)
        for file in names(tmp_path):
            (tmp_path / file).unlink()
        server.answer = answer(f"Content-Length: {len(WHOLE)}", body=WHOLE)
        assert len(load_facts("known_1000", cache=tmp_path)) == 4


def test_a_file_put_there_by_hand_is_read_before_it_is_trusted(no_proxy, monkeypatch, tmp_path):
    publish(monkeypatch, "http://127.0.0.1:1/facts.json")
    (tmp_path / "facts.json").write_bytes(HTML)
    with pytest.raises(InputError, match=r"facts\.json' is not the file http.*remove it and download it again"):
        load_facts("known_1000", cache=tmp_path)
    assert names(tmp_path) == ["facts.json"]
    (tmp_path / "facts.json").write_bytes(WHOLE)
    assert len(load_facts("known_1000", cache=tmp_path)) == 4


@pytest.mark.parametrize("content", [b"null", b"[]", b"{", b"\xff", b'{"url": 5}', b'{"validator": "a\\nb"}'])
def test_a_damaged_note_beside_a_partial_download_is_no_version(site, tmp_path, content):
    remote = RemoteFile(url=f"{site.url}/data.bin")
    site.cut = 600_000
    with pytest.raises(InputError, match="ended after"):
        fetch(remote, tmp_path)
    (tmp_path / "data.bin.part.json").write_bytes(
        content.replace(b'{"validator', b'{"url": "%s", "validator' % remote.url.encode())
    )
    site.cut = None
    assert fetch(remote, tmp_path).read_bytes() == CONTENT
    assert site.log[1] == (200, 1_024_000)
