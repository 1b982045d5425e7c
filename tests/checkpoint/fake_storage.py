"""A stand-in for Google's storage: as much of its JSON API as a checkpoint needs."""

import email
import http.server
import itertools
import json
import re
import threading
import urllib.parse

ALLOWED = {"write": True}


class Bucket(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    objects, uploads = {}, {}
    generations = itertools.count(1)

    def log_message(self, *_):
        pass

    def answer(self):
        url = urllib.parse.urlsplit(self.path)
        asked = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if url.path.startswith("/batch"):
            code, out, headers = self.batch(body)
        else:
            told = {k: v[0] for k, v in asked.items()}
            code, out, headers = self.one(self.command, url.path, told, body)
        if not isinstance(out, bytes):
            headers = {**headers, "Content-Type": "application/json"}
            out = json.dumps(out).encode()
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(out))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(out)

    do_GET = do_POST = do_PUT = do_DELETE = answer

    def batch(self, body):
        kind = f"Content-Type: {self.headers['Content-Type']}\r\n\r\n"
        answers = []
        for part in email.message_from_bytes(kind.encode() + body).get_payload():
            method, path = part.get_payload().lstrip().split()[:2]
            code, *_ = self.one(method, urllib.parse.urlsplit(path).path, {}, b"")
            name = part.get("Content-ID", "<x>").strip("<>")
            answers.append(
                "--b\r\nContent-Type: application/http\r\n"
                f"Content-ID: <response-{name}>\r\n\r\nHTTP/1.1 {code} OK\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--b--\r\n"
        return 200, text.encode(), {"Content-Type": "multipart/mixed; boundary=b"}

    def one(self, method, path, asked, body):
        path = re.sub("^/(download/|resumable/)?(storage/v1/)?", "/", path)
        if "upload/" in path:
            return self.upload(asked, body)
        if re.fullmatch("/b/[^/]+", path):
            return 200, {"name": "bucket"}, {}
        if re.fullmatch("/b/[^/]+/o/?", path):
            return 200, self.listed(asked), {}
        if (found := re.fullmatch("/b/[^/]+/o/(.+)", path)) is None:
            return 404, {}, {}
        name = urllib.parse.unquote(found[1])
        if name not in self.objects:
            return 404, {"error": {"code": 404, "message": "no such object"}}, {}
        data, generation = self.objects[name]
        if method == "DELETE":
            self.objects.pop(name, None)
            return 204, b"", {}
        if asked.get("alt") != "media":
            return 200, self.about(name), {}
        if asked.get("ifGenerationNotMatch") == str(generation):
            return 304, b"", {}
        headers = {"x-goog-generation": str(generation)}
        part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if part is None:
            return 200, data, headers
        first, last = int(part[1]), min(int(part[2] or len(data)), len(data) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
        return 206, data[first : last + 1], headers

    def upload(self, asked, body):
        if not ALLOWED["write"]:
            return 403, {"error": {"code": 403, "message": "not yours"}}, {}
        if "upload_id" in asked:
            self.put(name := self.uploads[asked["upload_id"]], body)
            return 200, self.about(name), {}
        name = asked["name"]
        if asked["uploadType"] == "resumable":
            self.uploads[key := str(len(self.uploads))] = name
            here = f"http://{self.headers['Host']}{self.path}&upload_id={key}"
            return 200, {}, {"Location": here}
        self.put(name, body)
        return 200, self.about(name), {}

    def put(self, name, data):
        self.objects[name] = data, next(self.generations)

    def about(self, name):
        data, generation = self.objects[name]
        about = {"name": name, "bucket": "bucket", "size": str(len(data))}
        when = "2026-01-01T00:00:00Z"
        return about | {"generation": str(generation), "updated": when}

    def listed(self, asked):
        prefix, delimiter = asked.get("prefix", ""), asked.get("delimiter", "")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            below = name[len(prefix) :]
            if not name.startswith(prefix) or name < asked.get("startOffset", ""):
                continue
            if name >= asked.get("endOffset", "\U0010ffff"):
                continue
            if delimiter and delimiter in below:
                prefixes.add(prefix + below.split(delimiter)[0] + delimiter)
            else:
                items.append(self.about(name))
        return {"items": items, "prefixes": sorted(prefixes)}


def start():
    """The address of a new one."""
    server = http.server.ThreadingHTTPServer(("localhost", 0), Bucket)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://localhost:{server.server_address[1]}"
