"""A page that loads an artifact with transformers.js and writes, in a real headless Chromium that reaches nothing but the loopback.

By hand: ``python tests/browser_page.py ARTIFACT TEXT``.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

_PAGE = """<!doctype html>
<meta charset="utf-8">
<title>An artifact in a browser</title>
<p id="text"></p>
<script type="module">
const answer = async (found) => fetch("/answer", { method: "POST", body: JSON.stringify(found) });
// transformers.js 4.3.1 waits for ever for a data file that is not there, and only here says so.
addEventListener("unhandledrejection", ({ reason }) => answer({ error: `${reason?.name}: ${reason?.message}` }));
try {
  const { AutoModelForCausalLM, AutoTokenizer, Tensor, env } = await import("/library/transformers.min.js");
  env.allowLocalModels = true;  // those that this page's own server has, under /models/
  env.allowRemoteModels = false;
  env.useBrowserCache = false;
  const build = "/ort/ort-wasm-simd-threaded.asyncify";
  env.backends.onnx.wasm.wasmPaths = { mjs: `${build}.mjs`, wasm: `${build}.wasm` };
  const asked = await (await fetch("/request")).json();
  const began = performance.now();
  const model = await AutoModelForCausalLM.from_pretrained("artifact", { dtype: asked.dtype, device: "wasm" });
  const loaded = performance.now();
  const tokenizer = await AutoTokenizer.from_pretrained("artifact");
  const feeds = asked.ids
    ? { input_ids: new Tensor("int64", asked.ids.map(BigInt), [1, asked.ids.length]),
        attention_mask: new Tensor("int64", asked.ids.map(() => 1n), [1, asked.ids.length]) }
    : tokenizer.apply_chat_template([{ role: "user", content: asked.text }], { add_generation_prompt: true, return_dict: true });
  const { logits } = await model(feeds);
  const started = performance.now();
  const output = await model.generate({ ...feeds, max_new_tokens: asked.count, do_sample: false });
  const seconds = (performance.now() - started) / 1000;
  const generated = Array.from(output.data, Number).slice(feeds.input_ids.dims[1]);
  const text = tokenizer.decode(generated, { skip_special_tokens: true });
  document.getElementById("text").textContent = text;
  await answer({
    generated, text, last_logits: Array.from(logits.data.slice(-logits.dims[2])), load_seconds: (loaded - began) / 1000,
    tokens_per_second: generated.length / seconds, browser: navigator.userAgent, version: env.version,
  });
} catch (error) {
  await answer({ error: `${error.name}: ${error.message}` });
}
</script>
"""
_KINDS = {".js": "text/javascript", ".mjs": "text/javascript", ".wasm": "application/wasm", ".json": "application/json"}
_QUIET = ("no-first-run", "disable-background-networking", "disable-component-update", "disable-sync", "disable-quic")


def write_in_browser(artifact: Path, modules: Path, asked: Mapping[str, Any], *, timeout: float = 120) -> dict[str, Any]:
    """What the page found. ``modules``: the node_modules that has transformers.js; ``asked``: ``ids`` or ``text``, ``count``, ``dtype``.

    Raises RuntimeError with the page's own words, or where it said nothing in time.
    """
    program = shutil.which("chromium")
    if program is None:
        raise RuntimeError("chromium is not on PATH; on Debian: apt-get install chromium")
    folders = {
        "library": modules / "@huggingface" / "transformers" / "dist",
        "ort": modules / "onnxruntime-web" / "dist",
        "models/artifact": artifact,
    }
    answers: list[dict[str, Any]] = []
    arrived = threading.Event()
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(_Handler, folders, dict(asked), answers, arrived))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with tempfile.TemporaryDirectory(prefix="octavo-browser-", ignore_cleanup_errors=True) as profile:
        switches = [f"--{name}" for name in ("headless", "no-sandbox", "disable-gpu", "disable-dev-shm-usage", *_QUIET)]
        alone = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
        command = [program, *switches, alone, f"--user-data-dir={profile}", "--remote-debugging-port=0"]
        command.append(f"http://127.0.0.1:{server.server_port}/")
        browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            if not arrived.wait(timeout):
                raise RuntimeError(f"the page said nothing within {timeout:.0f} s")
        finally:
            browser.terminate()
            browser.wait()
            server.shutdown()
            server.server_close()
    if "error" in answers[0]:
        raise RuntimeError(answers[0]["error"])
    return answers[0]


class _Handler(BaseHTTPRequestHandler):
    def __init__(
        self, folders: dict[str, Path], asked: dict[str, Any], answers: list[dict[str, Any]], arrived: threading.Event, *rest: Any
    ) -> None:
        self.folders, self.asked, self.answers, self.arrived = folders, asked, answers, arrived
        super().__init__(*rest)

    def do_GET(self) -> None:
        if self.path == "/":
            return self._send(200, "text/html", _PAGE.encode())
        if self.path == "/request":
            return self._send(200, "application/json", json.dumps(self.asked).encode())
        for prefix, folder in self.folders.items():
            file = folder / self.path.removeprefix(f"/{prefix}/")
            if self.path.startswith(f"/{prefix}/") and file.is_file() and file.resolve().is_relative_to(folder.resolve()):
                return self._send(200, _KINDS.get(file.suffix, "application/octet-stream"), file.read_bytes())
        return self._send(404, "text/plain", b"")

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_POST(self) -> None:
        self.answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self._send(200, "text/plain", b"")
        self.arrived.set()

    def _send(self, status: int, kind: str, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *parts: Any) -> None:
        pass


def main(arguments: Sequence[str]) -> None:
    from convert import environments

    artifact, text = arguments
    modules = environments.require("transformers.js").folder / "node_modules"
    print(json.dumps({**write_in_browser(Path(artifact), modules, {"text": text, "count": 32, "dtype": "q8"}), "last_logits": "..."}))


if __name__ == "__main__":
    main(sys.argv[1:])
